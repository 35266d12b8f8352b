# SPDX-License-Identifier: Apache-2.0
"""Checks of operator arguments: what must hold, then what came. No check reads tensor data.

``CHECKS`` has for each operator a function of its arguments, in the operator's order. What the
native kernels refuse is the same (``csrc``), in fewer words and in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inpo_fast.lattice import MAX_FRAC_BITS

FLOAT64 = (torch.float64,)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
UP_TO_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)
UP_TO_FLOAT64 = (torch.float64, *UP_TO_FLOAT32)
FLOAT32_OR_FLOAT64 = (torch.float32, torch.float64)

Dtypes = tuple[torch.dtype, ...]

ROW, WORD = (4,), (1,)


def is_update(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    status: Tensor | None,
    *,
    states: Dtypes,
    outputs: Dtypes,
    rows: Dtypes,
) -> bool:
    """Say whether the arguments of an update are right: all checks in one pass, for speed.

    Where it says no, ``check_tensor``, ``check_like``, ``check_outputs``, ``check_rows`` and
    ``check_status_word`` decide and say what is wrong.
    """
    if not (isinstance(x, Tensor) and x.dtype in states and x.layout is torch.strided):
        return False
    shape, device = x.shape, x.device
    for t in (y,) if m1 is None else (y, m1) if m2 is None else (y, m1, m2):
        if not (
            isinstance(t, Tensor)
            and t.layout is torch.strided
            and t.shape == shape
            and t.device == device
        ):
            return False
    if y.dtype is not x.dtype:
        return False
    if m1 is None:
        if m2 is not None:
            return False
    elif m1.dtype not in outputs or (m2 is not None and m2.dtype is not m1.dtype):
        return False
    if not (
        isinstance(coef, Tensor)
        and coef.dtype in rows
        and coef.layout is torch.strided
        and coef.device == device
        and (coef.shape == ROW or coef.shape == (*shape[:1], 4))
        and not coef.requires_grad
    ):
        return False
    return status is None or (
        isinstance(status, Tensor)
        and status.dtype is torch.int32
        and status.layout is torch.strided
        and status.shape == WORD
        and status.device == device
    )


def check_tensor(name: str, tensor: Tensor, dtypes: Dtypes) -> None:
    """Check that the argument is a strided tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor, dtypes: Dtypes) -> None:
    """Check a tensor [B, ...] that stands beside ``like``, [B, ...]: same shape and device."""
    check_tensor(name, tensor, dtypes)
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {list(like.shape)}, got"
            f" {list(tensor.shape)}"
        )
    _check_device(name, tensor, like_name, like)


def check_outputs(
    m1: Tensor | None, m2: Tensor | None, like_name: str, like: Tensor, dtypes: Dtypes
) -> None:
    """Check the model outputs, none, one or two, [B, ...] each, of one dtype."""
    if m1 is None:
        if m2 is not None:
            raise ValueError("m1 must be given when m2 is given, got m1=None")
        return
    check_like("m1", m1, like_name, like, dtypes)
    if m2 is not None:
        check_like("m2", m2, like_name, like, dtypes)
        if m2.dtype != m1.dtype:
            raise TypeError(f"m2 must have the dtype of m1, {m1.dtype}, got {m2.dtype}")


def check_rows(name: str, rows: Tensor, like_name: str, like: Tensor, dtypes: Dtypes) -> None:
    """Check coefficients [4], or one row per sample [B, 4]."""
    check_tensor(name, rows, dtypes)
    shape = rows.shape
    if len(shape) == 1:
        valid = shape[0] == 4
    else:
        valid = len(shape) == 2 and shape[1] == 4 and like.dim() > 0 and shape[0] == like.shape[0]
    if not valid:
        batch = f" or [{like.shape[0]}, 4]" if like.dim() > 0 else ""
        raise ValueError(
            f"{name} must have shape [4]{batch} ({like_name} is {list(like.shape)}), got"
            f" {list(shape)}"
        )
    _check_device(name, rows, like_name, like)
    if rows.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: it is a constant of the solver")


def check_scale(scale: Tensor, like_name: str, like: Tensor) -> None:
    """Check a scale [], [1], or one per sample [B]."""
    check_tensor("scale", scale, FLOAT32_OR_FLOAT64)
    per_sample = scale.dim() == 1 and like.dim() > 0 and scale.shape[0] == like.shape[0]
    if not (per_sample or (scale.dim() <= 1 and scale.numel() == 1)):
        batch = f", [1] or [{like.shape[0]}]" if like.dim() > 0 else " or [1]"
        raise ValueError(
            f"scale must have shape []{batch} ({like_name} is {list(like.shape)}), got"
            f" {list(scale.shape)}"
        )
    _check_device("scale", scale, like_name, like)


def check_weights(name: str, weight: Tensor, like_name: str, like: Tensor, dtypes: Dtypes) -> None:
    """Check weights per sample, [B]."""
    check_tensor(name, weight, dtypes)
    if weight.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must have shape [{like.shape[0]}] ({like_name} is {list(like.shape)}), got"
            f" {list(weight.shape)}"
        )
    _check_device(name, weight, like_name, like)


def check_status_word(status: Tensor, like_name: str, like: Tensor) -> None:
    """Check a status word, int32 [1]."""
    check_tensor("status", status, INT32)
    if status.shape != (1,):
        raise ValueError(f"status must have shape [1], got {list(status.shape)}")
    _check_device("status", status, like_name, like)


def check_frac_bits(frac_bits: int) -> None:
    """Check the number of fraction bits of a lattice."""
    if isinstance(frac_bits, bool) or not isinstance(frac_bits, int):
        raise TypeError(f"frac_bits must be an int, got {type(frac_bits).__name__}")
    if not 1 <= frac_bits <= MAX_FRAC_BITS:
        raise ValueError(f"frac_bits must be in 1..{MAX_FRAC_BITS}, got {frac_bits}")


def check_written(name: str, tensor: Tensor) -> None:
    """Refuse to write where elements share memory, as those of an expanded tensor do."""
    if not tensor.is_contiguous() and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} must not be expanded: its elements share memory and each is written; clone it"
        )


def check_no_grad(reason: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that require grad where no gradient is defined, rather than drop it."""
    if requires_grad(*tensors.values()):
        names = [name for name, t in tensors.items() if t is not None and t.requires_grad]
        raise ValueError(
            f"{', '.join(names)} must not require grad: {reason}; detach, or run under"
            " torch.no_grad()"
        )


def requires_grad(*tensors: Tensor | None) -> bool:
    """Say whether gradients are asked for. The arguments need not be checked before.

    Raises:
        NotImplementedError: derivatives in forward mode are, which no operator has.
    """
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    "inpo_fast's operators have derivatives in reverse mode only: use "
                    "torch.autograd, torch.func.grad or torch.func.vjp"
                )
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def _check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}"
        )


def _names(dtypes: Dtypes) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


# --- Operators --------------------------------------------------------------------------------


def _check_affine(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> None:
    wide = isinstance(x, Tensor) and x.dtype == torch.float64
    outputs = UP_TO_FLOAT64 if wide else UP_TO_FLOAT32
    rows = FLOAT64 if wide else FLOAT32
    if is_update(x, y, coef, m1, m2, status, states=UP_TO_FLOAT64, outputs=outputs, rows=rows):
        return
    check_tensor("x", x, UP_TO_FLOAT64)
    check_like("y", y, "x", x, (x.dtype,))
    check_outputs(m1, m2, "x", x, outputs)
    check_rows("coef", coef, "x", x, rows)
    if status is not None:
        check_status_word(status, "x", x)


def _check_lattice(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    states, outputs, rows = INT32, UP_TO_FLOAT32, FLOAT32
    if status is None or not is_update(
        z, y, coef, m1, m2, status, states=states, outputs=outputs, rows=rows
    ):
        check_tensor("z", z, states)
        check_like("y", y, "z", z, states)
        check_outputs(m1, m2, "z", z, outputs)
        check_rows("coef", coef, "z", z, rows)
        check_status_word(status, "z", z)
    check_frac_bits(frac_bits)


def _check_lattice_scaled(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    ratio: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    _check_lattice(z, y, m1, m2, coef, frac_bits, status)
    check_like("buffer", buffer, "z", z, INT64)
    check_rows("ratio", ratio, "z", z, INT64)


def _check_encode(x: Tensor, scale: Tensor, frac_bits: int, status: Tensor) -> None:
    check_tensor("x", x, UP_TO_FLOAT64)
    check_scale(scale, "x", x)
    check_frac_bits(frac_bits)
    check_status_word(status, "x", x)


def _check_decode(
    z: Tensor, scale: Tensor, frac_bits: int, copies: int, dtype: torch.dtype
) -> None:
    check_tensor("z", z, INT32)
    check_scale(scale, "z", z)
    check_frac_bits(frac_bits)
    if dtype not in UP_TO_FLOAT64:
        raise TypeError(f"dtype must be one of {UP_TO_FLOAT64}, got {dtype!r}")
    if isinstance(copies, bool) or copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {copies!r}")
    if copies == 2 and z.dim() == 0:
        raise ValueError("z must have a batch dimension when copies is 2, got shape []")


def _check_errors(theta: Tensor, ref: Tensor | None, target: Tensor) -> None:
    check_tensor("theta", theta, UP_TO_FLOAT64)
    if theta.dim() == 0:
        raise ValueError("theta must have a batch dimension, got shape []")
    if ref is not None:
        check_like("ref", ref, "theta", theta, (theta.dtype,))
    dtypes = FLOAT64 if theta.dtype == torch.float64 else (theta.dtype, torch.float32)
    check_like("target", target, "theta", theta, dtypes)


def _check_backward(
    theta: Tensor, ref: Tensor | None, target: Tensor, a: Tensor, b: Tensor
) -> None:
    _check_errors(theta, ref, target)
    dtypes = FLOAT64 if theta.dtype == torch.float64 else FLOAT32
    check_weights("a", a, "theta", theta, dtypes)
    check_weights("b", b, "theta", theta, dtypes)


def _written(check: Callable[..., None], *names: str) -> Callable[..., None]:
    """The check of an operator that writes into its first arguments."""

    def checked(*arguments: Any) -> None:
        check(*arguments)
        for name, tensor in zip(names, arguments, strict=False):
            check_written(name, tensor)

    return checked


_VARIANTS = ("update", "inverse")

CHECKS: dict[str, Callable[..., None]] = {
    **{f"affine_{variant}": _check_affine for variant in _VARIANTS},
    **{f"affine_{variant}_": _written(_check_affine, "x") for variant in _VARIANTS},
    **{f"lattice_{variant}": _check_lattice for variant in _VARIANTS},
    **{f"lattice_{variant}_": _written(_check_lattice, "z") for variant in _VARIANTS},
    **{f"lattice_scaled_{variant}": _check_lattice_scaled for variant in _VARIANTS},
    **{
        f"lattice_scaled_{variant}_": _written(_check_lattice_scaled, "z", "buffer")
        for variant in _VARIANTS
    },
    "lattice_encode": _check_encode,
    "lattice_decode": _check_decode,
    "preference_errors": _check_errors,
    "preference_backward": _check_backward,
}
