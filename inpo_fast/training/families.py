"""The model families: what a pipeline's text encoders return, where it keeps its denoiser, and how
the denoiser is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..schedule import NoiseSchedule
from .images import FACTOR, Size
from .latents import training_schedule

Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, "Conditioning"], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside x_t and t, for every sample of a batch.

    Attributes:
        text: [B, …] by the name that diffusers' pipelines give it.
        time_ids: [B, 6] SDXL's sizes and crops, or None.
        guidance: of FLUX's embedding.
    """

    text: Mapping[str, Tensor]
    time_ids: Tensor | None = None
    guidance: float = 3.5


@dataclass(frozen=True)
class Family:
    """Pipelines that are encoded and trained in the same way.

    Attributes:
        outputs: names of the conditioning, and where `encode_prompt` returns them.
        arguments: of `encode_prompt`.
        component: of the pipeline that is trained, `unet` or `transformer`.
        predict: calls it on [B, C, h, w] x_t with [B] times.
        blocks: class names of its repeated blocks, which `compile=blocks` compiles.
        full: whether all weights can be trained; else only a LoRA.
        patch: latents along a side of a token; height and width must be multiples of it.
        time_ids: whether the denoiser is told sizes and crops.
    """

    outputs: Mapping[str, int]
    arguments: Mapping[str, Any]
    component: str
    predict: Predict
    blocks: tuple[str, ...]
    full: bool
    patch: int = 1
    time_ids: bool = False


def _unet(model: nn.Module, latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
    output: Tensor = model(latents, times, given.text["prompt_embeds"], return_dict=False)[0]
    return output


def _unet_xl(model: nn.Module, latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
    added = {"text_embeds": given.text["pooled_prompt_embeds"], "time_ids": given.time_ids}
    output: Tensor = model(
        latents,
        times,
        given.text["prompt_embeds"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output


def _sd3(model: nn.Module, latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
    output: Tensor = model(
        hidden_states=latents,
        timestep=times,
        encoder_hidden_states=given.text["prompt_embeds"],
        pooled_projections=given.text["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return output


def _flux(model: nn.Module, latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
    batch, channels, height, width = latents.shape
    text = given.text["prompt_embeds"]
    # FLUX sees patches of 2 × 2 as one token, [B, h/2·w/2, 4C]
    rows, columns = height // 2, width // 2
    patches = latents.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    output: Tensor = model(
        hidden_states=patches.reshape(batch, rows * columns, channels * 4),
        timestep=times / 1000,
        guidance=latents.new_full((batch,), given.guidance) if _has_guidance(model) else None,
        encoder_hidden_states=text,
        pooled_projections=given.text["pooled_prompt_embeds"],
        txt_ids=latents.new_zeros(text.shape[1], 3),
        img_ids=_positions(rows, columns, latents),
        return_dict=False,
    )[0]
    patches = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, height, width)


def _has_guidance(model: nn.Module) -> bool:
    inner: Any = getattr(model, "module", model)
    has: bool = inner.config.guidance_embeds
    return has


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows·columns, 3] row and column of every token."""
    row = torch.arange(rows, device=like.device, dtype=like.dtype)
    column = torch.arange(columns, device=like.device, dtype=like.dtype)
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


_ONCE = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
_UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(
        outputs={"prompt_embeds": 0},
        arguments=_ONCE,
        component="unet",
        predict=_unet,
        blocks=_UNET_BLOCKS,
        full=True,
    ),
    "StableDiffusionXLPipeline": Family(
        outputs={"prompt_embeds": 0, "pooled_prompt_embeds": 2},
        arguments=_ONCE,
        component="unet",
        predict=_unet_xl,
        blocks=_UNET_BLOCKS,
        full=True,
        time_ids=True,
    ),
    "StableDiffusion3Pipeline": Family(
        outputs={"prompt_embeds": 0, "pooled_prompt_embeds": 2},
        arguments={"prompt_2": None, "prompt_3": None, **_ONCE},
        component="transformer",
        predict=_sd3,
        blocks=("JointTransformerBlock",),
        full=False,
        patch=2,
    ),
    "FluxPipeline": Family(
        outputs={"prompt_embeds": 0, "pooled_prompt_embeds": 1},
        arguments={"prompt_2": None},
        component="transformer",
        predict=_flux,
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        full=False,
        patch=2,
    ),
}
"""By the pipeline's class, as in model_index.json."""

_FLUX_SAMPLE_SIZE = 128
"""FLUX's config names no size; its pipeline draws 1024² by default."""


def own_resolution(config: Mapping[str, Any]) -> int:
    """Pixels along a side that a denoiser of this config was made for.

    Raises:
        ValueError: the config does not say.
    """
    size = config.get("sample_size", _FLUX_SAMPLE_SIZE)
    if size is None:
        raise ValueError("the denoiser's config has no sample_size")
    return FACTOR * (size if isinstance(size, int) else size[0])


def check_sizes(pipeline: str, sizes: Iterable[Size]) -> None:
    """Refuse heights and widths in pixels that the patches of a denoiser do not cover.

    Raises:
        ValueError: naming the pipeline's class, a key of `FAMILIES`.
    """
    factor = FACTOR * FAMILIES[pipeline].patch
    if wrong := [size for size in sizes if any(side % factor for side in size)]:
        raise ValueError(
            f"resolution and aspect_ratio_buckets must be multiples of {factor} for a {pipeline}, "
            f"got {', '.join(f'{height},{width}' for height, width in wrong)}"
        )


def schedule_of(scheduler: Any, sizes: Iterable[Size]) -> NoiseSchedule:
    """The training schedule for images of these heights and widths in pixels.

    With FLUX's shift k = e^μ, where the scheduler has it: μ is linear in the number of tokens, each
    of 2 × 2 latents.

    Raises:
        TypeError, ValueError: a scheduler that cannot be trained on, or sizes with several shifts.
    """
    config = scheduler.config
    if not getattr(config, "use_dynamic_shifting", False):
        return training_schedule(scheduler)
    counts = {size: math.prod(side // FACTOR // 2 for side in size) for size in sizes}
    tokens, *others = set(counts.values())
    if others:
        listed = "; ".join(f"{high},{wide} ({n} tokens)" for (high, wide), n in counts.items())
        raise ValueError(
            f"{type(scheduler).__name__} shifts the noise by the number of tokens, for which "
            f"aspect_ratio_buckets must all have one area, got {listed}"
        )
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    mu = config.base_shift + slope * (tokens - low)
    total = config.num_train_timesteps
    return NoiseSchedule.flow(total, shift=math.exp(mu), num_train_timesteps=total)
