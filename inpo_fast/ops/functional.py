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

from inpo_fast.lattice import DEFAULT_FRAC_BITS
from inpo_fast.ops import validation as check
from inpo_fast.ops.autograd import AffineFunction, PreferenceErrorsFunction
from inpo_fast.ops.choice import Impl, resolve
from inpo_fast.ops.registration import KERNELS
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
]


class PreferenceErrors(NamedTuple):
    """Per-sample means of squared differences, [B] each (``preference_errors``)."""

    e_theta: Tensor
    e_ref: Tensor
    d: Tensor


def _kernel(name: str, impl: str, device: torch.device) -> Callable[..., Any]:
    return KERNELS[resolve(impl, device)][name]


# --- Float states -----------------------------------------------------------------------------


def _check_affine(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    status: Tensor | None,
) -> None:
    wide = isinstance(x, Tensor) and x.dtype == torch.float64
    outputs = check.UP_TO_FLOAT64 if wide else check.UP_TO_FLOAT32
    rows = check.FLOAT64 if wide else check.FLOAT32
    if check.is_update(
        x, y, coef, m1, m2, status, states=check.UP_TO_FLOAT64, outputs=outputs, rows=rows
    ):
        return
    check.check_tensor("x", x, check.UP_TO_FLOAT64)
    check.check_like("y", y, "x", x, (x.dtype,))
    check.check_outputs(m1, m2, "x", x, outputs)
    check.check_rows("coef", coef, "x", x, rows)
    if status is not None:
        check.check_status_word(status, "x", x)


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
    _check_affine(x, y, coef, m1, m2, status)
    kernel = _kernel(name, impl, x.device)
    if not (torch.is_grad_enabled() and check.any_requires_grad((x, y, m1, m2))):
        result: Tensor = kernel(x, y, m1, m2, coef, status)
        return result
    result = AffineFunction.apply(x, y, m1, m2, coef, kernel, name == "affine_inverse")  # type: ignore[no-untyped-call]
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
    _check_affine(x, y, coef, m1, m2, status)
    if torch.is_grad_enabled() and check.any_requires_grad((x, y, m1, m2)):
        check.check_no_grad(f"{name} has no gradient, {name[:-1]} has", x=x, y=y, m1=m1, m2=m2)
    _kernel(name, impl, x.device)(x, y, m1, m2, coef, status)
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


def _check_lattice(
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    frac_bits: int,
    status: Tensor,
) -> None:
    states, outputs, rows = check.INT32, check.UP_TO_FLOAT32, check.FLOAT32
    if status is None or not check.is_update(
        z, y, coef, m1, m2, status, states=states, outputs=outputs, rows=rows
    ):
        check.check_tensor("z", z, states)
        check.check_like("y", y, "z", z, states)
        check.check_outputs(m1, m2, "z", z, outputs)
        check.check_rows("coef", coef, "z", z, rows)
        check.check_status_word(status, "z", z)
    check.check_frac_bits(frac_bits)
    if torch.is_grad_enabled() and check.any_requires_grad((m1, m2)):
        check.check_no_grad(_LATTICE_GRAD, m1=m1, m2=m2)


def _lattice(
    name: str,
    z: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    frac_bits: int,
    status: Tensor,
    impl: Impl,
) -> Any:
    _check_lattice(z, y, coef, m1, m2, frac_bits, status)
    return _kernel(name, impl, z.device)(z, y, m1, m2, coef, frac_bits, status)


def _lattice_scaled(
    name: str,
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    coef: Tensor,
    ratio: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    frac_bits: int,
    status: Tensor,
    impl: Impl,
) -> Any:
    _check_lattice(z, y, coef, m1, m2, frac_bits, status)
    check.check_like("buffer", buffer, "z", z, check.INT64)
    check.check_rows("ratio", ratio, "z", z, check.INT64)
    kernel = _kernel(name, impl, z.device)
    return kernel(z, buffer, y, m1, m2, coef, ratio, frac_bits, status)


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
    result: Tensor = _lattice("lattice_update", z, y, coef, m1, m2, frac_bits, status, impl)
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
    result: Tensor = _lattice("lattice_inverse", z, y, coef, m1, m2, frac_bits, status, impl)
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
    _lattice("lattice_update_", z, y, coef, m1, m2, frac_bits, status, impl)
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
    _lattice("lattice_inverse_", z, y, coef, m1, m2, frac_bits, status, impl)
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
    name = "lattice_scaled_update"
    result: tuple[Tensor, Tensor] = _lattice_scaled(
        name, z, buffer, y, coef, ratio, m1, m2, frac_bits, status, impl
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
    name = "lattice_scaled_inverse"
    result: tuple[Tensor, Tensor] = _lattice_scaled(
        name, z, buffer, y, coef, ratio, m1, m2, frac_bits, status, impl
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
    name = "lattice_scaled_update_"
    _lattice_scaled(name, z, buffer, y, coef, ratio, m1, m2, frac_bits, status, impl)
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
    name = "lattice_scaled_inverse_"
    _lattice_scaled(name, z, buffer, y, coef, ratio, m1, m2, frac_bits, status, impl)
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
    check.check_tensor("x", x, check.UP_TO_FLOAT64)
    check.check_scale(scale, "x", x)
    check.check_frac_bits(frac_bits)
    check.check_status_word(status, "x", x)
    check.check_no_grad(_LATTICE_GRAD, x=x, scale=scale)
    result: Tensor = _kernel("lattice_encode", impl, x.device)(x, scale, frac_bits, status)
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
    check.check_tensor("z", z, check.INT32)
    check.check_scale(scale, "z", z)
    check.check_frac_bits(frac_bits)
    if dtype not in check.UP_TO_FLOAT64:
        raise TypeError(f"dtype must be one of {check.UP_TO_FLOAT64}, got {dtype!r}")
    if isinstance(copies, bool) or copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {copies!r}")
    if copies == 2 and z.dim() == 0:
        raise ValueError("z must have a batch dimension when copies is 2, got shape []")
    check.check_no_grad(_LATTICE_GRAD, scale=scale)
    kernel = _kernel("lattice_decode", impl, z.device)
    result: Tensor = kernel(z, scale, frac_bits, copies, dtype)
    return result


# --- Preference objectives --------------------------------------------------------------------


def _check_preference(theta: Tensor, ref: Tensor | None, target: Tensor) -> None:
    check.check_tensor("theta", theta, check.UP_TO_FLOAT64)
    if theta.dim() == 0:
        raise ValueError("theta must have a batch dimension, got shape []")
    if ref is not None:
        check.check_like("ref", ref, "theta", theta, (theta.dtype,))
    wide = theta.dtype == torch.float64
    dtypes = check.FLOAT64 if wide else (theta.dtype, torch.float32)
    check.check_like("target", target, "theta", theta, dtypes)


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
    _check_preference(theta, ref, target)
    check.check_no_grad("preference errors differentiate theta only", ref=ref, target=target)
    kernel = _kernel("preference_errors", impl, theta.device)
    if not (torch.is_grad_enabled() and theta.requires_grad):
        return PreferenceErrors(*kernel(theta, ref, target))
    backward_kernel = _kernel("preference_backward", impl, theta.device)
    errors = PreferenceErrorsFunction.apply(  # type: ignore[no-untyped-call]
        theta, ref, target, kernel, backward_kernel, differentiate_d
    )
    return PreferenceErrors(*errors)


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
    _check_preference(theta, ref, target)
    dtypes = check.FLOAT64 if theta.dtype == torch.float64 else check.FLOAT32
    check.check_weights("a", a, "theta", theta, dtypes)
    check.check_weights("b", b, "theta", theta, dtypes)
    check.check_no_grad(
        "preference_backward has no gradient", theta=theta, ref=ref, target=target, a=a, b=b
    )
    kernel = _kernel("preference_backward", impl, theta.device)
    result: Tensor = kernel(theta, ref, target, a, b)
    return result
