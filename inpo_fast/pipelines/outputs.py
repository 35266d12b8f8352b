"""What `Inversion.edit` and `Inversion.reconstruct` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class EditOutput(BaseOutput):  # type: ignore[misc]
    """Edited images.

    Attributes:
        images: as `output_type` asks: PIL images, [B, H, W, 3] or [B, 3, H, W] in [0, 1], or
            latents.
        nsfw_content_detected: [B] what the pipeline's safety checker says, None without one.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


@dataclass
class ReconstructionOutput(BaseOutput):  # type: ignore[misc]
    """The images again.

    Attributes:
        images: see `EditOutput`.
        latents: [B, …] float32, what came back.
        bits_equal: whether the state that came back has the bits of the one that left.
        latent_error: largest difference between the two.
    """

    images: Any
    latents: Tensor
    bits_equal: bool
    latent_error: float
