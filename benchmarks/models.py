# SPDX-License-Identifier: Apache-2.0
"""Denoisers of the real architectures with random weights: speed and exactness need no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Multiplications and additions of one forward pass of one sample.
TERAFLOPS = {"sd15": 0.803, "sdxl": 6.761}

_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
# The same interfaces in milliseconds on a CPU, to find out whether a benchmark runs.
_CONFIGS["sd15-small"] = _SMALL
_CONFIGS["sdxl-small"] = {
    **_SMALL,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}
_PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


@dataclass
class Denoiser:
    """A UNet with conditioning for a batch bound to it: a model for the sampler."""

    unet: nn.Module
    text: Tensor  # [B, 77, D]
    added: dict[str, Tensor] | None  # SDXL: text_embeds [B, 1280], time_ids [B, 6]

    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.unet(
            sample, timestep, self.text, added_cond_kwargs=self.added, return_dict=False
        )[0]
        return output

    def to(self, dtype: torch.dtype, unet: nn.Module) -> Denoiser:
        """The same conditioning in another dtype, for another UNet."""
        added = None
        if self.added is not None:
            added = {name: value.to(dtype) for name, value in self.added.items()}
        return Denoiser(unet, self.text.to(dtype), added)

    def rows(self, rows: slice) -> Denoiser:
        """The same UNet with the conditioning of a part of the batch."""
        added = None
        if self.added is not None:
            added = {name: value[rows] for name, value in self.added.items()}
        return Denoiser(self.unet, self.text[rows], added)


def unet(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Return the UNet of Stable Diffusion 1.5 ("sd15") or XL ("sdxl"), channels last.

    "sd15-small" and "sdxl-small" are called in the same way.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = UNet2DConditionModel(**_CONFIGS[name])
    finally:
        torch.set_default_dtype(before)
    count = sum(p.numel() for p in made.parameters())
    if count != _PARAMETERS.get(name, count):
        raise AssertionError(f"{name} must have {_PARAMETERS[name]} parameters, has {count}")
    return made.to(memory_format=torch.channels_last).eval().requires_grad_(False)


class Inputs(NamedTuple):
    """What a denoiser is given, float32."""

    latents: Tensor  # [B, 4, h, w]
    text: Tensor  # [B, 77, D]
    added: dict[str, Tensor] | None  # SDXL: text_embeds [B, D], time_ids [B, 6]


def inputs(name: str, batch: int, device: str = "cpu") -> Inputs:
    """Return standard normal inputs for a batch, and SDXL's sizes of uncropped images."""
    config = _CONFIGS[name]
    rng = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    text = draw(batch, 77, config["cross_attention_dim"])
    added = None
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= 6 * config["addition_time_embed_dim"]
        side = 8 * config["sample_size"]
        size = torch.tensor([side, side, 0, 0, side, side], device=device, dtype=torch.float32)
        added = {"text_embeds": draw(batch, pooled), "time_ids": size.repeat(batch, 1)}
    return Inputs(latents(name, batch, device), text, added)


def denoiser(name: str, batch: int, device: str, dtype: torch.dtype) -> Denoiser:
    """Return a denoiser for a batch, guidance halves counted."""
    given = inputs(name, batch, device)
    made = Denoiser(unet(name, device, dtype), given.text, given.added)
    return made.to(dtype, made.unet)


def latents(name: str, batch: int, device: str) -> Tensor:
    """Return standard normal latents [batch, 4, h, w], float32."""
    size = _CONFIGS[name]["sample_size"]
    rng = torch.Generator(device).manual_seed(2)
    return torch.randn(batch, 4, size, size, generator=rng, device=device)
