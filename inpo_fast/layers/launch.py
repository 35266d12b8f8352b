"""Launches of `kernels`: outputs and scratch memory are made here, gradients gathered.

Images are [N, P, C] contiguous, rows [R, W] contiguous, moments and partial sums float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..ops import triton_launch
from . import kernels
from .kernels import CHANNELS, GATES, PIXELS, PROGRAMS, ROWS, TILE

_IMAGE_TILE = (PIXELS, CHANNELS)
_GATE_TILE = (GATES, TILE // GATES)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
) -> None:
    triton_launch.launch(kernel, grid, tensors, scalars, kernels.options(kernel))


def _image_grid(x: Tensor) -> tuple[int, int, int]:
    samples, pixels, channels = x.shape
    return triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS), samples


def _row_tile(width: int) -> tuple[int, int]:
    """Rows of a tile, and the numbers of each."""
    power = triton.next_power_of_2(width)
    return max(1, TILE // power), power


def _gate_grid(rows: int, width: int) -> tuple[int, int, int]:
    return triton.cdiv(rows, TILE // GATES), triton.cdiv(width, GATES), 1


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def group_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    activated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y [N, P, C] of `dtype`, and the moments [N, groups, 2] (mean, 1/σ).

    Args:
        x: [N, P, C].
        shift: [N, C], added to every pixel before; contiguous.
        weight, bias: [C].
    """
    samples, pixels, channels = x.shape
    size, grid, shifted = channels // groups, _image_grid(x), shift is not None
    means, squares = _float32(x, 2, samples, grid[0], channels)
    moments = _float32(x, samples, groups, 2)
    y = torch.empty_like(x, dtype=dtype)
    # where nothing is shifted, nothing is read there
    shift = moments if shift is None else shift
    parts = (x, means, squares)
    _launch(kernels._group_norm_parts_kernel, grid, parts, (pixels, channels, *_IMAGE_TILE))
    _launch(
        kernels._group_norm_moments_kernel,
        (samples * groups, 1, 1),
        (means, squares, shift, moments),
        (
            *(pixels, channels, grid[0], size, eps),
            *(shifted, PIXELS, ROWS, triton.next_power_of_2(size)),
        ),
    )
    _launch(
        kernels._group_norm_kernel,
        grid,
        (x, shift, moments, weight, bias, y),
        (pixels, channels, size, shifted, activated, *_IMAGE_TILE),
    )
    return y, moments


def group_norm_backward(
    x: Tensor,
    dy: Tensor,
    shift: Tensor | None,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activated: bool,
    affine: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the shift, and of weight and bias where `affine`."""
    samples, pixels, channels = x.shape
    groups, grid, shifted = moments.shape[1], _image_grid(x), shift is not None
    size = channels // groups
    # of du x̂, of du, and of x̂ where it is needed
    sums = _float32(x, 2 + shifted, samples, grid[0], channels)
    dot, total, normed = sums[0], sums[1], sums[-1]
    means = torch.empty_like(moments)
    dx = torch.empty_like(x)
    dshift = None if shift is None else torch.empty_like(shift)
    shift = moments if shift is None else shift
    constants = (pixels, channels, size, shifted, activated, *_IMAGE_TILE)
    given = (x, dy, shift, moments)
    _launch(
        kernels._group_norm_backward_parts_kernel,
        grid,
        (*given, weight, bias, total, dot, normed),
        constants,
    )
    _launch(
        kernels._group_norm_backward_means_kernel,
        (samples * groups, 1, 1),
        (total, dot, normed, weight, moments, means, means if dshift is None else dshift),
        (pixels, channels, grid[0], size, shifted, ROWS, triton.next_power_of_2(size)),
    )
    _launch(
        kernels._group_norm_backward_kernel,
        grid,
        (*given, means, weight, bias, dx),
        constants,
    )
    if not affine:
        return dx, dshift, None, None
    dweight, dbias = sums[:2].sum((1, 2)).to(weight.dtype)
    return dx, dshift, dweight, dbias


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y [R, W] of `dtype`, and what it is the norm of: x, or x + r rounded to their common dtype.

    Args:
        x, residual: [R, W].
        weight, bias: [W].
    """
    rows, width = x.shape
    tile = _row_tile(width)
    y = torch.empty_like(x, dtype=dtype)
    total = x if residual is None else torch.empty_like(x, dtype=torch.result_type(x, residual))
    _launch(
        kernels._layer_norm_kernel,
        (triton.cdiv(rows, tile[0]), 1, 1),
        (x, x if residual is None else residual, total, weight, bias, y),
        (rows, width, eps, residual is not None, *tile),
    )
    return y, total


def layer_norm_backward(
    x: Tensor, dy: Tensor, dtotal: Tensor | None, weight: Tensor, eps: float, *, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, with `dtotal` added to it, and of weight and bias where `affine`."""
    rows, width = x.shape
    tile = _row_tile(width)
    programs = min(PROGRAMS, triton.cdiv(rows, tile[0]))
    sums = _float32(x, 2, programs, width)
    dx = torch.empty_like(x)
    _launch(
        kernels._layer_norm_backward_kernel,
        (programs, 1, 1),
        (x, dy, dy if dtotal is None else dtotal, weight, dx, sums[1], sums[0]),
        (rows, width, eps, dtotal is not None, *tile),
    )
    if not affine:
        return dx, None, None
    dweight, dbias = sums.sum(1).to(weight.dtype)
    return dx, dweight, dbias


def biased_sum(x: Tensor, y: Tensor, bias: Tensor, total: Tensor) -> None:
    """total = x + y + b, of x, y and total [N, P, C] and b [C]."""
    _, pixels, channels = x.shape
    constants = (pixels, channels, *_IMAGE_TILE)
    _launch(kernels._biased_sum_kernel, _image_grid(x), (x, y, bias, total), constants)


def geglu(x: Tensor) -> Tensor:
    """value · GELU(gate), [R, W], of x [R, 2W]."""
    rows, width = len(x), x.shape[1] // 2
    y = x.new_empty(rows, width)
    constants = (rows, width, *_GATE_TILE)
    _launch(kernels._geglu_kernel, _gate_grid(rows, width), (x, y), constants)
    return y


def geglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of x, [R, 2W]."""
    rows, width = dy.shape
    dx = torch.empty_like(x)
    constants = (rows, width, *_GATE_TILE)
    grid = _gate_grid(rows, width)
    _launch(kernels._geglu_backward_kernel, grid, (x, dy, dx), constants)
    return dx
