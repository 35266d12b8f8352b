"""Adapters of the UNet pipelines: Stable Diffusion 1.x and 2.x, with ControlNet, and XL."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..sampler import Model
from .adapter import Adapter, Conditioning, Request, Size
from .images import to_tensor
from .settings import one_or_each, require_pair


class StableDiffusion(Adapter):
    """Stable Diffusion 1.x and 2.x."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    setting_options = frozenset({"clip_skip"})

    def check(self) -> None:
        """See `Adapter.check`."""
        super().check()
        config = self.denoiser.config
        if config.in_channels != self.pipe.vae.config.latent_channels:
            raise ValueError(
                f"pipe.unet must take the {self.pipe.vae.config.latent_channels} channels of the "
                f"latents, got {config.in_channels}: an inpainting or image-conditioned UNet is "
                "not supported; load a text-to-image checkpoint"
            )
        if config.time_cond_proj_dim is not None:
            raise ValueError(
                "pipe.unet must not be distilled with a guidance embedding (time_cond_proj_dim "
                f"{config.time_cond_proj_dim}); load the checkpoint that it was distilled from"
            )
        if config.encoder_hid_dim_type is not None:
            raise ValueError(
                f"pipe.unet needs image embeddings ({config.encoder_hid_dim_type}); call "
                "pipe.unload_ip_adapter() first"
            )

    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """See `Adapter.encode_prompt`."""
        options = request.options
        with self.text_lock():
            positive, negative = self.pipe.encode_prompt(
                request.prompt,
                self.device,
                1,
                guided,
                request.negative_prompt,
                prompt_embeds=options.get("prompt_embeds"),
                negative_prompt_embeds=options.get("negative_prompt_embeds"),
                clip_skip=options.get("clip_skip"),
            )
        return Conditioning(self.pairs(guided, prompt_embeds=(positive, negative)))

    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """See `Adapter.model`."""
        unet, text = self.denoiser, conditioning.halves("prompt_embeds", guided)

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = unet(sample, timestep, encoder_hidden_states=text, return_dict=False)[
                0
            ]
            return output

        return denoise

    def finish(self, images: Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """See `Adapter.finish`."""
        images, flagged = self.pipe.run_safety_checker(images, self.device, self.dtype)
        visible = None if flagged is None else [not flag for flag in flagged]
        finished = self.pipe.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=visible
        )
        return finished, flagged


class StableDiffusionControlNet(StableDiffusion):
    """Stable Diffusion with one ControlNet or several, on for the whole trajectory."""

    pipeline_class = "StableDiffusionControlNetPipeline"
    setting_options = StableDiffusion.setting_options | {
        "control_image",
        "controlnet_conditioning_scale",
        "guess_mode",
    }

    def check_settings(self, request: Request) -> None:
        """See `Adapter.check_settings`."""
        super().check_settings(request)
        guess = request.options.get("guess_mode", False)
        if not isinstance(guess, bool):
            raise TypeError(f"guess_mode must be True or False, got {guess!r}")
        self._scales(request)
        self._controls(request)

    def _scales(self, request: Request) -> float | list[float]:
        """The strength of the ControlNet, or of each."""
        count = len(self._nets)
        scale = request.options.get("controlnet_conditioning_scale", 1.0)
        scales = one_or_each("controlnet_conditioning_scale", scale, count)
        each = list(scales) if isinstance(scales, tuple) else [scales] * count
        return each if count > 1 else each[0]

    def _controls(self, request: Request) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] for each ControlNet."""
        images = request.options.get("control_image")
        if images is None:
            raise ValueError("control_image must be given with a StableDiffusionControlNetPipeline")
        count = len(self._nets)
        if count > 1 and (not isinstance(images, (list, tuple)) or len(images) != count):
            raise ValueError(f"control_image must be a list of {count}, one per ControlNet")
        controls = []
        for image in images if count > 1 else [images]:
            control = to_tensor(image, self.multiple, name="control_image")
            if control.shape[0] not in (1, request.batch) or control.shape[-2:] != request.size:
                raise ValueError(
                    f"control_image must be 1 or {request.batch} images of height and width "
                    f"{request.size}, got {tuple(control.shape)}"
                )
            controls.append(control.expand(request.batch, -1, -1, -1))
        return controls

    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """See `Adapter.encode_prompt`."""
        base = super().encode_prompt(request, guided)
        controls = {
            f"control_image_{index}": control.to(self.device, self.dtype)
            for index, control in enumerate(self._controls(request))
        }
        guess = request.options.get("guess_mode", False)
        guess = guess or bool(self._nets[0].config.global_pool_conditions)
        return Conditioning(
            {**base.tensors, **controls}, {"scale": self._scales(request), "guess_mode": guess}
        )

    def restored_options(self, conditioning: Conditioning) -> dict[str, Any]:
        """See `Adapter.restored_options`."""
        images = [
            conditioning.tensors[f"control_image_{k}"].float() for k in range(len(self._nets))
        ]
        return {"control_image": images if len(images) > 1 else images[0]}

    @property
    def _nets(self) -> list[Any]:
        controlnet = self.pipe.controlnet
        return list(controlnet.nets) if hasattr(controlnet, "nets") else [controlnet]

    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """See `Adapter.model`."""
        unet, controlnet = self.denoiser, self.pipe.controlnet
        guess = conditioning.settings["guess_mode"]
        # guessing, the ControlNet sees the conditional half alone
        both = guided and not guess
        text = conditioning.halves("prompt_embeds", guided)
        control_text = conditioning.halves("prompt_embeds", both)
        images = [conditioning.halves(f"control_image_{k}", both) for k in range(len(self._nets))]

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            seen = slice(0 if both or not guided else len(sample) // 2, None)
            down, mid = controlnet(
                sample[seen],
                timestep[seen],
                encoder_hidden_states=control_text,
                controlnet_cond=images if len(images) > 1 else images[0],
                conditioning_scale=conditioning.settings["scale"],
                guess_mode=guess,
                return_dict=False,
            )
            if guided and guess:
                down = [torch.cat([torch.zeros_like(d), d]) for d in down]
                mid = torch.cat([torch.zeros_like(mid), mid])
            output: Tensor = unet(
                sample,
                timestep,
                encoder_hidden_states=text,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            return output

        return denoise


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL."""

    pipeline_class = "StableDiffusionXLPipeline"
    prompt_options = StableDiffusion.prompt_options | {
        "prompt_2",
        "negative_prompt_2",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }
    setting_options = frozenset(
        {
            "clip_skip",
            "original_size",
            "crops_coords_top_left",
            "target_size",
            "negative_original_size",
            "negative_crops_coords_top_left",
            "negative_target_size",
        }
    )

    def check_settings(self, request: Request) -> None:
        """See `Adapter.check_settings`."""
        super().check_settings(request)
        sizes = self.setting_options - {"clip_skip"}
        given = {k: v for k, v in request.options.items() if k in sizes}
        for name, value in given.items():
            require_pair(name, value)
        negative = {name for name in given if name.startswith("negative_")}
        if negative and not negative >= {"negative_original_size", "negative_target_size"}:
            raise ValueError(
                "negative_original_size and negative_target_size must be given together, got "
                f"{sorted(negative)} alone"
            )

    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """See `Adapter.encode_prompt`."""
        options = request.options
        self.require_pooled(options)
        with self.text_lock():
            text, no_text, pooled, no_pooled = self.pipe.encode_prompt(
                prompt=request.prompt,
                prompt_2=request.per_image(options.get("prompt_2")),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=request.negative_prompt,
                negative_prompt_2=request.per_image(options.get("negative_prompt_2")),
                prompt_embeds=options.get("prompt_embeds"),
                negative_prompt_embeds=options.get("negative_prompt_embeds"),
                pooled_prompt_embeds=options.get("pooled_prompt_embeds"),
                negative_pooled_prompt_embeds=options.get("negative_pooled_prompt_embeds"),
                clip_skip=options.get("clip_skip"),
            )
        tensors = self.pairs(
            guided, prompt_embeds=(text, no_text), pooled_prompt_embeds=(pooled, no_pooled)
        )
        ids = self._time_ids("", request, pooled)
        tensors["time_ids"] = ids
        if "negative_original_size" in options:
            tensors["negative_time_ids"] = self._time_ids("negative_", request, pooled)
        return Conditioning(tensors)

    def _time_ids(self, prefix: str, request: Request, pooled: Tensor) -> Tensor:
        """[B, 6] original size, crop and target size."""
        options = request.options
        encoder = self.pipe.text_encoder_2
        width = int(pooled.shape[-1]) if encoder is None else encoder.config.projection_dim
        ids: Tensor = self.pipe._get_add_time_ids(
            tuple(options.get(f"{prefix}original_size") or request.size),
            tuple(options.get(f"{prefix}crops_coords_top_left") or (0, 0)),
            tuple(options.get(f"{prefix}target_size") or request.size),
            dtype=self.dtype,
            text_encoder_projection_dim=width,
        )
        return ids.to(self.device).repeat(request.batch, 1)

    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """See `Adapter.model`."""
        unet = self.denoiser
        text = conditioning.halves("prompt_embeds", guided)
        added = {
            "text_embeds": conditioning.halves("pooled_prompt_embeds", guided),
            "time_ids": conditioning.halves("time_ids", guided),
        }

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = unet(
                sample,
                timestep,
                encoder_hidden_states=text,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return output

        return denoise

    @cached_property
    def vae(self) -> Any:
        """The pipeline's autoencoder; where it would overflow in float16, a float32 copy of it.

        diffusers casts `pipe.vae` itself to float32 and back, which another thread would see.
        """
        vae = self.pipe.vae
        if not (vae.dtype == torch.float16 and vae.config.force_upcast):
            return vae
        if hasattr(vae, "_hf_hook") and any(p.is_meta for p in vae.parameters()):
            raise ValueError(
                "pipe.vae overflows in float16 and its weights are offloaded one by one, so they "
                "cannot be copied to float32: load the pipeline with "
                "vae=AutoencoderKL.from_pretrained('madebyollin/sdxl-vae-fp16-fix')"
            )
        copy = type(vae).from_config(vae.config)
        copy.load_state_dict(vae.state_dict())
        if vae.attn_processors:
            copy.set_attn_processor(dict(vae.attn_processors))
        for name in ("use_slicing", "use_tiling"):
            setattr(copy, name, getattr(vae, name))
        return copy.to(self.device, torch.float32).eval().requires_grad_(False)

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean = getattr(config, "latents_mean", None)
        std = getattr(config, "latents_std", None)
        if mean is None or std is None:
            return super()._latent_statistics(latents)
        shape = (1, -1, 1, 1)
        return (
            latents.new_tensor(mean, dtype=torch.float32).view(shape),
            latents.new_tensor(std, dtype=torch.float32).view(shape) / config.scaling_factor,
        )

    def finish(self, images: Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """See `Adapter.finish`."""
        if self.pipe.watermark is not None:
            images = self.pipe.watermark.apply_watermark(images)
        return self.pipe.image_processor.postprocess(images, output_type=output_type), None
