"""Triton kernels of the layers between a UNet's products: norms, sums, and the gate of its MLPs.

Everything is computed in float32 and rounded where it is stored, and besides only where a kernel
says so. Sums are added in a fixed order without atomics, so a result repeats its bits. Group norms
are of [N, P, C]: P pixels with their channels side by side, which is how an image in channels last
lies in memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# A tile of a group norm: so many pixels and channels.
PIXELS, CHANNELS = 64, 64
# Partial sums that are added side by side.
ROWS = 16
# Numbers of a tile of a layer norm or gate, and how many of a row of gates.
TILE, GATES = 4096, 256
# Programs of a layer norm's backward, each with its part of the sums over rows.
PROGRAMS = 512

# Of a program, where 4 were slower. A tile that is added up over its pixels goes through shared
# memory from warp to warp (in the backward 2 would not have the registers); of a group's moments,
# few programs read long columns.
WARPS = {"_group_norm_parts_kernel": 2, "_biased_sum_kernel": 2, "_group_norm_moments_kernel": 8}


def options(kernel: Any) -> dict[str, Any]:
    """What a kernel is compiled with."""
    return {"num_warps": WARPS.get(kernel.__name__, 4)}


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tile(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's pixels and channels, their places in memory, and which of them exist."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2).to(tl.int64) * pixels
    place = (sample + p)[:, None] * channels + c[None, :]
    return c, place, (p < pixels)[:, None] & (c < channels)[None, :]


@triton.jit
def _parts(channels):
    """Where this program's partial sums of its channels are, [N, chunks, C]."""
    return (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * channels


@triton.jit
def _two_of_group(moments_ptr, c, channels, size):
    """The two numbers that are kept for the groups that channels belong to."""
    place = (tl.program_id(2) * (channels // size) + c // size) * 2
    first = tl.load(moments_ptr + place, mask=c < channels, other=0.0)
    second = tl.load(moments_ptr + place + 1, mask=c < channels, other=0.0)
    return first, second


@triton.jit
def _moments_of(moments_ptr, shift_ptr, c, channels, size, SHIFTED: tl.constexpr):
    """What to take from x for x + s − μ, and 1/σ, of channels."""
    mean, inverse = _two_of_group(moments_ptr, c, channels, size)
    if SHIFTED:
        place = tl.program_id(2).to(tl.int64) * channels + c
        mean -= tl.load(shift_ptr + place, mask=c < channels, other=0.0)
    return mean, inverse


@triton.jit
def _group_norm_parts_kernel(
    x_ptr, mean_ptr, square_ptr, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean, and sum of squares about it, of every channel in a chunk of pixels."""
    c, place, mask = _tile(pixels, channels, PIXELS, CHANNELS)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS)
    mean = tl.sum(x, axis=0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    out = _parts(channels) + c
    tl.store(mean_ptr + out, mean, mask=c < channels)
    tl.store(square_ptr + out, tl.sum(deviation * deviation, axis=0), mask=c < channels)


@triton.jit
def _group_norm_moments_kernel(
    mean_ptr,
    square_ptr,
    shift_ptr,
    moments_ptr,
    pixels,
    channels,
    chunks,
    size,
    eps,
    SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Mean and 1/√(σ² + ε) of a group, of its chunks' (Chan, Golub and LeVeque 1979)."""
    groups = channels // size
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    lane, row = tl.arange(0, SIZE), tl.arange(0, ROWS)
    start = sample.to(tl.int64) * chunks * channels + group * size
    shift = tl.zeros([SIZE], tl.float32)
    if SHIFTED:
        own = sample.to(tl.int64) * channels + group * size + lane
        shift = tl.load(shift_ptr + own, mask=lane < size, other=0.0)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for k in range(0, chunks, ROWS):
        mask = (k + row < chunks)[:, None] & (lane < size)[None, :]
        count = tl.minimum(pixels - (k + row) * PIXELS, PIXELS)[:, None]
        place = start + (k + row)[:, None] * channels + lane[None, :]
        part = tl.load(mean_ptr + place, mask=mask, other=0.0) + shift[None, :]
        total += tl.where(mask, count * part, 0.0)
    numbers = pixels * size
    mean = tl.sum(total) / numbers
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for k in range(0, chunks, ROWS):
        mask = (k + row < chunks)[:, None] & (lane < size)[None, :]
        count = tl.minimum(pixels - (k + row) * PIXELS, PIXELS)[:, None]
        place = start + (k + row)[:, None] * channels + lane[None, :]
        off = tl.load(mean_ptr + place, mask=mask, other=0.0) + (shift - mean)[None, :]
        total += tl.load(square_ptr + place, mask=mask, other=0.0)
        total += tl.where(mask, count * (off * off), 0.0)
    variance = tl.sum(total) / numbers
    tl.store(moments_ptr + tl.program_id(0) * 2, mean)
    tl.store(moments_ptr + tl.program_id(0) * 2 + 1, 1 / tl.sqrt(variance + eps))


@triton.jit
def _group_norm_kernel(
    x_ptr,
    shift_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    channels,
    size,
    SHIFTED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """u = (x + s − μ)/σ · w + b, and SiLU(u) where activated."""
    c, place, mask = _tile(pixels, channels, PIXELS, CHANNELS)
    mean, inverse = _moments_of(moments_ptr, shift_ptr, c, channels, size, SHIFTED)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    u = (x - mean[None, :]) * inverse[None, :] * weight[None, :] + bias[None, :]
    if ACTIVATED:
        u = u * _sigmoid(u)
    tl.store(y_ptr + place, u.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _upstream(
    x_ptr,
    dy_ptr,
    shift_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    c,
    place,
    mask,
    channels,
    size,
    SHIFTED: tl.constexpr,
    ACTIVATED: tl.constexpr,
):
    """du, x̂, w, and 1/σ, of a tile."""
    mean, inverse = _moments_of(moments_ptr, shift_ptr, c, channels, size, SHIFTED)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    du = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    normed = (x - mean[None, :]) * inverse[None, :]
    if ACTIVATED:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        u = normed * weight[None, :] + bias[None, :]
        gate = _sigmoid(u)
        du = du * gate * (1 + u * (1 - gate))
    return du, normed, weight, inverse


@triton.jit
def _group_norm_backward_parts_kernel(
    x_ptr,
    dy_ptr,
    shift_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    dot_ptr,
    normed_ptr,
    pixels,
    channels,
    size,
    SHIFTED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Σ du and Σ du x̂ of every channel in a chunk of pixels, and Σ x̂ where shifted."""
    c, place, mask = _tile(pixels, channels, PIXELS, CHANNELS)
    du, normed, _, _ = _upstream(
        x_ptr,
        dy_ptr,
        shift_ptr,
        moments_ptr,
        weight_ptr,
        bias_ptr,
        c,
        place,
        mask,
        channels,
        size,
        SHIFTED,
        ACTIVATED,
    )
    out = _parts(channels) + c
    tl.store(sum_ptr + out, tl.sum(du, axis=0), mask=c < channels)
    tl.store(dot_ptr + out, tl.sum(du * normed, axis=0), mask=c < channels)
    if SHIFTED:
        normed = tl.where(mask, normed, 0.0)
        tl.store(normed_ptr + out, tl.sum(normed, axis=0), mask=c < channels)


@triton.jit
def _group_norm_backward_means_kernel(
    sum_ptr,
    dot_ptr,
    normed_ptr,
    weight_ptr,
    moments_ptr,
    means_ptr,
    dshift_ptr,
    pixels,
    channels,
    chunks,
    size,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Means of w du and of w du x̂ in a group, and ds = Σ dx over the pixels where shifted."""
    groups = channels // size
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    lane, row = tl.arange(0, SIZE), tl.arange(0, ROWS)
    start = sample.to(tl.int64) * chunks * channels + group * size
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    dots = tl.zeros([ROWS, SIZE], tl.float32)
    for k in range(0, chunks, ROWS):
        mask = (k + row < chunks)[:, None] & (lane < size)[None, :]
        place = start + (k + row)[:, None] * channels + lane[None, :]
        sums += tl.load(sum_ptr + place, mask=mask, other=0.0)
        dots += tl.load(dot_ptr + place, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + group * size + lane, mask=lane < size, other=0.0)
    weight = weight.to(tl.float32)
    numbers = pixels * size
    first = tl.sum(sums * weight[None, :]) / numbers
    second = tl.sum(dots * weight[None, :]) / numbers
    tl.store(means_ptr + tl.program_id(0) * 2, first)
    tl.store(means_ptr + tl.program_id(0) * 2 + 1, second)
    if SHIFTED:
        normed = tl.zeros([ROWS, SIZE], tl.float32)
        for k in range(0, chunks, ROWS):
            mask = (k + row < chunks)[:, None] & (lane < size)[None, :]
            place = start + (k + row)[:, None] * channels + lane[None, :]
            normed += tl.load(normed_ptr + place, mask=mask, other=0.0)
        inverse = tl.load(moments_ptr + tl.program_id(0) * 2 + 1)
        dshift = tl.sum(sums, axis=0) * weight - pixels * first - tl.sum(normed, axis=0) * second
        own = sample.to(tl.int64) * channels + group * size + lane
        dshift = (dshift * inverse).to(dshift_ptr.dtype.element_ty)
        tl.store(dshift_ptr + own, dshift, mask=lane < size)


@triton.jit
def _group_norm_backward_kernel(
    x_ptr,
    dy_ptr,
    shift_ptr,
    moments_ptr,
    means_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    pixels,
    channels,
    size,
    SHIFTED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx = (w du − mean(w du) − x̂ mean(w du x̂)) / σ."""
    c, place, mask = _tile(pixels, channels, PIXELS, CHANNELS)
    first, second = _two_of_group(means_ptr, c, channels, size)
    du, normed, weight, inverse = _upstream(
        x_ptr,
        dy_ptr,
        shift_ptr,
        moments_ptr,
        weight_ptr,
        bias_ptr,
        c,
        place,
        mask,
        channels,
        size,
        SHIFTED,
        ACTIVATED,
    )
    dx = du * weight[None, :] - first[None, :] - normed * second[None, :]
    tl.store(dx_ptr + place, (dx * inverse[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _places(row, lane, rows, width):
    """Where rows lie, and which of their numbers exist."""
    mask = (row < rows)[:, None] & (lane < width)[None, :]
    return row.to(tl.int64)[:, None] * width + lane[None, :], mask


@triton.jit
def _normed(x, mask, width, eps):
    """x̂ of rows, and 1/σ of each."""
    mean = tl.sum(x, axis=1) / width
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(deviation * deviation, axis=1) / width + eps)
    # rows beyond the end have σ = 0 where eps is
    return tl.where(mask, deviation * inverse[:, None], 0.0), inverse


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,
    total_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    width,
    eps,
    ADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = x̂ w + b of rows; where added, of x + r, which is rounded and stored, too."""
    row, lane = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS), tl.arange(0, WIDTH)
    place, mask = _places(row, lane, rows, width)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        x = total.to(tl.float32)
    normed, _ = _normed(x, mask, width, eps)
    weight = tl.load(weight_ptr + lane, mask=lane < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + lane, mask=lane < width, other=0.0).to(tl.float32)
    y = normed * weight[None, :] + bias[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
    if ADDED:
        tl.store(total_ptr + place, total, mask=mask)


@triton.jit
def _layer_norm_backward_kernel(
    x_ptr,
    dy_ptr,
    dtotal_ptr,
    weight_ptr,
    dx_ptr,
    sum_ptr,
    dot_ptr,
    rows,
    width,
    eps,
    ADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx = (w dy − mean(w dy) − x̂ mean(w dy x̂)) / σ, and this program's Σ dy and Σ dy x̂.

    Where x was added and is used elsewhere, its gradient from there is added to dx.
    """
    lane = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + lane, mask=lane < width, other=0.0).to(tl.float32)
    sums = tl.zeros([TILE_ROWS, WIDTH], tl.float32)
    dots = tl.zeros([TILE_ROWS, WIDTH], tl.float32)
    first, stride = tl.program_id(0) * TILE_ROWS, tl.num_programs(0) * TILE_ROWS
    for start in range(first, rows, stride):
        row = start + tl.arange(0, TILE_ROWS)
        place, mask = _places(row, lane, rows, width)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = _normed(x, mask, width, eps)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        sums += dy
        dots += dy * normed
        du = dy * weight[None, :]
        mean = tl.sum(du, axis=1) / width
        dot = tl.sum(du * normed, axis=1) / width
        dx = (du - mean[:, None] - normed * dot[:, None]) * inverse[:, None]
        if ADDED:
            dx += tl.load(dtotal_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = tl.program_id(0) * width + lane
    tl.store(sum_ptr + out, tl.sum(sums, axis=0), mask=lane < width)
    tl.store(dot_ptr + out, tl.sum(dots, axis=0), mask=lane < width)


@triton.jit
def _biased_sum_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    total_ptr,
    pixels,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x + y + b, of pixels."""
    c, place, mask = _tile(pixels, channels, PIXELS, CHANNELS)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    total = x + (y + bias[None, :])
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate(x_ptr, rows, width, GATES: tl.constexpr, GATED_ROWS: tl.constexpr):
    """Value and gate of a tile of [rows, 2 width], their places, and those in [rows, width]."""
    row = tl.program_id(0) * GATED_ROWS + tl.arange(0, GATED_ROWS)
    lane = tl.program_id(1) * GATES + tl.arange(0, GATES)
    mask = (row < rows)[:, None] & (lane < width)[None, :]
    start = row.to(tl.int64)[:, None] * width
    place = 2 * start + lane[None, :]
    value = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
    return value, gate, place, start + lane[None, :], mask


@triton.jit
def _geglu_kernel(x_ptr, y_ptr, rows, width, GATES: tl.constexpr, GATED_ROWS: tl.constexpr):
    """value · GELU(gate); GELU is rounded before, as in torch."""
    value, gate, _, at, mask = _gate(x_ptr, rows, width, GATES, GATED_ROWS)
    gelu = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    gelu = gelu.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (value * gelu).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_backward_kernel(
    x_ptr, dy_ptr, dx_ptr, rows, width, GATES: tl.constexpr, GATED_ROWS: tl.constexpr
):
    """Gradients of value and gate; GELU and its gradient are rounded before, as in torch."""
    value, gate, place, at, mask = _gate(x_ptr, rows, width, GATES, GATED_ROWS)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    gelu = (gate * below).to(dy_ptr.dtype.element_ty).to(tl.float32)
    inner = (dy * value).to(dy_ptr.dtype.element_ty).to(tl.float32)
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + place, (dy * gelu).to(dtype), mask=mask)
    tl.store(dx_ptr + place + width, (inner * (below + gate * density)).to(dtype), mask=mask)
