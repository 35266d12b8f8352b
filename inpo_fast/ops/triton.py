# SPDX-License-Identifier: Apache-2.0
"""The operators as Triton kernels, for CUDA GPUs (or, with TRITON_INTERPRET=1, for the CPU).

Functions have the names, the argument order and the bits of ``inpo_fast.ops.reference``; they are
plain callables that check nothing. This module imports triton: ``inpo_fast.ops.choice`` imports
it when the backend is used.

A program of the grid takes BLOCK elements of one row, where a row is a sample if constants differ
by sample, and otherwise the whole tensor. All operands lie in memory in one dense order, so that a
block is contiguous. Constants that change from step to step are read from the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inpo_fast.ops import reference
from inpo_fast.ops.triton_launch import launch, on_device_of

VERSION: str = triton.__version__
# TRITON_INTERPRET was set: kernels run in Python, on the CPU.
INTERPRETED: bool = triton.knobs.runtime.interpret

THREADS = 128
# Elements of a tile of the preference errors: eight for each thread.
ERROR_BLOCK = 1024
# Tiles that one program of the preference errors adds up. Fixed, as is the order of a sum.
ERROR_TILES = 4
# Partial sums that are added side by side.
SUM_BLOCK = 128

# A product is rounded before it is added, as in the reference (it shows in float64 states).
OPTIONS: dict[str, Any] = {"num_warps": THREADS // 32, "enable_fp_fusion": False}


# --- Device functions -------------------------------------------------------------------------


@triton.jit
def _locate(n, blocks, BLOCK: tl.constexpr, REVERSED: tl.constexpr = False):
    """Return the row, the place of its first element here, the lanes and which of them exist."""
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    row = program * 0
    if blocks > 0:
        row = program // blocks
    start = (program - row * blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return row, row.to(tl.int64) * n + start, lane, lane < n - start


@triton.jit
def _load(ptr, place, lane, mask):
    return tl.load(ptr + place + lane, mask=mask, other=0)


@triton.jit
def _single(value):
    """Convert from at most 32 bits to float32, exactly."""
    if value.dtype == tl.bfloat16:
        # In integers, as in _round: the interpreter loses denormals.
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _wide(value):
    """Convert to float64, exactly."""
    if value.dtype == tl.float64:
        return value
    else:
        return _single(value).to(tl.float64)


@triton.jit
def _round(value, DTYPE: tl.constexpr):
    """Round float64 to DTYPE, by way of float32, half to even."""
    if DTYPE == tl.float64:
        return value
    elif DTYPE == tl.bfloat16:
        # In integers, because the interpreter truncates.
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.float32).to(DTYPE)


@triton.jit
def _finite(value):
    if value.dtype == tl.float64:
        return tl.abs(value) < float("inf")
    else:
        return tl.abs(_single(value)) < float("inf")


@triton.jit
def _raise(status_ptr, outside, nonfinite, BLOCK: tl.constexpr):
    """Set the bits for what is true anywhere. Where nothing is, there is no memory access.

    The elements of a thread have one lane, so that no thread waits for another.
    """
    SHARE: tl.constexpr = BLOCK // 128
    found = outside.to(tl.int32) + (nonfinite.to(tl.int32) << 4)
    found = tl.sum(tl.reshape(found, [128, SHARE]), axis=1)
    bits = tl.where((found & 15) != 0, 1, 0) | tl.where(found >= 16, 2, 0)
    word = status_ptr + tl.zeros([128], tl.int32)
    tl.atomic_or(word, bits, mask=found != 0, sem="relaxed")


@triton.jit
def _increment(y, m1_ptr, m2_ptr, coef_ptr, place, lane, mask):
    """(b*y + c1*m1) + c2*m2 in float64."""
    total = _wide(tl.load(coef_ptr + 1)) * y
    if m1_ptr is not None:
        total = total + _wide(tl.load(coef_ptr + 2)) * _wide(_load(m1_ptr, place, lane, mask))
    if m2_ptr is not None:
        total = total + _wide(tl.load(coef_ptr + 3)) * _wide(_load(m2_ptr, place, lane, mask))
    return total


@triton.jit
def _unit(exponent):
    """2^exponent, float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_integer(value):
    """rint of a float64, half to even, as int64, where it is within +-2^51.

    1.5 * 2^52 has no bits below 1, so the sum is rounded, and its low bits are the integer. Any
    other value, also NaN, gives an integer beyond 2^51.
    """
    return (value + 6755399441055744.0).to(tl.int64, bitcast=True) - 0x4338000000000000


@triton.jit
def _add_to_lattice(z, value, unit):
    """Return z + rint(value * unit) in int32, saturated, what is outside, and what is not finite.

    z is int32, and stays where the value is not finite.
    """
    scaled = value * unit
    total = z.to(tl.int64) + _to_integer(scaled)
    out = total.to(tl.int32)
    fits = total == out.to(tl.int64)
    finite = tl.abs(value) < float("inf")
    # z is an int32, so the sign of what leads out of the range is that of the increment.
    limit = tl.where(scaled > 0, 2147483647, -2147483648)
    out = tl.where(fits, out, tl.where(finite, limit, z))
    return out, finite & ~fits, ~finite


@triton.jit
def _saturate(value):
    """Return the int64 value in int32, and where it does not fit."""
    inside = tl.minimum(tl.maximum(value, -2147483648), 2147483647)
    return inside.to(tl.int32), inside != value


@triton.jit
def _lattice_increment(y_ptr, m1_ptr, m2_ptr, coef_ptr, frac_bits, place, lane, mask):
    """(b*y + c1*m1) + c2*m2 in float64, with y = float32(Z_y * 2^-K)."""
    y = _load(y_ptr, place, lane, mask).to(tl.float32) * _unit(-frac_bits)
    return _increment(_wide(y), m1_ptr, m2_ptr, coef_ptr, place, lane, mask)


@triton.jit
def _divide(x, v, multiplier):
    """floor(x / v) and the rest, for int64 0 <= x; multiplier is floor((2^64 - 1) / v), uint64."""
    quotient = tl.umulhi(x.to(tl.uint64, bitcast=True), multiplier).to(tl.int64, bitcast=True)
    rest = x - quotient * v
    # The quotient is right or one too small.
    low = rest >= v
    return tl.where(low, quotient + 1, quotient), tl.where(low, rest - v, rest)


@triton.jit
def _contract(z, buffer, p, q, mul_p, mul_q):
    """Scale (z, buffer) by p/q <= 1, |z| p <= 2^34 q; see ``inpo_fast.lattice``."""
    high, digit = _divide(buffer, p, mul_p)
    # Shifted by a multiple of q, so that nothing is negative.
    quotient, rest = _divide(z * p + (q << 34), q, mul_q)
    quotient -= 1 << 34
    gap = tl.where(rest == 0, 0, q - rest)
    digit += tl.where(gap < p, gap, 0)
    digit = tl.where(digit >= p, digit - p, digit)
    rest += digit
    carry = rest >= q
    return tl.where(carry, quotient + 1, quotient), high * q + tl.where(carry, rest - q, rest)


@triton.jit
def _expand(z, buffer, p, q, mul_p, mul_q):
    """Scale (z, buffer) by q/p >= 1, |z| <= 2^34: the inverse of ``_contract``."""
    high, digit = _divide(buffer, q, mul_q)
    shift = (q // p + 1) << 34
    quotient, rest = _divide(z * q + digit + shift * p, p, mul_p)
    gap = rest - digit
    gap = tl.where(gap < 0, gap + q, gap)
    digit = rest - tl.where(gap < p, gap, 0)
    digit = tl.where(digit < 0, digit + p, digit)
    return quotient - shift, high * p + digit


@triton.jit
def _residual(first, second):
    """Subtract in float32, or in float64 where both are float64; in float64."""
    if first.dtype == tl.float64:
        return first - second
    else:
        return (_single(first) - _single(second)).to(tl.float64)


# --- Kernels ----------------------------------------------------------------------------------

# These would compile a kernel anew where they are 1 or a multiple of 16.
_VARYING = ["blocks", "coef_stride", "ratio_stride", "scale_stride", "frac_bits"]


@triton.jit(do_not_specialize=_VARYING)
def _affine_kernel(
    x_ptr,
    y_ptr,
    m1_ptr,
    m2_ptr,
    coef_ptr,
    out_ptr,
    status_ptr,
    n,  # elements of a row
    blocks,  # of a row
    coef_stride,  # from row to row: 4 or 0
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, place, lane, mask = _locate(n, blocks, BLOCK)
    coef_ptr += row * coef_stride
    x = _wide(_load(x_ptr, place, lane, mask))
    y = _wide(_load(y_ptr, place, lane, mask))
    increment = _increment(y, m1_ptr, m2_ptr, coef_ptr, place, lane, mask)
    a = _wide(tl.load(coef_ptr))
    if INVERSE:
        value = (x - increment) / a
    else:
        value = a * x + increment
    out = _round(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place + lane, out, mask=mask)
    if status_ptr is not None:
        _raise(status_ptr, lane < 0, mask & ~_finite(out), BLOCK)


@triton.jit(do_not_specialize=_VARYING)
def _lattice_kernel(
    z_ptr,
    y_ptr,
    m1_ptr,
    m2_ptr,
    coef_ptr,
    out_ptr,
    status_ptr,
    n,
    blocks,
    coef_stride,
    frac_bits,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, place, lane, mask = _locate(n, blocks, BLOCK)
    coef_ptr += row * coef_stride
    z = _load(z_ptr, place, lane, mask)
    value = _lattice_increment(y_ptr, m1_ptr, m2_ptr, coef_ptr, frac_bits, place, lane, mask)
    # The difference is the sum with the negative: rounding is symmetric.
    unit = _wide(_unit(frac_bits))
    out, outside, nonfinite = _add_to_lattice(z, value, -unit if INVERSE else unit)
    tl.store(out_ptr + place + lane, out, mask=mask)
    _raise(status_ptr, mask & outside, mask & nonfinite, BLOCK)


@triton.jit(do_not_specialize=_VARYING)
def _scaled_kernel(
    z_ptr,
    buffer_ptr,
    y_ptr,
    m1_ptr,
    m2_ptr,
    coef_ptr,
    ratio_ptr,
    out_ptr,
    buffer_out_ptr,
    status_ptr,
    n,
    blocks,
    coef_stride,
    ratio_stride,
    frac_bits,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, place, lane, mask = _locate(n, blocks, BLOCK)
    coef_ptr += row * coef_stride
    ratio_ptr += row * ratio_stride
    z = _load(z_ptr, place, lane, mask).to(tl.int64)
    buffer = _load(buffer_ptr, place, lane, mask)
    value = _lattice_increment(y_ptr, m1_ptr, m2_ptr, coef_ptr, frac_bits, place, lane, mask)
    finite = tl.abs(value) < float("inf")
    scaled = tl.where(finite, value, 0.0) * _wide(_unit(frac_bits))
    # 2^50: anything beyond ends outside the lattice.
    q = _to_integer(tl.minimum(tl.maximum(scaled, -1125899906842624.0), 1125899906842624.0))
    # The inverse scales by the exchanged ratio.
    over = tl.load(ratio_ptr + (1 if INVERSE else 0))
    under = tl.load(ratio_ptr + (0 if INVERSE else 1))
    mul_over = tl.load(ratio_ptr + (3 if INVERSE else 2)).to(tl.uint64, bitcast=True)
    mul_under = tl.load(ratio_ptr + (2 if INVERSE else 3)).to(tl.uint64, bitcast=True)
    outside = lane < 0
    if INVERSE:
        whole = z - q
        bound = tl.maximum(under // over, 1) << 34
        z = tl.minimum(tl.maximum(whole, -bound), bound)
        outside = z != whole
    if over <= under:
        z, buffer = _contract(z, buffer, over, under, mul_over, mul_under)
    else:
        z, buffer = _expand(z, buffer, under, over, mul_under, mul_over)
    out, saturated = _saturate(z if INVERSE else z + q)
    tl.store(out_ptr + place + lane, out, mask=mask)
    tl.store(buffer_out_ptr + place + lane, buffer, mask=mask)
    _raise(status_ptr, mask & (outside | saturated), mask & ~finite, BLOCK)


@triton.jit(do_not_specialize=_VARYING)
def _encode_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    status_ptr,
    n,
    blocks,
    scale_stride,
    frac_bits,
    BLOCK: tl.constexpr,
):
    row, place, lane, mask = _locate(n, blocks, BLOCK)
    scale = _wide(tl.load(scale_ptr + row * scale_stride))
    value = _wide(_load(x_ptr, place, lane, mask)) * scale
    zero = tl.zeros([BLOCK], tl.int32)
    out, outside, nonfinite = _add_to_lattice(zero, value, _wide(_unit(frac_bits)))
    tl.store(out_ptr + place + lane, out, mask=mask)
    _raise(status_ptr, mask & outside, mask & nonfinite, BLOCK)


@triton.jit(do_not_specialize=_VARYING)
def _decode_kernel(
    z_ptr,
    scale_ptr,
    out_ptr,
    n,
    blocks,
    scale_stride,
    total,  # elements of one copy
    frac_bits,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, place, lane, mask = _locate(n, blocks, BLOCK)
    scale = _wide(tl.load(scale_ptr + row * scale_stride))
    value = _load(z_ptr, place, lane, mask).to(tl.float32) * _unit(-frac_bits)
    value = (_wide(value) * scale).to(tl.float32)
    out = _round(_wide(value), out_ptr.dtype.element_ty)
    tl.store(out_ptr + place + lane, out, mask=mask)
    if COPIES == 2:
        tl.store(out_ptr + total + place + lane, out, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _errors_kernel(
    theta_ptr,
    ref_ptr,
    target_ptr,
    sums_ptr,  # [rows * blocks, 3] float64
    n,
    blocks,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    start = (program - row * blocks) * (BLOCK * TILES)
    lane = tl.arange(0, BLOCK)
    e_theta = tl.zeros([BLOCK], tl.float64)
    e_ref = tl.zeros([BLOCK], tl.float64)
    d = tl.zeros([BLOCK], tl.float64)
    for tile in tl.static_range(TILES):
        begin = start + tile * BLOCK
        place = row * n + begin
        mask = lane < n - begin
        theta = _load(theta_ptr, place, lane, mask)
        target = _load(target_ptr, place, lane, mask)
        residual = _residual(theta, target)
        e_theta += residual * residual
        if ref_ptr is not None:
            # Read once: the backward of most losses reads the other two.
            ref = tl.load(ref_ptr + place + lane, mask=mask, other=0, eviction_policy="evict_first")
            residual = _residual(ref, target)
            e_ref += residual * residual
            residual = _residual(theta, ref)
            d += residual * residual
    sums_ptr += program * 3
    tl.store(sums_ptr, tl.sum(e_theta))
    if ref_ptr is not None:
        tl.store(sums_ptr + 1, tl.sum(e_ref))
        tl.store(sums_ptr + 2, tl.sum(d))


@triton.jit
def _mean(sums_ptr, n, blocks, TILES: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(TILES):
        index = tile * BLOCK + lane
        total += tl.load(sums_ptr + index * 3, mask=index < blocks, other=0.0)
    return tl.sum(total) / n.to(tl.float64)


@triton.jit(do_not_specialize=["n", *_VARYING])
def _means_kernel(
    sums_ptr,  # [rows * blocks, 3] float64
    e_theta_ptr,
    e_ref_ptr,
    d_ptr,
    n,
    blocks,
    WITH_REF: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums_ptr += row * blocks * 3
    dtype: tl.constexpr = e_theta_ptr.dtype.element_ty
    tl.store(e_theta_ptr + row, _mean(sums_ptr, n, blocks, TILES, BLOCK).to(dtype))
    if WITH_REF:
        tl.store(e_ref_ptr + row, _mean(sums_ptr + 1, n, blocks, TILES, BLOCK).to(dtype))
        tl.store(d_ptr + row, _mean(sums_ptr + 2, n, blocks, TILES, BLOCK).to(dtype))
    else:
        tl.store(e_ref_ptr + row, 0.0)
        tl.store(d_ptr + row, 0.0)


@triton.jit(do_not_specialize=_VARYING)
def _preference_backward_kernel(
    theta_ptr,
    ref_ptr,
    target_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    n,
    blocks,
    BLOCK: tl.constexpr,
):
    # From the end, where the forward has just been: first what the cache still holds, which the
    # result does not drive out.
    row, place, lane, mask = _locate(n, blocks, BLOCK, REVERSED=True)
    theta = _load(theta_ptr, place, lane, mask)
    target = _load(target_ptr, place, lane, mask)
    value = _wide(tl.load(a_ptr + row)) * _residual(theta, target)
    if ref_ptr is not None:
        ref = _load(ref_ptr, place, lane, mask)
        value = value + _wide(tl.load(b_ptr + row)) * _residual(theta, ref)
    out = _round(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place + lane, out, mask=mask, eviction_policy="evict_first")


# --- Launchers --------------------------------------------------------------------------------


class _Layout:
    """One dense order of elements in memory, in which all operands of a kernel lie.

    It is that of ``torch.empty_like(x)``, unless rows are samples and samples are not whole blocks
    of memory in it; then it is the contiguous order.
    """

    __slots__ = ("shape", "strides")

    def __init__(self, x: Tensor, by_sample: bool) -> None:
        self.shape = x.shape
        # None says contiguous.
        self.strides: tuple[int, ...] | None = None
        if not x.is_contiguous():
            strides = torch.empty_like(x, device="meta").stride()
            if not by_sample or strides[0] * x.shape[0] == x.numel():
                self.strides = strides

    def matches(self, t: Tensor) -> bool:
        """Say whether the elements of t, [B, ...], lie in this order."""
        if self.strides is None:
            return t.is_contiguous()
        return all(
            size == 1 or stride == own
            for size, stride, own in zip(self.shape, t.stride(), self.strides, strict=True)
        )

    def empty(self, t: Tensor) -> Tensor:
        """Return new memory for the values of t, [B, ...], in this order."""
        if self.strides is None:
            return torch.empty(self.shape, dtype=t.dtype, device=t.device)
        return torch.empty_strided(self.shape, self.strides, dtype=t.dtype, device=t.device)

    def operand(self, t: Tensor | None) -> Tensor | None:
        """Return t, [B, ...], or a copy of it in this order."""
        return t if t is None or self.matches(t) else self.empty(t).copy_(t)

    def target(self, result: Tensor) -> Tensor:
        """Return the result, [B, ...], or memory in this order that ``finish`` brings there."""
        return result if self.matches(result) else self.empty(result)


def _finish(result: Tensor, target: Tensor) -> None:
    if target is not result:
        result.copy_(target)


def _rows(constants: Tensor) -> tuple[Tensor, int]:
    """Return rows [4] or [B, 4] in one block of memory, and the stride from row to row, or 0."""
    stride = 4 if constants.dim() == 2 and constants.shape[0] != 1 else 0
    return constants.contiguous(), stride


def _scales(scale: Tensor) -> tuple[Tensor, int]:
    """Return the scale [], [1] or [B] in one block of memory, and the stride, 1 or 0."""
    return scale.contiguous(), 0 if scale.numel() == 1 else 1


def _grid(x: Tensor, by_sample: bool, block: int) -> tuple[int, int, int]:
    """Return the elements of a row, the blocks of a row (0: there is one row) and all blocks."""
    if not by_sample:
        n = x.numel()
        return n, 0, -(-n // block)
    n = x.numel() // x.shape[0]
    blocks = -(-n // block)
    return n, blocks, x.shape[0] * blocks


def _block(result: Tensor) -> int:
    """Return the elements of a program: 128 bits of the result for each of its threads."""
    return THREADS * 16 // result.element_size()


def _launch(
    kernel: Any, programs: int, tensors: tuple[Tensor | None, ...], scalars: tuple[int, ...]
) -> None:
    launch(kernel, (programs, 1, 1), tensors, scalars, OPTIONS)


def _affine(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
    result: Tensor,
    inverse: bool,
) -> Tensor:
    if x.numel() == 0:
        return result
    coef, stride = _rows(coef)
    layout = _Layout(x, stride > 0)
    operand = layout.operand
    target = layout.target(result)
    block = _block(result)
    n, blocks, programs = _grid(x, stride > 0, block)
    with on_device_of(x):
        tensors = operand(x), operand(y), operand(m1), operand(m2), coef, target, status
        _launch(_affine_kernel, programs, tensors, (n, blocks, stride, inverse, block))
        _finish(result, target)
    return result


def _lattice(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
    result: Tensor,
    inverse: bool,
) -> Tensor:
    if z.numel() == 0:
        return result
    coef, stride = _rows(coef)
    layout = _Layout(z, stride > 0)
    operand = layout.operand
    target = layout.target(result)
    block = _block(result)
    n, blocks, programs = _grid(z, stride > 0, block)
    with on_device_of(z):
        tensors = operand(z), operand(y), operand(m1), operand(m2), coef, target, status
        _launch(_lattice_kernel, programs, tensors, (n, blocks, stride, frac_bits, inverse, block))
        _finish(result, target)
    return result


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
    results: tuple[Tensor, Tensor],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if z.numel() == 0:
        return results
    coef, coef_stride = _rows(coef)
    ratio, ratio_stride = _rows(ratio)
    by_sample = coef_stride > 0 or ratio_stride > 0
    layout = _Layout(z, by_sample)
    operand = layout.operand
    target, buffer_target = (layout.target(result) for result in results)
    block = _block(z)
    n, blocks, programs = _grid(z, by_sample, block)
    with on_device_of(z):
        tensors = (
            operand(z),
            operand(buffer),
            operand(y),
            operand(m1),
            operand(m2),
            coef,
            ratio,
            target,
            buffer_target,
            status,
        )
        _launch(
            _scaled_kernel,
            programs,
            tensors,
            (n, blocks, coef_stride, ratio_stride, frac_bits, inverse, block),
        )
        _finish(results[0], target)
        _finish(results[1], buffer_target)
    return results


def affine_update(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> Tensor:
    return _affine(x, y, m1, m2, coef, status, torch.empty_like(x), False)


def affine_inverse(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> Tensor:
    return _affine(x, y, m1, m2, coef, status, torch.empty_like(x), True)


def affine_update_(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> None:
    _affine(x, y, m1, m2, coef, status, x, False)


def affine_inverse_(
    x: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    status: Tensor | None,
) -> None:
    _affine(x, y, m1, m2, coef, status, x, True)


def lattice_update(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> Tensor:
    return _lattice(z, y, m1, m2, coef, frac_bits, status, torch.empty_like(z), False)


def lattice_inverse(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> Tensor:
    return _lattice(z, y, m1, m2, coef, frac_bits, status, torch.empty_like(z), True)


def lattice_update_(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    _lattice(z, y, m1, m2, coef, frac_bits, status, z, False)


def lattice_inverse_(
    z: Tensor,
    y: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coef: Tensor,
    frac_bits: int,
    status: Tensor,
) -> None:
    _lattice(z, y, m1, m2, coef, frac_bits, status, z, True)


def lattice_scaled_update(
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
    results = torch.empty_like(z), torch.empty_like(buffer)
    return _lattice_scaled(z, buffer, y, m1, m2, coef, ratio, frac_bits, status, results, False)


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
    results = torch.empty_like(z), torch.empty_like(buffer)
    return _lattice_scaled(z, buffer, y, m1, m2, coef, ratio, frac_bits, status, results, True)


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
    _lattice_scaled(z, buffer, y, m1, m2, coef, ratio, frac_bits, status, (z, buffer), False)


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
    _lattice_scaled(z, buffer, y, m1, m2, coef, ratio, frac_bits, status, (z, buffer), True)


def lattice_encode(x: Tensor, scale: Tensor, frac_bits: int, status: Tensor) -> Tensor:
    result = torch.empty_like(x, dtype=torch.int32)
    if x.numel() == 0:
        return result
    scale, stride = _scales(scale)
    layout = _Layout(x, stride > 0)
    target = layout.target(result)
    block = _block(result)
    n, blocks, programs = _grid(x, stride > 0, block)
    with on_device_of(x):
        tensors = layout.operand(x), scale, target, status
        _launch(_encode_kernel, programs, tensors, (n, blocks, stride, frac_bits, block))
        _finish(result, target)
    return result


def lattice_decode(
    z: Tensor, scale: Tensor, frac_bits: int, copies: int, dtype: torch.dtype
) -> Tensor:
    result = reference.empty_copies(z, copies, dtype)  # [copies*B, ...]
    if z.numel() == 0:
        return result
    scale, stride = _scales(scale)
    layout = _Layout(z, stride > 0 or copies > 1)
    # With two copies, the result has this layout.
    target = result if copies > 1 else layout.target(result)
    block = _block(result)
    n, blocks, programs = _grid(z, stride > 0, block)
    with on_device_of(z):
        tensors = layout.operand(z), scale, target
        _launch(
            _decode_kernel,
            programs,
            tensors,
            (n, blocks, stride, z.numel(), frac_bits, copies, block),
        )
        _finish(result, target)
    return result


def preference_errors(
    theta: Tensor, ref: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch = theta.shape[0]
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    e_theta, e_ref, d = (torch.empty(batch, dtype=dtype, device=theta.device) for _ in range(3))
    if theta.numel() == 0:
        e_theta.fill_(torch.nan)
        for error in (e_ref, d):
            error.fill_(0.0 if ref is None else torch.nan)
        return e_theta, e_ref, d
    layout = _Layout(theta, True)
    n, blocks, programs = _grid(theta, True, ERROR_BLOCK * ERROR_TILES)
    sums = torch.empty(batch * blocks, 3, dtype=torch.float64, device=theta.device)
    # A power of two, so that few numbers of blocks compile a kernel anew.
    sum_tiles = triton.next_power_of_2(-(-blocks // SUM_BLOCK))
    with on_device_of(theta):
        tensors = layout.operand(theta), layout.operand(ref), layout.operand(target), sums
        _launch(_errors_kernel, programs, tensors, (n, blocks, ERROR_TILES, ERROR_BLOCK))
        tensors = sums, e_theta, e_ref, d
        _launch(_means_kernel, batch, tensors, (n, blocks, ref is not None, sum_tiles, SUM_BLOCK))
    return e_theta, e_ref, d


def preference_backward(
    theta: Tensor, ref: Tensor | None, target: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    result = torch.empty_like(theta)
    if theta.numel() == 0:
        return result
    layout = _Layout(theta, True)
    out = layout.target(result)
    block = _block(theta)
    n, blocks, programs = _grid(theta, True, block)
    with on_device_of(theta):
        tensors = (
            layout.operand(theta),
            layout.operand(ref),
            layout.operand(target),
            a.contiguous(),
            b.contiguous(),
            out,
        )
        _launch(_preference_backward_kernel, programs, tensors, (n, blocks, block))
        _finish(result, out)
    return result


def probe(device: torch.device) -> None:
    """Compile and launch a kernel, or raise what keeps Triton from it. Nothing is waited for."""
    z = torch.zeros(1, dtype=torch.int32, device=device)
    lattice_update(z, z, None, None, torch.zeros(4, device=device), 1, torch.zeros_like(z))
