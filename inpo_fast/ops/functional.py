# SPDX-License-Identifier: Apache-2.0
"""The public operators: check the arguments, choose a backend, call it.

Conventions of every function here:

* The state x or z is [B, ...], any layout; a result has the layout that ``torch.empty_like`` gives.
* ``coef`` is a row (a, b, c1, c2), [4], or one row per sample, [B, 4], float32 (float64 beside a
  float64 state), a tensor so that new coefficients do not recompile a compiled caller.
* ``m1`` and ``m2`` are the model outputs: none, one, or two (the halves of guided sampling).
* ``status`` is an int32 tensor [1] into which bits are OR-ed (``new_status``, ``check_status``).
  It is the only report of a range overflow or of NaN: no operator waits for the device.
* ``impl`` names the backend. "auto" takes the fastest that is there (or the one that the
  environment variable INPO_FAST_IMPL names); a named one runs or raises.
* A wrong argument is a TypeError or ValueError that names it. Results of an operator in place are
  written into their first argument, which is also returned; no other argument may share part of
  its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from inpo_fast.lattice import DEFAULT_FRAC_BITS
from inpo_fast.ops import validation as check
from inpo_fast.ops.autograd import AffineFunction, PreferenceErrorsFunction, pair_margin
from inpo_fast.ops.choice import Impl, resolve
from inpo_fast.ops.registration import EAGER, KERNELS, WRITTEN
from inpo_fast.ops.status import STATUS_NONFINITE

__all__ = [
    "PreferenceErrors",
    "affine_inverse",
    "affine_inverse_",
    "affine_update",
    "affine_update_",
    "lattice_decode",
    "lattice_encode",
    "lattice_inverse",
    "lattice_inverse_",
    "lattice_scaled_inverse",
    "lattice_scaled_inverse_",
    "lattice_scaled_update",
    "lattice_scaled_update_",
    "lattice_update",
    "lattice_update_",
    "preference_backward",
    "preference_errors",
    "preference_margin",
]


class PreferenceErrors(NamedTuple):
    """Per-sample means of squared differences, [B] each (``preference_errors``)."""

    e_theta: Tensor
    e_ref: Tensor
    d: Tensor


def _call(
    name: str,
    impl: str,
    arguments: tuple[Any, ...],
    apply: Callable[[dict[str, Callable[..., Any]]], Any] | None = None,
) -> Any:
    """Check the arguments, which are in the operator's order, choose a backend and call it.

    A native kernel checks its tensors before it writes, in a fraction of the time. So an eager call
    asks Python's checks only where a kernel has refused: they have the words. A wrong argument goes
    before a backend that is not there.

    ``apply`` gets the kernels of the backend, by name, and calls them in place of the operator.
    """
    compiling = torch.compiler.is_compiling()
    try:
        backend = resolve(impl, arguments[0].device)
        if compiling or backend != "native":
            check.CHECKS[name](*arguments)
        kernels = (KERNELS if compiling else EAGER)[backend]
        result = kernels[name](*arguments) if apply is None else apply(kernels)
    except Exception:
        try:
            check.CHECKS[name](*arguments)
        except (TypeError, ValueError) as wrong:
            raise wrong from None
        raise
    # Kernels write past autograd, which is told here: a backward that has saved what has changed
    # must refuse, not go on with other values. The compiler does it by itself.
    written = WRITTEN[name]
    if written and not compiling:
        increment_version(arguments[:written])
    return result


# --- Float states -----------------------------------------------------------------------------


def _affine(
    name: str,
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    status: Tensor | None,
    impl: Impl,
) -> Tensor:
    arguments = x, y, m1, m2, coef, status
    result: Tensor
    if not check.requires_grad(x, y, m1, m2, coef):
        result = _call(name, impl, arguments)
        return result
    check.CHECKS[name](*arguments)
    inverse = name == "affine_inverse"
    result = _call(
        name,
        impl,
        arguments,
        lambda kernels: AffineFunction.apply(x, y, m1, m2, coef, kernels[name], inverse),  # type: ignore[no-untyped-call]
    )
    if status is not None:
        nonfinite = ~torch.isfinite(result.detach()).all()  # []
        status.bitwise_or_(nonfinite.to(torch.int32) * STATUS_NONFINITE)
    return result


def _affine_in_place(
    name: str,
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    status: Tensor | None,
    impl: Impl,
) -> Tensor:
    arguments = x, y, m1, m2, coef, status
    if check.requires_grad(x, y, m1, m2, coef):
        check.CHECKS[name](*arguments)
        check.check_no_grad(f"{name} has no gradient, {name[:-1]} has", x=x, y=y, m1=m1, m2=m2)
    _call(name, impl, arguments)
    return x


def affine_update(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    status: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return x' = a*x + ((b*y + c1*m1) + c2*m2), one update of a reversible solver.

    The arithmetic is in float64 in this order; the result is rounded to float32 and, for 16-bit
    states, from there to the state's dtype. Every backend gives the same bits. Differentiable in
    x, y, m1 and m2.

    Args:
        x: the track that changes, [B, ...], float64, float32, float16 or bfloat16.
        y: the other track, like x.
        coef: (a, b, c1, c2), [4] or [B, 4].
        m1: model output, [B, ...], float32, float16 or bfloat16 (or float64 beside float64).
        m2: second model output, like m1.
        status: int32 [1]; gets STATUS_NONFINITE if a result is NaN or infinite.
        impl: the backend.

    Returns:
        [B, ...], dtype of x.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, coef that requires grad, or
            a backend that is not there.
    """
    return _affine("affine_update", x, y, coef, m1, m2, status, impl)


def affine_inverse(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    status: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return x' = (x - ((b*y + c1*m1) + c2*m2)) / a, which undoes ``affine_update``.

    It does so up to rounding: for the exact inverse use a lattice. Arguments, result and errors
    are those of ``affine_update``; a must not be 0.
    """
    return _affine("affine_inverse", x, y, coef, m1, m2, status, impl)


def affine_update_(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    status: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Do ``affine_update`` into x and return x. Tensors that require grad are refused."""
    return _affine_in_place("affine_update_", x, y, coef, m1, m2, status, impl)


def affine_inverse_(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    status: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Do ``affine_inverse`` into x and return x. Tensors that require grad are refused."""
    return _affine_in_place("affine_inverse_", x, y, coef, m1, m2, status, impl)


# --- Lattice states ---------------------------------------------------------------------------

_LATTICE_GRAD = "a lattice has no gradient"


def _lattice(
    name: str,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    impl: Impl,
    arguments: tuple[Any, ...],
) -> Any:
    # The dispatcher would take True for 1.
    if type(frac_bits) is not int or check.requires_grad(m1, m2, coef):
        check.CHECKS[name](*arguments)
        check.check_no_grad(_LATTICE_GRAD, m1=m1, m2=m2)
    return _call(name, impl, arguments)


def lattice_update(
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Return Z' = Z + Q, Q = rint(((b*y + c1*m1) + c2*m2) * 2^K), half to even.

    Here y = float32(Z_y * 2^-K), the increment is computed in float64 in this order, and the
    addition is exact. Every backend gives the same bits. The entry a of coef is not used: it is
    1 here (``lattice_scaled_update`` is for other a).

    Args:
        z: the track that changes, int32 [B, ...].
        y: the other track on the same lattice, int32 [B, ...].
        coef: (a, b, c1, c2), float32 [4] or [B, 4].
        m1: model output, [B, ...], float32, float16 or bfloat16.
        m2: second model output, like m1.
        frac_bits: K, in 1..30.
        status: int32 [1]; gets STATUS_RANGE if a result leaves int32 (it is stored saturated) and
            STATUS_NONFINITE if an increment is NaN or infinite (it counts as 0).
        impl: the backend.

    Returns:
        int32 [B, ...].

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, frac_bits out of range,
            model outputs that require grad, or a backend that is not there.
    """
    arguments = z, y, m1, m2, coef, frac_bits, status
    result: Tensor = _lattice("lattice_update", m1, m2, coef, frac_bits, impl, arguments)
    return result


def lattice_inverse(
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Return Z' = Z - Q, which undoes ``lattice_update`` exactly. Arguments are the same."""
    arguments = z, y, m1, m2, coef, frac_bits, status
    result: Tensor = _lattice("lattice_inverse", m1, m2, coef, frac_bits, impl, arguments)
    return result


def lattice_update_(
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Do ``lattice_update`` into z and return z."""
    arguments = z, y, m1, m2, coef, frac_bits, status
    _lattice("lattice_update_", m1, m2, coef, frac_bits, impl, arguments)
    return z


def lattice_inverse_(
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Do ``lattice_inverse`` into z and return z."""
    arguments = z, y, m1, m2, coef, frac_bits, status
    _lattice("lattice_inverse_", m1, m2, coef, frac_bits, impl, arguments)
    return z


def lattice_scaled_update(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    coef: Tensor,
    ratio: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return Z', B': first (Z, B) scaled by n/d without loss, then Z + Q.

    The scale is the bijection on pairs (Z, B) of ``inpo_fast.lattice``, within 1 + n/d units of
    Z*n/d, and Q is that of ``lattice_update``.

    Args:
        z, y, coef, m1, m2, frac_bits, status, impl: as in ``lattice_update``.
        buffer: the information buffer B of z, int64 [B, ...], never negative. That it stays
            below 2^46 is the caller's to know beforehand: ``inpo_fast.lattice.buffer_bound``.
        ratio: rows of ``inpo_fast.lattice.ratio_row``, int64 [4] or [B, 4].

    Returns:
        Z', int32 [B, ...], and B', int64 [B, ...].

    Raises:
        TypeError, ValueError: as in ``lattice_update``.
    """
    arguments = z, buffer, y, m1, m2, coef, ratio, frac_bits, status
    result: tuple[Tensor, Tensor] = _lattice(
        "lattice_scaled_update", m1, m2, coef, frac_bits, impl, arguments
    )
    return result


def lattice_scaled_inverse(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    coef: Tensor,
    ratio: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return Z', B' = (Z - Q, B) scaled by d/n: undoes ``lattice_scaled_update`` exactly."""
    arguments = z, buffer, y, m1, m2, coef, ratio, frac_bits, status
    result: tuple[Tensor, Tensor] = _lattice(
        "lattice_scaled_inverse", m1, m2, coef, frac_bits, impl, arguments
    )
    return result


def lattice_scaled_update_(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    coef: Tensor,
    ratio: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Do ``lattice_scaled_update`` into z and buffer and return both."""
    arguments = z, buffer, y, m1, m2, coef, ratio, frac_bits, status
    _lattice("lattice_scaled_update_", m1, m2, coef, frac_bits, impl, arguments)
    return z, buffer


def lattice_scaled_inverse_(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    coef: Tensor,
    ratio: Tensor,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Do ``lattice_scaled_inverse`` into z and buffer and return both."""
    arguments = z, buffer, y, m1, m2, coef, ratio, frac_bits, status
    _lattice("lattice_scaled_inverse_", m1, m2, coef, frac_bits, impl, arguments)
    return z, buffer


def lattice_encode(
    x: Tensor,
    scale: Tensor,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    status: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Return Z = rint(x * scale * 2^K), half to even: put a float state on the lattice.

    Args:
        x: [B, ...], float64, float32, float16 or bfloat16.
        scale: [], [1] or one per sample [B], float32 or float64.
        frac_bits: K, in 1..30.
        status: int32 [1]; gets STATUS_RANGE if a value leaves int32 (it is stored saturated) and
            STATUS_NONFINITE if one is NaN or infinite (it is stored as 0).
        impl: the backend.

    Returns:
        int32 [B, ...].

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, frac_bits out of range, x
            that requires grad, or a backend that is not there.
    """
    name, arguments = "lattice_encode", (x, scale, frac_bits, status)
    if type(frac_bits) is not int or check.requires_grad(x, scale):
        check.CHECKS[name](*arguments)
        check.check_no_grad(_LATTICE_GRAD, x=x, scale=scale)
    result: Tensor = _call(name, impl, arguments)
    return result


def lattice_decode(
    z: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    frac_bits: int = DEFAULT_FRAC_BITS,
    copies: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """Return x = float32(float32(Z * 2^-K) * scale), rounded once more to ``dtype``.

    Args:
        z: int32 [B, ...].
        scale: [], [1] or one per sample [B], float32 or float64; the product is in float64.
        dtype: of the result: float64, float32, float16 or bfloat16.
        frac_bits: K, in 1..30.
        copies: 1, or 2 to repeat the batch, the model input of guided sampling.
        impl: the backend.

    Returns:
        [copies*B, ...] of ``dtype``.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, frac_bits or copies out of
            range, scale that requires grad, or a backend that is not there.
    """
    name, arguments = "lattice_decode", (z, scale, frac_bits, copies, dtype)
    # The dispatcher would take True for 1, and the number of a dtype for it.
    usual = type(frac_bits) is type(copies) is int and type(dtype) is torch.dtype
    if not usual or check.requires_grad(scale):
        check.CHECKS[name](*arguments)
        check.check_no_grad(_LATTICE_GRAD, scale=scale)
    result: Tensor = _call(name, impl, arguments)
    return result


# --- Preference objectives --------------------------------------------------------------------


def preference_errors(
    theta: Tensor,
    ref: Tensor | None,
    target: Tensor,
    *,
    differentiate_d: bool = True,
    impl: Impl = "auto",
) -> PreferenceErrors:
    """Return e_theta = mean|theta-target|^2, e_ref = mean|ref-target|^2, d = mean|theta-ref|^2.

    Means are per sample, over all dimensions but the first. Residuals are float32 (float64 for
    float64 inputs) and sums float64, in an order that does not depend on the number of threads.
    Differentiable in theta.

    Args:
        theta: output of the model that is trained, [B, ...], float64, float32, float16 or
            bfloat16.
        ref: output of the reference model, like theta, or None: then e_ref and d are 0.
        target: [B, ...], like theta, or float32 beside a 16-bit theta.
        differentiate_d: False where no gradient flows through d: the backward then need not read
            ref, a fifth of its memory traffic.
        impl: the backend.

    Returns:
        e_theta, e_ref and d, [B] each, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, ref or target that requires
            grad, or a backend that is not there.
    """
    results = _preference(theta, ref, target, differentiate_d, None, impl)
    return PreferenceErrors(*results)


def preference_margin(
    theta: Tensor,
    ref: Tensor,
    target: Tensor,
    *,
    scale: float,
    differentiate_d: bool = True,
    impl: Impl = "auto",
) -> tuple[PreferenceErrors, Tensor]:
    """Return the errors and scale*((e_theta - e_ref)_w - (e_theta - e_ref)_l), one for each pair.

    Args:
        theta: as in ``preference_errors``, [2P, ...], the P winners first, then their losers.
        ref, target, differentiate_d, impl: as in ``preference_errors``.
        scale: a constant, such as -beta/2.

    Returns:
        The errors, [2P] each, and the margin, [P], in their dtype. Differentiable in theta.

    Raises:
        TypeError, ValueError: as in ``preference_errors``, or an odd batch.
    """
    if isinstance(theta, Tensor) and theta.dim() > 0 and theta.shape[0] % 2:
        raise ValueError(f"theta must have an even batch, got {list(theta.shape)}")
    if ref is None:
        raise TypeError("ref must be a torch.Tensor, got NoneType")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: it is a constant, without gradient")
    *errors, margin = _preference(theta, ref, target, differentiate_d, scale, impl)
    return PreferenceErrors(*errors), margin


def _preference(
    theta: Tensor,
    ref: Tensor | None,
    target: Tensor,
    differentiate_d: bool,
    scale: float | None,
    impl: Impl,
) -> tuple[Tensor, ...]:
    """Return the errors, [B] each, and where there is a scale the margin, [B/2]."""
    name, arguments = "preference_errors", (theta, ref, target)
    if not check.requires_grad(*arguments):
        errors: tuple[Tensor, ...] = _call(name, impl, arguments)
        return errors if scale is None else (*errors, pair_margin(errors[0], errors[1], scale))
    if check.requires_grad(ref, target):
        check.CHECKS[name](*arguments)
        check.check_no_grad("preference errors differentiate theta only", ref=ref, target=target)
    results: tuple[Tensor, ...] = _call(
        name,
        impl,
        arguments,
        lambda kernels: PreferenceErrorsFunction.apply(  # type: ignore[no-untyped-call]
            *arguments, kernels[name], kernels["preference_backward"], differentiate_d, scale
        ),
    )
    return results


def preference_backward(
    theta: Tensor,
    ref: Tensor | None,
    target: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return a_i * (theta - target) + b_i * (theta - ref), the backward of a preference loss.

    Args:
        theta, ref, target: as in ``preference_errors``; without ref its term is 0.
        a, b: weights per sample, [B], float32 (float64 for float64 inputs).
        impl: the backend.

    Returns:
        [B, ...], dtype of theta, rounded once from float64 by way of float32.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout, an argument that requires
            grad, or a backend that is not there.
    """
    name, arguments = "preference_backward", (theta, ref, target, a, b)
    if check.requires_grad(theta, ref, target, a, b):
        check.CHECKS[name](*arguments)
        check.check_no_grad(
            "preference_backward has no gradient", theta=theta, ref=ref, target=target, a=a, b=b
        )
    result: Tensor = _call(name, impl, arguments)
    return result
