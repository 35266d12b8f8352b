"""Load the shipped pipeline, draw scenes with it, and count the attributes it gets right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .reader import accuracy_by_kind, read_attributes
from .scenes import Scene, prompt

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def model_path() -> Path:
    """Return the folder of the shipped pipeline."""
    return Path(__file__).parent / "model"


def load_pipeline(
    path: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """Load the pipeline folder `path`, by default the shipped one, without network access."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        str(model_path() if path is None else path),
        dtype=dtype,
        local_files_only=True,
        safety_checker=None,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float = 3.0,
    steps: int = 50,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """Draw one image per prompt with DDIM.

    The start noise is drawn on the CPU for all prompts at once, so that an image depends on the
    seed, its index and the prompt, and neither on the device nor on `batch`.

    Returns:
        images [B, 3, 64, 64] float32 in [-1, 1] on the pipeline's device.
    """
    generator = torch.Generator().manual_seed(seed)
    size = pipe.unet.config.sample_size
    noise = torch.randn(len(prompts), pipe.unet.config.in_channels, size, size, generator=generator)
    images = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        output = pipe(
            list(prompts[part]),
            latents=noise[part].to(pipe.device, pipe.unet.dtype),
            guidance_scale=guidance,
            num_inference_steps=steps,
            output_type="pt",
        )
        images.append(output.images.float() * 2 - 1)
    return torch.cat(images)


def accuracy(
    pipe: StableDiffusionPipeline,
    scenes: Sequence[Scene],
    *,
    guidance: float = 3.0,
    steps: int = 50,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, float]:
    """Return the fraction of attributes right per kind and in "all", on canonical prompts."""
    prompts = [prompt(scene) for scene in scenes]
    images = sample(pipe, prompts, guidance=guidance, steps=steps, seed=seed, batch=batch)
    return accuracy_by_kind(read_attributes(images, scenes), scenes)
