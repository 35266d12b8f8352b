"""Validation images: the same prompts and seeds every time, whatever the training has drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import write_picture
from .config import PreferenceConfig
from .models import Model, pipeline_class


@torch.no_grad()
def draw_images(config: PreferenceConfig, model: Model, policy: Any, dtype: torch.dtype) -> Any:
    """[N, H, W, 3] uint8 images of all validation prompts by the policy.

    Image k of prompt p has the seed `config.seed + k`, on the CPU. All processes must call it,
    since the policy may be sharded; they draw the same.

    Args:
        policy: unwrapped.
        dtype: of the model calls.
    """
    pipeline = _pipeline(config, model, policy, dtype)
    pipeline.set_progress_bar_config(disable=True)
    device = next(policy.parameters()).device
    images = []
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with _all_on(pipeline, device), autocast, _decoding_as_it_is(pipeline.vae, device):
        for prompt in config.validation_prompts:
            seeds = range(config.seed, config.seed + config.num_validation_images)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = pipeline(
                [prompt] * len(generators),
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.validation_guidance_scale,
                generator=generators,
                height=config.resolution,
                width=config.resolution,
                output_type="np",
            ).images
            images.append(np.rint(np.asarray(drawn, dtype=np.float64) * 255).astype(np.uint8))
    return np.concatenate(images)


@contextlib.contextmanager
def _all_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """The parts of a pipeline on a device; those that were elsewhere, in the caller's pipeline, go
    back there."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    away = [(part, place) for part in parts if (place := _place(part)) not in (None, device)]
    try:
        for part, _ in away:
            part.to(device)
        yield
    finally:
        for part, place in away:
            part.to(place)


def _place(module: nn.Module) -> torch.device | None:
    first = next(module.parameters(), None)
    return None if first is None else first.device


@contextlib.contextmanager
def _decoding_as_it_is(vae: Any, device: torch.device) -> Iterator[None]:
    """The autoencoder decodes in its own dtype, not in autocast's: SDXL's overflows in float16, for
    which its pipeline has made it float32."""
    decode = vae.decode

    def decode_alone(latents: Tensor, *given: Any, **options: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return decode(latents.to(vae.dtype), *given, **options)

    vae.decode = decode_alone
    try:
        yield
    finally:
        del vae.decode


def _pipeline(config: PreferenceConfig, model: Model, policy: Any, dtype: torch.dtype) -> Any:
    kind, component = pipeline_class(model.pipeline), model.family.component
    if model.loaded is not None:
        parts = {**model.loaded.components, component: policy}
        # the loaded pipeline's own scheduler would keep the state of this sampling
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        return kind(**parts)
    # training holds neither text encoders nor autoencoder; they come and go with the validation
    extra: dict[str, Any] = {}
    if config.pretrained_vae_model_name_or_path is not None:
        from diffusers import AutoencoderKL

        vae = config.pretrained_vae_model_name_or_path
        extra["vae"] = AutoencoderKL.from_pretrained(vae, dtype=dtype)
    if model.pipeline == "StableDiffusionPipeline":
        extra["safety_checker"] = None
    pipeline = kind.from_pretrained(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=dtype,
        **{component: policy},
        **extra,
    )
    return pipeline.to(next(policy.parameters()).device)


def keep_images(accelerator: Any, config: PreferenceConfig, images: Any, step: int) -> None:
    """Write images to `validation/<step>-<prompt>-<image>.png` in the output folder, and send them
    to the trackers that show them."""
    count = config.num_validation_images
    captions = [prompt for prompt in config.validation_prompts for _ in range(count)]
    if accelerator.is_main_process:
        from PIL import Image

        folder = Path(config.output_dir) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            path = folder / f"{step:06d}-{number // count}-{number % count}.png"
            write_picture(path, Image.fromarray(image))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", images, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            shown = [wandb.Image(i, caption=c) for i, c in zip(images, captions, strict=True)]
            tracker.log({"validation": shown}, step=step)
