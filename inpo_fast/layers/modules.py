"""A UNet's norms, gates, sums and attention as fused kernels, in channels last.

Under autocast torch computes a norm in float32, writes float32, reads it for the activation, writes
that, and reads it again to round it for the next product. Here one kernel does it and rounds at the
same place. Biases of convolutions, the time embedding and residual sums, for which torch reads and
writes whole images, are left to the kernel that reads the image next, which does not round what
torch rounds between them. No graph is compiled, so nothing waits for a compiler, in training and
in sampling, and policy and reference, with and without gradient, run the same kernels and have the
same bits. Where there are no kernels, off the GPU, in float64 or under torch.compile, torch's own
layers compute: a pipeline that was trained goes anywhere. Modules that get hooks later, of
offloading say, are called with them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from . import functions
from .attention import attention


def fuse_layers(model: nn.Module, *, channels_last: bool = True) -> int:
    """Let a diffusers UNet compute its norms, gates, sums and attention by the kernels.

    With it, a sampler that only captures (`Sampler(compile="graph")`, `invert(compile="graph")`) is
    about as fast as a compiled one, and waits for no compiler. The same weights then give other
    bits, so an inversion of the one model is refused by the other. Layers are not unfused again.

    It is faster still with diffusers' `model.fuse_qkv_projections()`, before or after, which copies
    the weights of these products (1.2 GiB of SDXL): what is merged into them later is not seen.

    Args:
        model: changed in place; its weights, and their names, stay. Adapters may be there before or
            come later; offloading, and hooks, later.
        channels_last: whether to lay out the weights of convolutions in that way, too.

    Returns:
        how many modules use the kernels; 0, and nothing is changed, where none fits.

    Raises:
        ValueError: naming a module that is offloaded, or has hooks. (They keep its `forward`, which
            the kernels would replace.)
    """
    fitting = []
    for name, module in model.named_modules():
        rule = _FUSED.get(type(module))
        if rule is not None and rule[1](module):
            if not _is_bare(module):
                raise ValueError(
                    f"fuse_layers must come before hooks and offloading, and {name or 'model'} has "
                    "them (or had: accelerate keeps its forward)"
                )
            fitting.append((module, rule[0]))
    for module, kind in fitting:
        module.__class__ = kind
    if isinstance(model, UNet2DConditionModel) and _ends_with_activation(model):
        model.conv_norm_out.__class__ = FusedGroupNormActivation
        model.conv_act = nn.Identity()
    kinds = tuple(kind for kind, _ in _FUSED.values())
    count = sum(isinstance(module, kinds) for module in model.modules())
    if channels_last and count:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return count


class FusedGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of [N, C, …], images as a rule.

    A `shift` [N, C] or [1, C] is added to every pixel before, and SiLU follows where `activated`.
    """

    def forward(
        self, input: Tensor, activated: bool = False, shift: Tensor | None = None
    ) -> Tensor:
        if not functions.has_kernels(input, self.weight):
            if shift is not None:
                input = input + shift.reshape(*shift.shape, *[1] * (input.ndim - 2))
            y = super().forward(input)
            return functional.silu(y) if activated else y
        _check_channels(input.shape[1], self.num_channels)
        if shift is not None:
            shift = shift.expand(input.shape[:2]).contiguous()
        given = (shift, self.weight, self.bias, self.num_groups, self.eps, activated)
        return functions.apply(functions.GroupNorm, input, *given)


class FusedGroupNormActivation(FusedGroupNorm):
    """`torch.nn.GroupNorm` and SiLU."""

    def forward(self, input: Tensor, activated: bool = True, shift: Tensor | None = None) -> Tensor:
        return super().forward(input, activated, shift)


class FusedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if not functions.has_kernels(input, self.weight):
            return super().forward(input)
        _check_channels(input.shape[-1], self.normalized_shape[0])
        return functions.apply(functions.LayerNorm, input, self.weight, self.bias, self.eps)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, and its norm."""
        _check_shape(input, residual)
        if not functions.has_kernels(input, self.weight):
            total = input + residual
            return total, super().forward(total)
        _check_channels(input.shape[-1], self.normalized_shape[0])
        given = (residual, self.weight, self.bias, self.eps)
        total, y = functions.apply(functions.SumLayerNorm, input, *given)
        return total, y


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU (Shazeer 2020)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not functions.has_kernels(hidden_states):
            y: Tensor = super().forward(hidden_states, *args, **kwargs)
            return y
        return functions.apply(functions.Gate, self.proj(hidden_states))


class FusedAttention(Attention):  # type: ignore[misc]
    """diffusers' attention by `attention`, without its division by a factor of 1."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plain = type(self.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0)
        if kwargs or attention_mask is not None or not plain or hidden_states.ndim != 3:
            given = (hidden_states, encoder_hidden_states, attention_mask)
            y: Tensor = super().forward(*given, **kwargs)
            return y
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in self._project(hidden_states, encoder_hidden_states)
        )
        y = attention(query, key, value).flatten(2)
        for layer in self.to_out:
            y = layer(y)
        return y

    def _project(self, hidden_states: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value, by one product where `fuse_qkv_projections` was asked for it.

        Not where adapters came since, which it would leave out.
        """
        copied = (self.to_q, self.to_k, self.to_v) if text is None else (self.to_k, self.to_v)
        plain = all(type(layer) is nn.Linear for layer in copied)
        if type(self.processor) is AttnProcessor2_0 or not plain:
            text = hidden_states if text is None else text
            return self.to_q(hidden_states), self.to_k(text), self.to_v(text)
        if text is None:
            together: Tensor = self.to_qkv(hidden_states)
            return together.chunk(3, dim=-1)
        return self.to_q(hidden_states), *self.to_kv(text).chunk(2, dim=-1)


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
        total, hidden = _added(self.norm2, hidden, hidden_states)
        hidden = self.attn2(hidden, encoder_hidden_states, encoder_attention_mask)
        total, hidden = _added(self.norm3, hidden, total)
        y = self.ff(hidden) + total
        return y


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """diffusers' residual block, with all between its convolutions in the kernels of its norms."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            y: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return y
        hidden, bias = _convolved(self.conv1, self.norm1(input_tensor, activated=True))
        # rounded with the bias, where torch rounds the image with the bias, and the sum of both
        shift = self.time_emb_proj(functional.silu(temb))
        shift = shift if bias is None else shift + bias
        hidden = self.dropout(self.norm2(hidden, activated=True, shift=shift))
        hidden, bias = _convolved(self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = _pointwise(self.conv_shortcut, input_tensor)
        if bias is None:
            y = input_tensor + hidden
        else:
            _check_shape(hidden, input_tensor)
            y = functions.apply(functions.BiasedSum, input_tensor, hidden, bias)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor


class FusedTransformer(Transformer2DModel):  # type: ignore[misc]
    """diffusers' transformer of images, whose images stay in channels last."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        hidden_states = self.norm(hidden_states)
        if self.use_linear_projection:
            hidden = self.proj_in(functions.pixels(hidden_states))
        else:
            hidden = functions.pixels(_pointwise(self.proj_in, hidden_states))
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
            type(norm) in (nn.GroupNorm, FusedGroupNorm) and _plain_group_norm(norm)
            for norm in (module.norm1, module.norm2)
        )
    )


def _plain_group_norm(module: Any) -> bool:
    """Whether a group norm has weight and bias."""
    return module.weight is not None and module.bias is not None


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
    nn.GroupNorm: (FusedGroupNorm, _plain_group_norm),
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
    # for whoever compares models, whose bits they change
    _fused.is_fused = True  # type: ignore[attr-defined]
FusedGroupNormActivation.__name__ = nn.GroupNorm.__name__


def _check_channels(given: int, wanted: int) -> None:
    """The kernels would read beyond the end of the weights."""
    if given != wanted:
        raise ValueError(f"input must have {wanted} channels, got {given}")


def _check_shape(x: Tensor, residual: Tensor) -> None:
    """The kernels would read beyond the end of the smaller one."""
    if x.shape != residual.shape:
        raise ValueError(
            f"a sum with a residual of shape {tuple(residual.shape)} needs that shape, "
            f"got {tuple(x.shape)}"
        )


def _is_bare(module: nn.Module) -> bool:
    """Whether to call a module is to compute what its class does: no offloading and no hook."""
    return (
        "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _is_bare_conv(conv: nn.Module) -> bool:
    """Whether to call a module is to convolve, and nothing else.

    An adapter has another class. Where the policy has one, its reference, which has none, says so
    (`policy.lora`): both are called, and convolve in the same way.
    """
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and "beside_adapter" not in vars(conv)
        and _is_bare(conv)
    )


def _added(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm."""
    if isinstance(norm, FusedLayerNorm) and _is_bare(norm):
        return norm.add(x, residual)
    total = x + residual
    return total, norm(total)


def _convolved(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution of an image, and the bias if it was left out.

    The bias is rounded as autocast does it: a reference has it in 16 bit, a policy in float32.
    """
    y: Tensor
    if not functions.has_kernels(x) or not _is_bare_conv(conv) or conv.bias is None:
        y = conv(x)
        return y, None
    y = functional.conv2d(
        x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return y, conv.bias.to(y.dtype)


def _pointwise(conv: Any, image: Tensor) -> Tensor:
    """A convolution of single pixels, as a product that adds the bias."""
    y: Tensor
    if not (
        functions.has_kernels(image)
        and _is_bare_conv(conv)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), 0)
        and conv.groups == 1
    ):
        y = conv(image)
        return y
    # in this order, so that the gradient lies as a weight in channels last does
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    y = functional.linear(functions.pixels(image), weight, conv.bias)
    y = y.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)
    return y
