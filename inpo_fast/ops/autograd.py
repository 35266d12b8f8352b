# SPDX-License-Identifier: Apache-2.0
"""Gradients, outside the operators: only calls in which something requires grad pay for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inpo_fast.ops.reference import _columns


class AffineFunction(torch.autograd.Function):
    """x' = a*x + b*y + c1*m1 + c2*m2, or its inverse: linear in x, y, m1 and m2."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, ...]
        y: Tensor,  # [B, ...]
        m1: Tensor | None,  # [B, ...]
        m2: Tensor | None,  # [B, ...]
        coef: Tensor,  # [4] or [B, 4]
        kernel: Callable[..., Tensor],
        inverse: bool,
    ) -> Tensor:
        ctx.save_for_backward(coef)
        ctx.inverse = inverse
        ctx.dtypes = [None if t is None else t.dtype for t in (x, y, m1, m2)]
        return kernel(x, y, m1, m2, coef, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (coef,) = ctx.saved_tensors
        a, *others = _columns(coef.to(torch.float64), grad.dim())
        grad64 = grad.to(torch.float64)  # [B, ...]
        if ctx.inverse:
            # x' = x/a - (b/a)*y - ...
            grad64 = grad64 / a
            factors = [torch.ones_like(a), *(-c for c in others)]
        else:
            factors = [a, *others]
        grads = [
            (factor * grad64).to(dtype) if needed else None
            for factor, dtype, needed in zip(
                factors, ctx.dtypes, ctx.needs_input_grad[:4], strict=True
            )
        ]
        return *grads, None, None, None


def pair_margin(e_theta: Tensor, e_ref: Tensor, scale: float) -> Tensor:
    """scale ((e_theta - e_ref)_w - (e_theta - e_ref)_l), [P], of errors [2P], winners first."""
    winner, loser = (e_theta - e_ref).chunk(2)
    return (winner - loser) * scale


class PreferenceErrorsFunction(torch.autograd.Function):
    """The preference errors, and the margin of pairs if it has a scale, differentiable in theta.

    One node of the graph, and few operators on [B] or [P], each of which costs a training step as
    much host time as the reduction itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,  # [B, ...]
        ref: Tensor | None,  # [B, ...]
        target: Tensor,  # [B, ...]
        kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
        backward_kernel: Callable[..., Tensor],
        differentiate_d: bool,
        scale: float | None,
    ) -> tuple[Tensor, ...]:
        e_theta, e_ref, d = errors = kernel(theta, ref, target)  # [B] each
        ctx.save_for_backward(theta, ref if differentiate_d else None, target)
        ctx.backward_kernel, ctx.scale = backward_kernel, scale
        if not torch.compiler.is_compiling():  # There zeros cost nothing, and it cannot trace this.
            ctx.set_materialize_grads(False)
        if differentiate_d:
            ctx.mark_non_differentiable(e_ref)
        else:
            ctx.mark_non_differentiable(e_ref, d)
        return errors if scale is None else (*errors, pair_margin(e_theta, e_ref, scale))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_e_theta: Tensor | None,
        grad_e_ref: Tensor | None,
        grad_d: Tensor | None,
        grad_margin: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        theta, ref, target = ctx.saved_tensors
        # The mean over n elements of a squared residual r has the gradient (2/n) r.
        factor = 2.0 * max(theta.shape[0], 1) / max(theta.numel(), 1)
        a = None if grad_e_theta is None else grad_e_theta * factor  # [B]
        if grad_margin is not None:
            slope = ctx.scale * factor
            pairs = grad_margin.new_empty(2 * len(grad_margin))  # [B]
            winner, loser = pairs.chunk(2)
            torch.mul(grad_margin, slope, out=winner)
            torch.mul(grad_margin, -slope, out=loser)
            a = pairs if a is None else a + pairs
        if ref is None or grad_d is None:
            ref, b = None, a  # b is not read
        else:
            b = grad_d * factor  # [B]
            a = torch.zeros_like(b) if a is None else a
        grad = None if a is None else ctx.backward_kernel(theta, ref, target, a, b)
        return grad, None, None, None, None, None, None
