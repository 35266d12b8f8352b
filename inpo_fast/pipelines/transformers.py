"""Adapters of the rectified-flow transformers: Stable Diffusion 3 and Flux."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampler import Model
from ..schedule import NoiseSchedule
from .adapter import Adapter, Conditioning, Request, Size
from .settings import one_or_each

_SHIFTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


class _FlowTransformer(Adapter):
    """What both families share: the transformer, its text arguments and the dynamic shift."""

    denoiser_name = "transformer"
    setting_options = frozenset({"max_sequence_length"})
    _shifts = _SHIFTS

    def check(self) -> None:
        """See `Adapter.check`."""
        super().check()
        scheduler = type(self.pipe.scheduler).__name__
        if "FlowMatch" not in scheduler:
            raise ValueError(
                f"pipe.scheduler must be a flow-matching scheduler for {self.pipeline_class}, got "
                f"{scheduler}; use FlowMatchEulerDiscreteScheduler"
            )
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise ValueError(
                "pipe.transformer must not cache between steps, which makes its output depend on "
                "earlier calls; call pipe.transformer.disable_cache()"
            )

    def tokens(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the transformer's tokens."""
        return size[0] // self.multiple, size[1] // self.multiple

    def _mu(self, size: Size) -> float | None:
        """Dynamic shift, linear in the number of tokens; None where the scheduler has none."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return None
        low, high, base, top = (config.get(k, v) for k, v in self._shifts.items())
        rows, columns = self.tokens(size)
        slope = (top - base) / (high - low)
        return float(rows * columns * slope + (base - slope * low))

    def schedule(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        size: Size,
    ) -> NoiseSchedule:
        """See `Adapter.schedule`."""
        return NoiseSchedule.from_diffusers(
            self.pipe.scheduler,
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            mu=self._mu(size),
        )


class StableDiffusion3(_FlowTransformer):
    """Stable Diffusion 3 and 3.5."""

    pipeline_class = "StableDiffusion3Pipeline"
    _shifts = _SHIFTS | {"max_shift": 1.16}
    prompt_options = Adapter.prompt_options | {
        "prompt_2",
        "prompt_3",
        "negative_prompt_2",
        "negative_prompt_3",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }
    setting_options = _FlowTransformer.setting_options | {"clip_skip"}

    @property
    def multiple(self) -> int:
        """See `Adapter.multiple`."""
        return int(self.pipe.vae_scale_factor * self.pipe.patch_size)

    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """See `Adapter.encode_prompt`."""
        options = request.options
        self.require_pooled(options)
        texts = {
            name: request.per_image(options.get(name))
            for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
        }
        embeddings = {
            f"{prefix}{kind}prompt_embeds": options.get(f"{prefix}{kind}prompt_embeds")
            for prefix in ("", "negative_")
            for kind in ("", "pooled_")
        }
        with self.text_lock():
            text, no_text, pooled, no_pooled = self.pipe.encode_prompt(
                prompt=request.prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=request.negative_prompt,
                clip_skip=options.get("clip_skip"),
                max_sequence_length=options.get("max_sequence_length", 256),
                **texts,
                **embeddings,
            )
        return Conditioning(
            self.pairs(
                guided, prompt_embeds=(text, no_text), pooled_prompt_embeds=(pooled, no_pooled)
            )
        )

    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """See `Adapter.model`."""
        transformer = self.denoiser
        text = conditioning.halves("prompt_embeds", guided)
        pooled = conditioning.halves("pooled_prompt_embeds", guided)

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = transformer(
                hidden_states=sample,
                timestep=timestep,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            return output

        return denoise


class Flux(_FlowTransformer):
    """Flux.1. `guidance_scale` is an embedding that the distilled transformer reads.

    Classifier-free guidance is `true_cfg_scale`, as in the pipeline. The latents are packed,
    [B, H·W/256, 64].
    """

    pipeline_class = "FluxPipeline"
    prompt_options = Adapter.prompt_options | {
        "prompt_2",
        "negative_prompt_2",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }
    setting_options = _FlowTransformer.setting_options | {"true_cfg_scale"}

    @property
    def default_guidance(self) -> float:
        """See `Adapter.default_guidance`."""
        return 3.5 if self.denoiser.config.guidance_embeds else 1.0

    @property
    def multiple(self) -> int:
        """See `Adapter.multiple`."""
        return int(self.pipe.vae_scale_factor * 2)

    def schedule(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        size: Size,
    ) -> NoiseSchedule:
        """See `Adapter.schedule`; like the pipeline, σ falls evenly from 1 before the shift."""
        own = getattr(self.pipe.scheduler.config, "use_flow_sigmas", False)
        even = sigmas is None and timesteps is None and not own
        if even and isinstance(num_inference_steps, int) and num_inference_steps > 0:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
            num_inference_steps = None
        return super().schedule(num_inference_steps, timesteps, sigmas, size)

    def guidance(self, request: Request) -> float | tuple[float, ...]:
        """See `Adapter.guidance`."""
        scale = request.options.get("true_cfg_scale", 1.0)
        return one_or_each("true_cfg_scale", scale, request.batch)

    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """See `Adapter.encode_prompt`."""
        options = request.options
        self.require_pooled(options)
        if request.has_negative and self.guidance(request) == 1:
            warnings.warn("negative_prompt has no effect without true_cfg_scale", stacklevel=4)
        pairs: dict[str, tuple[Tensor, Tensor | None]] = {}
        text, pooled = self._encode("", request.prompt, request)
        if guided:
            if request.negative_prompt is None and options.get("negative_prompt_embeds") is None:
                raise ValueError(
                    "negative_prompt must be given with true_cfg_scale; use '' for an empty one"
                )
            no_text, no_pooled = self._encode("negative_", request.negative_prompt, request)
            pairs = {
                "prompt_embeds": (text, no_text),
                "pooled_prompt_embeds": (pooled, no_pooled),
            }
        else:
            pairs = {"prompt_embeds": (text, None), "pooled_prompt_embeds": (pooled, None)}
        tensors = self.pairs(guided, **pairs)
        if self.denoiser.config.guidance_embeds:
            scale = torch.tensor(request.guidance_scale, dtype=torch.float32, device=self.device)
            tensors["guidance"] = scale.expand(request.batch)
        elif request.guidance_scale != 1:
            warnings.warn(
                "guidance_scale has no effect: this transformer has no guidance embedding; use "
                "true_cfg_scale",
                stacklevel=4,
            )
        return Conditioning(tensors)

    def _encode(self, prefix: str, prompt: Any, request: Request) -> tuple[Tensor, Tensor]:
        options = request.options
        with self.text_lock():
            text, pooled, _ = self.pipe.encode_prompt(
                prompt=prompt,
                prompt_2=request.per_image(options.get(f"{prefix}prompt_2")),
                device=self.device,
                num_images_per_prompt=1,
                prompt_embeds=options.get(f"{prefix}prompt_embeds"),
                pooled_prompt_embeds=options.get(f"{prefix}pooled_prompt_embeds"),
                max_sequence_length=options.get("max_sequence_length", 512),
            )
        return text, pooled

    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """See `Adapter.model`."""
        transformer = self.denoiser
        text = conditioning.halves("prompt_embeds", guided)
        pooled = conditioning.halves("pooled_prompt_embeds", guided)
        embedded = "guidance" in conditioning.tensors
        guidance = conditioning.halves("guidance", guided) if embedded else None
        text_ids = text.new_zeros(text.shape[1], 3)  # [L, 3]
        image_ids = self.pipe._prepare_latent_image_ids(
            1, *self.tokens(size), text.device, text.dtype
        )  # [rows·columns, 3]

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = transformer(
                hidden_states=sample,
                # rounded as in the pipeline
                timestep=timestep.to(sample.dtype) / 1000,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            return output

        return denoise

    def to_latents(
        self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """See `Adapter.to_latents`; packed, [B, rows·columns, 4 C]."""
        latents = super().to_latents(images, generator)
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def to_images(
        self,
        latents: Tensor,
        size: Size,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """See `Adapter.to_images`."""
        unpacked = self.pipe._unpack_latents(latents, *size, self.pipe.vae_scale_factor)
        return super().to_images(unpacked, size, generator)
