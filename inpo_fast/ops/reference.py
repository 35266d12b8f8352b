# SPDX-License-Identifier: Apache-2.0
"""The operators in plain torch. This file is their specification.

Every other implementation has the same name, the same argument order and the same bits.

All arithmetic is in float64, whatever the dtypes, in the order in which it is written here. States
and model outputs up to float32 and float32 coefficients have exact products in float64, so a
compiler that fuses a multiplication with the addition after it does not change a bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inpo_fast.ops.status import STATUS_NONFINITE, STATUS_RANGE

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

# Bounds that keep int64 (and float64) exact. An increment beyond 2^50 always ends outside int32.
# What an inverse is to scale by p/q is out of range beyond 2^34, or beyond 2^34 floor(q/p) if that
# is more: an update that multiplied by q/p had up to 2^31 q/p there. Times p that is within 2^50.
INCREMENT_BOUND = 2**50
SCALED_BOUND = 2**34


def _columns(table: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Split rows [K] or [B, K] into K columns, [] or [B, 1, ..., 1] with ``dim`` dimensions."""
    columns = table.unbind(-1)
    if table.dim() == 1:
        return columns
    return tuple(column.reshape(-1, *[1] * (dim - 1)) for column in columns)


def _increment(
    y: Tensor,  # [B, ...]
    m1: Tensor | None,  # [B, ...]
    m2: Tensor | None,  # [B, ...]
    coef: Tensor,  # [4] or [B, 4]
) -> tuple[Tensor, Tensor]:
    """Return a, [] or [B, 1, ...], and (b*y + c1*m1) + c2*m2, [B, ...], in float64."""
    a, b, c1, c2 = _columns(coef.to(torch.float64), y.dim())
    total = b * y.to(torch.float64)  # [B, ...]
    if m1 is not None:
        total = total + c1 * m1.to(torch.float64)
    if m2 is not None:
        total = total + c2 * m2.to(torch.float64)
    return a, total


def _flag(status: Tensor | None, bit: int, condition: Tensor) -> None:
    """OR ``bit`` into status, int32 [1], where the condition, [B, ...], holds anywhere."""
    if status is not None:
        status.bitwise_or_(condition.any().to(torch.int32) * bit)


def _store_state(out: Tensor, value: Tensor, status: Tensor | None) -> Tensor:
    """Round the float64 value, [B, ...], to the dtype of out, by way of float32."""
    out.copy_(value if out.dtype == torch.float64 else value.to(torch.float32))
    _flag(status, STATUS_NONFINITE, ~torch.isfinite(out))
    return out


# --- Float states -----------------------------------------------------------------------------


def _affine(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    *,
    inverse: bool,
) -> Tensor:
    a, increment = _increment(y, m1, m2, coef)
    x64 = x.to(torch.float64)  # [B, ...]
    return (x64 - increment) / a if inverse else a * x64 + increment


def affine_update(
    x: Tensor,  # [B, ...] float64, float32, float16 or bfloat16
    y: Tensor,  # [B, ...] like x
    m1: Tensor | None,  # [B, ...] float32, float16 or bfloat16 (float64 beside a float64 state)
    m2: Tensor | None,  # [B, ...] like m1
    coef: Tensor,  # [4] or [B, 4] float32 (float64 beside a float64 state): (a, b, c1, c2)
    status: Tensor | None,  # [1] int32
) -> Tensor:
    """x' = a*x + ((b*y + c1*m1) + c2*m2)."""
    value = _affine(x, y, m1, m2, coef, inverse=False)
    return _store_state(torch.empty_like(x), value, status)


def affine_inverse(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> Tensor:
    """x' = (x - ((b*y + c1*m1) + c2*m2)) / a."""
    value = _affine(x, y, m1, m2, coef, inverse=True)
    return _store_state(torch.empty_like(x), value, status)


def affine_update_(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> None:
    """``affine_update`` into x."""
    _store_state(x, _affine(x, y, m1, m2, coef, inverse=False), status)


def affine_inverse_(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> None:
    """``affine_inverse`` into x."""
    _store_state(x, _affine(x, y, m1, m2, coef, inverse=True), status)


# --- Lattice states ---------------------------------------------------------------------------


def _lattice_value(z: Tensor, frac_bits: int) -> Tensor:
    """Return float32(Z * 2^-K), [B, ...]: rounded to float32 once, the power of two is exact."""
    return z.to(torch.float32) * 2.0**-frac_bits


def _quantize(value: Tensor, frac_bits: int, status: Tensor) -> Tensor:
    """Return rint(value * 2^K), half to even, as int64 [B, ...], within +-INCREMENT_BOUND.

    Where the value is not finite the result is 0 and the status says so.
    """
    finite = torch.isfinite(value)  # [B, ...]
    _flag(status, STATUS_NONFINITE, ~finite)
    rounded = torch.round(torch.where(finite, value, 0.0) * 2.0**frac_bits)
    return rounded.clamp(-INCREMENT_BOUND, INCREMENT_BOUND).to(torch.int64)


def _store_lattice(out: Tensor, value: Tensor, status: Tensor) -> Tensor:
    """Store the int64 value, [B, ...], in int32, saturated where it does not fit."""
    saturated = value.clamp(INT32_MIN, INT32_MAX)
    _flag(status, STATUS_RANGE, saturated != value)
    return out.copy_(saturated)


def _lattice_increment(
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> Tensor:
    """Return Q = rint(((b*y + c1*m1) + c2*m2) * 2^K), int64 [B, ...]."""
    _, increment = _increment(_lattice_value(y, frac_bits), m1, m2, coef)
    return _quantize(increment, frac_bits, status)


def _divmod(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.div(x, v, rounding_mode="floor"), torch.remainder(x, v)


def _contract(z: Tensor, buffer: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (Z, B), int64 [B, ...], by p/q <= 1, [] or [B, 1, ...]; see ``inpo_fast.lattice``."""
    high, digit = _divmod(buffer, p)
    quotient, rest = _divmod(z * p, q)
    gap = torch.where(rest == 0, 0, q - rest)
    digit = torch.remainder(digit + torch.where(gap < p, gap, 0), p)
    rest = rest + digit
    carry = (rest >= q).to(torch.int64)
    return quotient + carry, high * q + rest - carry * q


def _expand(z: Tensor, buffer: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (Z, B) by q/p >= 1: the inverse of ``_contract``."""
    high, digit = _divmod(buffer, q)
    quotient, rest = _divmod(z * q + digit, p)
    gap = torch.remainder(rest - digit, q)
    digit = torch.remainder(rest - torch.where(gap < p, gap, 0), p)
    return quotient, high * p + digit


def _scale(z: Tensor, buffer: Tensor, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (Z, B), int64 [B, ...], by n/d, [] or [B, 1, ...], losing nothing."""
    small, large = torch.minimum(n, d), torch.maximum(n, d)
    contracted = _contract(z, buffer, small, large)
    expanded = _expand(z, buffer, small, large)
    scaled, kept = (torch.where(n <= d, c, e) for c, e in zip(contracted, expanded, strict=True))
    return scaled, kept


def _lattice_scaled(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    ratio: Tensor,
    frac_bits: int,
    status: Tensor,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    n, d, _, _ = _columns(ratio, z.dim())
    q = _lattice_increment(y, m1, m2, coef, frac_bits, status)  # [B, ...]
    if inverse:
        whole = z.to(torch.int64) - q
        bound = SCALED_BOUND * torch.div(n, d, rounding_mode="floor").clamp(min=1)
        inside = whole.clamp(-bound, bound)
        _flag(status, STATUS_RANGE, inside != whole)
        return _scale(inside, buffer, d, n)
    scaled, buffer = _scale(z.to(torch.int64), buffer, n, d)
    return scaled + q, buffer


def lattice_update(
    z: Tensor,  # [B, ...] int32
    y: Tensor,  # [B, ...] int32
    m1: Tensor | None,  # [B, ...] float32, float16 or bfloat16
    m2: Tensor | None,  # [B, ...] like m1
    coef: Tensor,  # [4] or [B, 4] float32: (unused, b, c1, c2)
    frac_bits: int,
    status: Tensor,  # [1] int32
) -> Tensor:
    """Z' = Z + Q with Q = rint(((b*y + c1*m1) + c2*m2) * 2^K) and y = float32(Z_y * 2^-K)."""
    q = _lattice_increment(y, m1, m2, coef, frac_bits, status)
    return _store_lattice(torch.empty_like(z), z + q, status)


def lattice_inverse(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> Tensor:
    """Z' = Z - Q."""
    q = _lattice_increment(y, m1, m2, coef, frac_bits, status)
    return _store_lattice(torch.empty_like(z), z - q, status)


def lattice_update_(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    """``lattice_update`` into z."""
    _store_lattice(z, z + _lattice_increment(y, m1, m2, coef, frac_bits, status), status)


def lattice_inverse_(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    """``lattice_inverse`` into z."""
    _store_lattice(z, z - _lattice_increment(y, m1, m2, coef, frac_bits, status), status)


def lattice_scaled_update(
    z: Tensor,  # [B, ...] int32
    buffer: Tensor,  # [B, ...] int64, >= 0
    y: Tensor,  # [B, ...] int32
    m1: Tensor | None,  # [B, ...] float32, float16 or bfloat16
    m2: Tensor | None,  # [B, ...] like m1
    coef: Tensor,  # [4] or [B, 4] float32: (unused, b, c1, c2)
    ratio: Tensor,  # [4] or [B, 4] int64: (n, d, mul_n, mul_d)
    frac_bits: int,
    status: Tensor,  # [1] int32
) -> tuple[Tensor, Tensor]:
    """(Z', B') = scale((Z, B); n/d) + (Q, 0)."""
    new_z, new_buffer = _lattice_scaled(
        z, buffer, y, m1, m2, coef, ratio, frac_bits, status, inverse=False
    )
    out = _store_lattice(torch.empty_like(z), new_z, status)
    return out, torch.empty_like(buffer).copy_(new_buffer)


def lattice_scaled_inverse(
    z: Tensor,
    buffer: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    ratio: Tensor,
    frac_bits: int,
    status: Tensor,
) -> tuple[Tensor, Tensor]:
    """(Z', B') = scale((Z - Q, B); d/n)."""
    new_z, new_buffer = _lattice_scaled(
        z, buffer, y, m1, m2, coef, ratio, frac_bits, status, inverse=True
    )
    out = _store_lattice(torch.empty_like(z), new_z, status)
    return out, torch.empty_like(buffer).copy_(new_buffer)


def lattice_scaled_update_(
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
    """``lattice_scaled_update`` into z and buffer."""
    new_z, new_buffer = _lattice_scaled(
        z, buffer, y, m1, m2, coef, ratio, frac_bits, status, inverse=False
    )
    _store_lattice(z, new_z, status)
    buffer.copy_(new_buffer)


def lattice_scaled_inverse_(
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
    """``lattice_scaled_inverse`` into z and buffer."""
    new_z, new_buffer = _lattice_scaled(
        z, buffer, y, m1, m2, coef, ratio, frac_bits, status, inverse=True
    )
    _store_lattice(z, new_z, status)
    buffer.copy_(new_buffer)


def _per_sample(scale: Tensor, dim: int) -> Tensor:
    """Return the scale, [], [1] or [B], in float64 as [] or [B, 1, ..., 1]."""
    scale = scale.to(torch.float64)
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (dim - 1))


def lattice_encode(
    x: Tensor,  # [B, ...] float64, float32, float16 or bfloat16
    scale: Tensor,  # [], [1] or [B] float32 or float64
    frac_bits: int,
    status: Tensor,  # [1] int32
) -> Tensor:
    """Z = rint(x * scale * 2^K), half to even."""
    value = x.to(torch.float64) * _per_sample(scale, x.dim())  # [B, ...]
    q = _quantize(value, frac_bits, status)
    return _store_lattice(torch.empty_like(x, dtype=torch.int32), q, status)


def empty_copies(z: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    """Return an empty [copies * B, ...] in the layout of z, [B, ...].

    The layout of z is kept while samples are whole blocks of memory; otherwise the result is
    contiguous.
    """
    like = torch.empty_like(z, dtype=dtype)
    if copies == 1:
        return like
    shape = (copies * z.shape[0], *z.shape[1:])
    if like.numel() > 0 and like.stride(0) * z.shape[0] == like.numel():
        return torch.empty_strided(shape, like.stride(), dtype=dtype, device=z.device)
    return torch.empty(shape, dtype=dtype, device=z.device)


def lattice_decode(
    z: Tensor,  # [B, ...] int32
    scale: Tensor,  # [], [1] or [B] float32 or float64
    frac_bits: int,
    copies: int,
    dtype: torch.dtype,
) -> Tensor:
    """x = float32(float32(Z * 2^-K) * scale), rounded to dtype, the batch repeated: [copies*B]."""
    value = _lattice_value(z, frac_bits).to(torch.float64) * _per_sample(scale, z.dim())
    value = value.to(torch.float32)  # [B, ...]
    out = empty_copies(z, copies, dtype)  # [copies*B, ...]
    return out.copy_(torch.cat([value] * copies) if copies > 1 else value)


# --- Preference objectives --------------------------------------------------------------------


def _residual_dtype(theta: Tensor) -> torch.dtype:
    return torch.float64 if theta.dtype == torch.float64 else torch.float32


def _mean_square(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean|first - second|^2 over all but dim 0, [B]: residuals in dtype, sums in float64.

    The squares of float32 residuals are exact in float64.
    """
    samples = first.shape[0]
    residual = (first.to(dtype) - second.to(dtype)).to(torch.float64)  # [B, ...]
    count = residual.numel() // max(samples, 1)
    total = residual.square().reshape(samples, count).sum(dim=1)  # [B]
    return (total / count).to(dtype) if count else torch.full_like(total, torch.nan, dtype=dtype)


def preference_errors(
    theta: Tensor,  # [B, ...] float64, float32, float16 or bfloat16
    ref: Tensor | None,  # [B, ...] like theta
    target: Tensor,  # [B, ...] like theta, or float32 beside a 16-bit theta
) -> tuple[Tensor, Tensor, Tensor]:
    """e_theta = mean|theta-target|^2, e_ref = mean|ref-target|^2, d = mean|theta-ref|^2, each [B].

    Means are over all dimensions but the first. Without ref, e_ref and d are 0.
    """
    dtype = _residual_dtype(theta)
    e_theta = _mean_square(theta, target, dtype)  # [B]
    if ref is None:
        return e_theta, torch.zeros_like(e_theta), torch.zeros_like(e_theta)
    return e_theta, _mean_square(ref, target, dtype), _mean_square(theta, ref, dtype)


def preference_backward(
    theta: Tensor,  # [B, ...]
    ref: Tensor | None,  # [B, ...]
    target: Tensor,  # [B, ...]
    a: Tensor,  # [B] float32 (float64 beside a float64 theta)
    b: Tensor,  # [B] like a
) -> Tensor:
    """a_i * (theta - target) + b_i * (theta - ref), [B, ...] in the dtype of theta."""
    dtype = _residual_dtype(theta)
    residual = theta.to(dtype) - target.to(dtype)  # [B, ...]
    value = _per_row(a, theta.dim()) * residual.to(torch.float64)
    if ref is not None:
        residual = theta.to(dtype) - ref.to(dtype)  # [B, ...]
        value = value + _per_row(b, theta.dim()) * residual.to(torch.float64)
    return _store_state(torch.empty_like(theta), value, None)


def _per_row(weight: Tensor, dim: int) -> Tensor:
    """Return the weight, [B], in float64 as [B, 1, ..., 1]."""
    return weight.to(torch.float64).reshape(-1, *[1] * (dim - 1))
