"""What the fused layers compute, as autograd functions of tensors, and how these lie in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.triton import INTERPRETED
from ..ops.triton_launch import on_device_of
from . import launch as kernels


def has_kernels(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether to launch a kernel; torch computes otherwise, or says what is wrong.

    What torch compiles or exports is left to its compiler, which cannot look into these kernels.
    Weights that are elsewhere have an address that no kernel may read.
    """
    return (
        x.device.type == ("cpu" if INTERPRETED else "cuda")
        and x.dtype != torch.float64
        and (weight is None or weight.device == x.device)
        and not torch.compiler.is_compiling()
    )


def _output_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the next product reads of numbers of `dtype`: under autocast its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def pixels(image: Tensor) -> Tensor:
    """[N, C, …] as [N, P, C], without a copy where it lies in channels last."""
    samples, channels, *size = image.shape
    return image.reshape(samples, channels, math.prod(size)).transpose(1, 2).contiguous()


def _image(x: Tensor, like: Tensor) -> Tensor:
    """[N, P, C] as [N, C, …], in channels last."""
    return x.transpose(1, 2).reshape(like.shape)


def _rows(x: Tensor) -> Tensor:
    """[…, W] as [R, W]."""
    return x.contiguous().view(-1, x.shape[-1])


def apply(function: Any, x: Tensor, *given: Any) -> Tensor:
    with on_device_of(x):
        y: Tensor = function.apply(x, *given)
    return y


class GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        activated: bool,
    ) -> Tensor:
        x = pixels(image)
        y, moments = kernels.group_norm(
            *(x, shift, weight, bias, groups, eps),
            activated=activated,
            dtype=_output_dtype(image, image.dtype),
        )
        ctx.save_for_backward(x, shift, moments, weight, bias)
        ctx.activated = activated
        return _image(y, image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, moments, weight, bias = ctx.saved_tensors
        dx, *others = kernels.group_norm_backward(
            *(x, pixels(dy), shift, moments, weight, bias),
            activated=ctx.activated,
            affine=any(ctx.needs_input_grad[2:4]),
        )
        return _image(dx, dy), *others, None, None, None


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = _rows(input)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        dtype = _output_dtype(input, input.dtype)
        y, _ = kernels.layer_norm(x, None, weight, bias, eps, dtype=dtype)
        return y.view(input.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = kernels.layer_norm_backward(
            x, _rows(dy), None, weight, ctx.eps, affine=any(ctx.needs_input_grad[1:3])
        )
        return dx.view(dy.shape), dweight, dbias, None


class SumLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total = kernels.layer_norm(
            *(_rows(input), _rows(residual), weight, bias, eps),
            dtype=_output_dtype(input, torch.result_type(input, residual)),
        )
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtypes = eps, (input.dtype, residual.dtype)
        return total.view(input.shape), y.view(input.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx, dweight, dbias = kernels.layer_norm_backward(
            *(total, _rows(dy), _rows(dtotal), weight, ctx.eps),
            affine=any(ctx.needs_input_grad[2:4]),
        )
        dx = dx.view(dy.shape)
        return *(dx.to(dtype) for dtype in ctx.dtypes), dweight, dbias, None


class BiasedSum(torch.autograd.Function):
    """x + y + b of images x and y, with b for every channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtypes = (x.dtype, y.dtype, bias.dtype)
        # not a view: FreeU writes into what a block returns, and autograd refuses that for views
        dtype = torch.result_type(x, y)
        total = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
        kernels.biased_sum(pixels(x), pixels(y), bias, pixels(total))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        first, second, last = ctx.dtypes
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = pixels(dtotal).sum((0, 1), dtype=torch.float32).to(last)
        return dtotal.to(first), dtotal.to(second), dbias


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        x = _rows(projected)
        ctx.save_for_backward(x)
        return kernels.geglu(x).view(*projected.shape[:-1], x.shape[1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = kernels.geglu_backward(x, _rows(dy))
        return dx.view(*dy.shape[:-1], dx.shape[1])
