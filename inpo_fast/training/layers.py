"""A UNet's norms and gates as fused kernels, in channels last.

Under autocast torch computes a norm in float32, writes float32, reads it for the activation, writes
that, and reads it again to round it for the next product. Here one kernel does it and rounds at the
same place. No graph is compiled, so nothing waits for a compiler, and policy and reference, with
and without gradient, run the same kernels and have the same bits. Where there are no kernels, off
the GPU or in float64, torch's own layers compute: a pipeline that was trained goes anywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..ops.triton import INTERPRETED, on_device_of
from . import layer_kernels as kernels


def fuse(model: nn.Module, *, channels_last: bool = True) -> int:
    """Let a diffusers UNet use the kernels; its weights, and their names, stay.

    Args:
        model: changed in place.
        channels_last: whether to lay out the weights of convolutions in that way, too.

    Returns:
        how many modules use them.
    """
    for module in model.modules():
        rule = _FUSED.get(type(module))
        if rule is not None and rule[1](module):
            module.__class__ = rule[0]
    if isinstance(model, UNet2DConditionModel) and _ends_with_activation(model):
        model.conv_norm_out.__class__ = FusedGroupNormActivation
        model.conv_act = nn.Identity()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = tuple(kind for kind, _ in _FUSED.values())
    return sum(isinstance(module, fused) for module in model.modules())


class FusedGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of [N, C, …], images as a rule, followed by SiLU where `activated`."""

    def forward(self, input: Tensor, activated: bool = False) -> Tensor:
        if not _has_kernels(input):
            y = super().forward(input)
            return functional.silu(y) if activated else y
        _check_channels(input.shape[1], self.num_channels)
        given = (input, self.weight, self.bias, self.num_groups, self.eps, activated)
        return _apply(_GroupNorm, *given)


class FusedGroupNormActivation(FusedGroupNorm):
    """`torch.nn.GroupNorm` and SiLU."""

    def forward(self, input: Tensor, activated: bool = True) -> Tensor:
        return super().forward(input, activated)


class FusedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if not _has_kernels(input):
            return super().forward(input)
        _check_channels(input.shape[-1], self.normalized_shape[0])
        return _apply(_LayerNorm, input, self.weight, self.bias, self.eps)


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU (Shazeer 2020)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projected = self.proj(hidden_states)
        if _has_kernels(projected):
            return _apply(_Gate, projected)
        value, gate = projected.chunk(2, dim=-1)
        y: Tensor = value * self.gelu(gate)
        return y


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """diffusers' residual block, with SiLU in the kernels of its norms."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.conv1(self.norm1(input_tensor, activated=True))
        hidden = hidden + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden, activated=True)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        y: Tensor = (input_tensor + hidden) / self.output_scale_factor
        return y


class FusedTransformer(Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer of images; its output stays in channels last."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        y: Tensor = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        projected: Tensor = y if self.use_linear_projection else self.proj_out(y)
        return residual + projected


def _ends_with_activation(unet: Any) -> bool:
    """Whether a UNet's last norm can be rounded after its activation only."""
    return type(unet.conv_norm_out) is FusedGroupNorm and isinstance(unet.conv_act, nn.SiLU)


def _plain_resnet(module: Any) -> bool:
    """Whether a block is of the kind that Stable Diffusion's UNets have."""
    return bool(
        module.upsample is None
        and module.downsample is None
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and not module.skip_time_act
        and isinstance(module.nonlinearity, nn.SiLU)
        and all(
            type(norm) in (nn.GroupNorm, FusedGroupNorm) and norm.affine
            for norm in (module.norm1, module.norm2)
        )
    )


_FUSED: dict[type[nn.Module], tuple[type[nn.Module], Any]] = {
    nn.GroupNorm: (FusedGroupNorm, lambda module: module.affine),
    nn.LayerNorm: (
        FusedLayerNorm,
        lambda module: module.bias is not None and len(module.normalized_shape) == 1,
    ),
    GEGLU: (FusedGEGLU, lambda module: True),
    ResnetBlock2D: (FusedResnetBlock, _plain_resnet),
    Transformer2DModel: (FusedTransformer, lambda module: module.is_input_continuous),
}
"""By the exact class: what it becomes, and where it can."""

# FSDP2's wrapping, accelerate's and `policy.shard`, looks for blocks by the names of their classes.
for _stock, (_fused, _) in _FUSED.items():
    _fused.__name__ = _stock.__name__
FusedGroupNormActivation.__name__ = nn.GroupNorm.__name__


def _output_dtype(x: Tensor) -> torch.dtype:
    """What the next product under autocast reads."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == ("cpu" if INTERPRETED else "cuda") and x.dtype != torch.float64


def _check_channels(given: int, wanted: int) -> None:
    """The kernels would read beyond the end of the weights."""
    if given != wanted:
        raise ValueError(f"input must have {wanted} channels, got {given}")


def _pixels(image: Tensor) -> Tensor:
    """[N, C, …] as [N, P, C], without a copy where it lies in channels last."""
    samples, channels, *size = image.shape
    return image.reshape(samples, channels, math.prod(size)).transpose(1, 2).contiguous()


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """[N, P, C] as [N, C, …], in channels last."""
    return pixels.transpose(1, 2).reshape(like.shape)


def _rows(x: Tensor) -> Tensor:
    """[…, W] as [R, W]."""
    return x.contiguous().view(-1, x.shape[-1])


def _apply(function: Any, x: Tensor, *given: Any) -> Tensor:
    with on_device_of(x):
        y: Tensor = function.apply(x, *given)
    return y


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        activated: bool,
    ) -> Tensor:
        x = _pixels(image)
        y, moments = kernels.group_norm(
            x, weight, bias, groups, eps, activated=activated, dtype=_output_dtype(image)
        )
        ctx.save_for_backward(x, moments, weight, bias)
        ctx.activated = activated
        return _image(y, image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = kernels.group_norm_backward(
            *(x, _pixels(dy), moments, weight, bias),
            activated=ctx.activated,
            affine=any(ctx.needs_input_grad[1:3]),
        )
        return _image(dx, dy), dweight, dbias, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = _rows(input)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = kernels.layer_norm(x, weight, bias, eps, dtype=_output_dtype(input))
        return y.view(input.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = kernels.layer_norm_backward(
            x, _rows(dy), weight, ctx.eps, affine=any(ctx.needs_input_grad[1:3])
        )
        return dx.view(dy.shape), dweight, dbias, None


class _Gate(torch.autograd.Function):
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
