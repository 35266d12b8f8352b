"""Attention of the fused layers, whose gradient repeats its bits where training must.

torch's first choice on recent GPUs is cuDNN, whose backward adds in the order in which blocks
finish. In deterministic mode it takes FlashAttention instead, which puts its blocks in a line for
that, and whose forward is slower, too. Here cuDNN's forward goes with a backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import attention_kernels as kernels
from . import functions


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √W) V, [N, L, H, W].

    Args:
        query: [N, L, H, W]: samples, tokens, heads, and the width of a head.
        key, value: [N, K, H, W].
    """
    if _must_repeat(query, key, value):
        return functions.apply(DeterministicAttention, query, key, value)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _must_repeat(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch would take its deterministic way, and the kernels take these tensors.

    What torch would cast, broadcast or pad, and what is wrong, is left to it.
    """
    return (
        torch.are_deterministic_algorithms_enabled()
        and functions.has_kernels(query)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and (len(query), *query.shape[2:]) == (len(key), *key.shape[2:])
        and query.numel() > 0
        and key.numel() > 0
        and len(query) * query.shape[2] <= kernels.MOST_HEADS
        and query.shape[3] % 8 == 0
        and kernels.plan_of(query.shape[3]) is not None
        and (not query.is_cuda or torch.backends.cuda.is_flash_attention_available())
    )


class DeterministicAttention(torch.autograd.Function):
    """A forward of torch's, and the backward of `attention_kernels`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = [x.contiguous() for x in (query, key, value)]
        y, logs = output_and_logs(*given)
        ctx.save_for_backward(*given, y, logs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, y, logs = ctx.saved_tensors
        return kernels.backward(query, key, value, y, logs, dy.contiguous())


def output_and_logs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, L, H, W], and the logs of sums of exponentials [N, H, L], both contiguous.

    The logs are asked for in any case, so that policy and reference run the same kernel.
    """
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    op = torch.ops.aten
    if not query.is_cuda:
        y, logs = op._scaled_dot_product_flash_attention_for_cpu(*heads)
    elif _prefers_cudnn(query, key):
        y, logs, *_ = op._scaled_dot_product_cudnn_attention(*heads, None, True)
    else:
        y, logs, *_ = op._scaled_dot_product_flash_attention(*heads)
    return y.transpose(1, 2).contiguous(), logs.reshape(logs.shape[:3]).contiguous()


def _prefers_cudnn(query: Tensor, key: Tensor) -> bool:
    """Whether torch itself would take cuDNN by default, did nothing have to repeat: on these GPUs,
    and since the version that is right for any number of tokens (pytorch issue 169849)."""
    if torch.version.hip is not None or (torch.backends.cudnn.version() or 0) <= 91500:
        return False
    several = min(query.shape[1], key.shape[1]) > 1
    return several and torch.cuda.get_device_capability(query.device)[0] in (9, 10)
