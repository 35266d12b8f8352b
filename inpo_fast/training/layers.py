"""A UNet's norms, gates and sums as fused kernels, in channels last.

Under autocast torch computes a norm in float32, writes float32, reads it for the activation, writes
that, and reads it again to round it for the next product. Here one kernel does it and rounds at the
same place. Biases of convolutions, the time embedding and residual sums, for which torch reads and
writes whole images, are left to the kernel that reads the image next, which does not round what
torch rounds between them. No graph is compiled, so nothing waits for a compiler, and policy and
reference, with and without gradient, run the same kernels and have the same bits. Where there are
no kernels, off the GPU or in float64, torch's own layers compute: a pipeline that was trained goes
anywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..ops.triton import INTERPRETED
from ..ops.triton_launch import on_device_of
from . import layer_launch as kernels


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
    """`torch.nn.GroupNorm` of [N, C, …], images as a rule.

    A `shift` [N, C] is added to every pixel before, and SiLU follows where `activated`.
    """

    def forward(
        self, input: Tensor, activated: bool = False, shift: Tensor | None = None
    ) -> Tensor:
        if not _has_kernels(input):
            if shift is not None:
                input = input + shift.reshape(*shift.shape, *[1] * (input.ndim - 2))
            y = super().forward(input)
            return functional.silu(y) if activated else y
        _check_channels(input.shape[1], self.num_channels)
        shift = None if shift is None else shift.float().contiguous()
        given = (shift, self.weight, self.bias, self.num_groups, self.eps, activated)
        return _apply(_GroupNorm, input, *given)


class FusedGroupNormActivation(FusedGroupNorm):
    """`torch.nn.GroupNorm` and SiLU."""

    def forward(self, input: Tensor, activated: bool = True, shift: Tensor | None = None) -> Tensor:
        return super().forward(input, activated, shift)


class FusedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if not _has_kernels(input):
            return super().forward(input)
        _check_channels(input.shape[-1], self.normalized_shape[0])
        return _apply(_LayerNorm, input, self.weight, self.bias, self.eps)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, and its norm."""
        if not _has_kernels(input):
            total = input + residual
            return total, super().forward(total)
        _check_channels(input.shape[-1], self.normalized_shape[0])
        total, y = _apply(_SumLayerNorm, input, residual, self.weight, self.bias, self.eps)
        return total, y


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU (Shazeer 2020)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _has_kernels(hidden_states):
            y: Tensor = super().forward(hidden_states, *args, **kwargs)
            return y
        return _apply(_Gate, self.proj(hidden_states))


class FusedAttention(Attention):  # type: ignore[misc]
    """diffusers' attention, without its division by a factor of 1."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plain = type(self.processor) is AttnProcessor2_0 and hidden_states.ndim == 3
        if kwargs or attention_mask is not None or not plain:
            given = (hidden_states, encoder_hidden_states, attention_mask)
            y: Tensor = super().forward(*given, **kwargs)
            return y
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(hidden_states), self.to_k(text), self.to_v(text))
        )
        y = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            y = layer(y)
        return y


class FusedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """diffusers' transformer block, with the residual sums in the kernels of its norms."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs or self._chunk_size is not None:
            y: Tensor = super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return y
        own = encoder_hidden_states if self.only_cross_attention else None
        hidden = self.attn1(self.norm1(hidden_states), own, attention_mask)
        total, hidden = self.norm2.add(hidden, hidden_states)
        hidden = self.attn2(hidden, encoder_hidden_states, encoder_attention_mask)
        total, hidden = self.norm3.add(hidden, total)
        y = self.ff(hidden) + total
        return y


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """diffusers' residual block, with all between its convolutions in the kernels of its norms."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            y: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return y
        hidden, bias = _convolved(self.conv1, self.norm1(input_tensor, activated=True))
        shift = self.time_emb_proj(functional.silu(temb))
        shift = shift if bias is None else shift.float() + bias
        hidden = self.dropout(self.norm2(hidden, activated=True, shift=shift))
        hidden, bias = _convolved(self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = _pointwise(self.conv_shortcut, input_tensor)
        if bias is None:
            y = input_tensor + hidden
        else:
            y = _apply(_BiasedSum, input_tensor, hidden, bias)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor


class FusedTransformer(Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer of images, whose images stay in channels last."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        hidden_states = self.norm(hidden_states)
        if self.use_linear_projection:
            hidden = self.proj_in(_pixels(hidden_states))
        else:
            hidden = _pixels(_pointwise(self.proj_in, hidden_states))
        return hidden, hidden.shape[-1]

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
        projected: Tensor = y if self.use_linear_projection else _pointwise(self.proj_out, y)
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


def _plain_norm(module: Any) -> bool:
    """Whether a layer norm is of the last dimension, with weight and bias."""
    return module.bias is not None and len(module.normalized_shape) == 1


def _plain_attention(module: Any) -> bool:
    """Whether attention is between three projections and one, and nothing else."""
    nothing = (module.group_norm, module.spatial_norm, module.norm_q, module.norm_k)
    return bool(
        all(part is None for part in (*nothing, module.norm_cross, module.add_k_proj))
        and module.rescale_output_factor == 1
        and not module.residual_connection
        and module.to_out is not None
    )


def _plain_transformer(module: Any) -> bool:
    """Whether a block is of the kind that Stable Diffusion's UNets have."""
    return bool(
        module.norm_type == "layer_norm"
        and module.attn2 is not None
        and module.pos_embed is None
        and not hasattr(module, "fuser")
        and all(
            type(norm) in (nn.LayerNorm, FusedLayerNorm) and _plain_norm(norm)
            for norm in (module.norm2, module.norm3)
        )
    )


_FUSED: dict[type[nn.Module], tuple[type[nn.Module], Any]] = {
    nn.GroupNorm: (FusedGroupNorm, lambda module: module.affine),
    nn.LayerNorm: (FusedLayerNorm, _plain_norm),
    GEGLU: (FusedGEGLU, lambda module: True),
    Attention: (FusedAttention, _plain_attention),
    BasicTransformerBlock: (FusedTransformerBlock, _plain_transformer),
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


def _is_bare(conv: nn.Module) -> bool:
    """Whether to call a module is to convolve, and nothing else: no adapter, offloading or hook."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and "forward" not in vars(conv)
        and not conv._forward_hooks
        and not conv._forward_pre_hooks
        and not conv._backward_hooks
        and not conv._backward_pre_hooks
    )


def _convolved(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution of an image, and the bias if it was left out.

    The bias is rounded as autocast does it: a reference has it in 16 bit, a policy in float32.
    """
    y: Tensor
    if not _has_kernels(x) or not _is_bare(conv) or conv.bias is None:
        y = conv(x)
        return y, None
    y = functional.conv2d(
        x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return y, conv.bias.to(y.dtype)


def _pointwise(conv: Any, image: Tensor) -> Tensor:
    """A convolution of single pixels, as a product that adds the bias."""
    y: Tensor
    single = _is_bare(conv) and conv.kernel_size == conv.stride == (1, 1)
    if not _has_kernels(image) or not single or conv.padding not in ((0, 0), 0) or conv.groups > 1:
        y = conv(image)
        return y
    y = functional.linear(_pixels(image), conv.weight.flatten(1), conv.bias)
    y = y.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)
    return y


class _GroupNorm(torch.autograd.Function):
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
        x = _pixels(image)
        y, moments = kernels.group_norm(
            *(x, shift, weight, bias, groups, eps),
            activated=activated,
            dtype=_output_dtype(image),
        )
        ctx.save_for_backward(x, shift, moments, weight, bias)
        ctx.activated = activated
        return _image(y, image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, moments, weight, bias = ctx.saved_tensors
        dx, *others = kernels.group_norm_backward(
            *(x, _pixels(dy), shift, moments, weight, bias),
            activated=ctx.activated,
            affine=any(ctx.needs_input_grad[2:4]),
        )
        return _image(dx, dy), *others, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = _rows(input)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y, _ = kernels.layer_norm(x, None, weight, bias, eps, dtype=_output_dtype(input))
        return y.view(input.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = kernels.layer_norm_backward(
            x, _rows(dy), None, weight, ctx.eps, affine=any(ctx.needs_input_grad[1:3])
        )
        return dx.view(dy.shape), dweight, dbias, None


class _SumLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, total = kernels.layer_norm(
            *(_rows(input), _rows(residual), weight, bias, eps), dtype=_output_dtype(input)
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


class _BiasedSum(torch.autograd.Function):
    """x + y + b of images x and y, with b for every channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtypes = (x.dtype, y.dtype, bias.dtype)
        return _image(kernels.biased_sum(_pixels(x), _pixels(y), bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        first, second, last = ctx.dtypes
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = _pixels(dtotal).sum((0, 1), dtype=torch.float32).to(last)
        return dtotal.to(first), dtotal.to(second), dbias


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
