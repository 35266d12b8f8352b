"""What a pipeline family must say so that a program can run on its model: the `Adapter`.

An adapter reads a diffusers pipeline and never writes to it: no scheduler is set up, no attribute
assigned, no module moved or cast, so several threads may share one pipeline.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..sampler import Model
from ..schedule import NoiseSchedule
from .settings import require_integer

Size = tuple[int, int]
"""(H, W) of the images, in pixels."""


@dataclass(frozen=True)
class Conditioning:
    """What the model is told besides the sample and the time.

    Attributes:
        tensors: [B, …] each, by the names of the pipeline's own arguments; `negative_NAME` is the
            unconditional half of NAME.
        settings: what else the model's call needs, as numbers.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def halves(self, name: str, guided: bool) -> Tensor:
        """[B, …], or with guidance [2B, …], the unconditional half first."""
        positive = self.tensors[name]
        if not guided:
            return positive
        return torch.cat([self.tensors.get(f"negative_{name}", positive), positive])

    def negative(self) -> dict[str, Tensor]:
        """The unconditional half of every tensor that has one."""
        return {k: v for k, v in self.tensors.items() if k.startswith("negative_")}


@dataclass(frozen=True)
class Request:
    """Prompts and options of one call, checked and spread over the batch.

    Attributes:
        prompt, negative_prompt: B strings, or None where embeddings are given or nothing is.
        batch, size: number and size of the images.
        guidance_scale: as the user gave it, one number or B.
        options: the family's own arguments.
    """

    prompt: list[str] | None
    negative_prompt: list[str] | None
    batch: int
    size: Size
    guidance_scale: float | tuple[float, ...]
    options: Mapping[str, Any]

    @property
    def has_negative(self) -> bool:
        """Whether the caller gave a negative prompt or its embeddings."""
        return self.negative_prompt is not None or gives_negative(self.options)

    def per_image(self, value: Any) -> Any:
        """A text option as a list of B."""
        return [value] * self.batch if isinstance(value, str) else value


def gives_negative(options: Mapping[str, Any]) -> bool:
    """Whether there is a negative prompt, in words or embeddings, among a family's options."""
    return any(name.startswith(("negative_prompt", "negative_pooled")) for name in options)


class Adapter(ABC):
    """One pipeline family.

    Attributes:
        pipeline_class: name of the diffusers class.
        denoiser_name: the component that is called.
        prompt_options: arguments that belong to one prompt, not inherited by an edit.
        setting_options: arguments that an edit inherits from its inversion.
    """

    pipeline_class: ClassVar[str]
    denoiser_name: ClassVar[str]
    prompt_options: ClassVar[frozenset[str]] = frozenset(
        {"prompt_embeds", "negative_prompt_embeds"}
    )
    setting_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.check()

    @property
    def denoiser(self) -> Any:
        """The module that is called."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the models run, also when they are offloaded between calls."""
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def default_guidance(self) -> float:
        """What `guidance_scale=None` means."""
        return 3.0

    @property
    def multiple(self) -> int:
        """What height and width must be a multiple of."""
        return int(self.pipe.vae_scale_factor)

    def modules(self) -> dict[str, nn.Module]:
        """The components that decide what an inversion is."""
        left_out = ("safety_checker", "image_encoder")
        return {
            name: part
            for name, part in self.pipe.components.items()
            if isinstance(part, nn.Module) and name not in left_out
        }

    def check(self) -> None:
        """Refuse a pipeline whose model is no function of its inputs, or whose inputs are unknown.

        Raises:
            ValueError: what to change.
        """
        for name in (self.denoiser_name, "controlnet"):
            parts = getattr(self.pipe, name, nn.Identity()).modules()
            if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in parts):
                raise ValueError(
                    f"pipe.{name} must be in evaluation mode: its dropout makes every call "
                    f"different; call pipe.{name}.eval()"
                )

    def schedule(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        size: Size,
    ) -> NoiseSchedule:
        """The grid of the pipeline's own scheduler.

        Raises:
            ValueError: a scheduler without such a grid.
        """
        return NoiseSchedule.from_diffusers(
            self.pipe.scheduler, num_inference_steps, timesteps=timesteps, sigmas=sigmas
        )

    def check_settings(self, request: Request) -> None:
        """Refuse options that are not prompts, before any model is called.

        Raises:
            ValueError, TypeError: naming the option.
        """
        options = request.options
        if (length := options.get("max_sequence_length")) is not None:
            # the pipelines' own limit
            require_integer("max_sequence_length", length, 1, 512)
        if (skip := options.get("clip_skip")) is not None:
            encoders = (getattr(self.pipe, n, None) for n in ("text_encoder", "text_encoder_2"))
            layers = [e.config.num_hidden_layers for e in encoders if e is not None]
            require_integer("clip_skip", skip, 0, min(layers, default=1) - 1)

    def guidance(self, request: Request) -> float | tuple[float, ...]:
        """w of classifier-free guidance."""
        return request.guidance_scale

    @abstractmethod
    def encode_prompt(self, request: Request, guided: bool) -> Conditioning:
        """The conditioning of a request; with `guided` its unconditional half as well."""

    @abstractmethod
    def model(self, conditioning: Conditioning, guided: bool, size: Size) -> Model:
        """The denoiser bound to its conditioning, for [B, …], or with `guided` for [2B, …]."""

    def pairs(self, guided: bool, **pairs: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """Named (positive, negative) tensors in the model's dtype, on its device, none of them the
        caller's own: that may change, and lies as a file's would not.

        Raises:
            ValueError: halves of different shapes.
        """
        tensors = {}
        for name, (positive, negative) in pairs.items():
            tensors[name] = positive.contiguous().to(self.device, self.dtype, copy=True)
            if not guided or negative is None:
                continue
            if negative.shape != positive.shape:
                raise ValueError(
                    f"negative_{name} must have the shape of {name}, got {tuple(negative.shape)} "
                    f"and {tuple(positive.shape)}"
                )
            tensors[f"negative_{name}"] = negative.contiguous().to(
                self.device, self.dtype, copy=True
            )
        return tensors

    @staticmethod
    def require_pooled(options: Mapping[str, Any]) -> None:
        """Refuse token embeddings without their pooled embedding, and the reverse."""
        for prefix in ("", "negative_"):
            text, pooled = f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"
            if (options.get(text) is None) != (options.get(pooled) is None):
                raise ValueError(f"{text} and {pooled} must be given together")

    def restored_options(self, conditioning: Conditioning) -> dict[str, Any]:
        """Settings that are tensors, from the conditioning that they went into."""
        return {}

    # images and latents

    def to_latents(
        self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """Float32 latents [B, …] of images [B, 3, H, W] in [−1, 1].

        The mode of the posterior, or a sample of it where there is a generator (or one per image);
        an autoencoder without a posterior gives its latents.

        Raises:
            ValueError: a generator for an autoencoder without a posterior, or it overflows.
        """
        from diffusers.utils.torch_utils import get_module_execution_device

        vae = self.vae
        encoded = vae.encode(images.to(get_module_execution_device(vae), vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None and generator is not None:
            raise ValueError(
                f"generator must be None: {type(vae).__name__} has no posterior to draw from"
            )
        if posterior is None:
            latents = encoded.latents
        elif generator is None:
            latents = posterior.mode()
        elif isinstance(generator, list):
            rows = zip(posterior.parameters.split(1), generator, strict=True)
            latents = torch.cat([type(posterior)(row).sample(g) for row, g in rows])
        else:
            latents = posterior.sample(generator)
        mean, std = self._latent_statistics(latents)
        unit: Tensor = (latents.float() - mean) / std
        return self._finite(unit, "latents").to(self.device)

    def to_images(
        self,
        latents: Tensor,
        size: Size,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W], about in [−1, 1] and not clamped, of float32 latents [B, …].

        Raises:
            ValueError: the autoencoder overflows.
        """
        from diffusers.utils.torch_utils import get_module_execution_device

        vae = self.vae
        mean, std = self._latent_statistics(latents)
        scaled = (latents * std + mean).to(get_module_execution_device(vae), vae.dtype)
        images: Tensor = vae.decode(scaled, return_dict=False, generator=generator)[0]
        return self._finite(images, "images")

    def _finite(self, result: Tensor, kind: str) -> Tensor:
        """What the autoencoder gave, refused where it has overflowed, as in float16 it may."""
        if not result.isfinite().all():
            dtype = str(self.vae.dtype).removeprefix("torch.")
            raise ValueError(
                f"pipe.vae must give finite {kind}, got NaN or infinity in {dtype}; call "
                "pipe.vae.to(torch.float32), with the other models as they are"
            )
        return result

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) with which the VAE's latents are (latents − mean)/std of unit scale."""
        config = self.vae.config
        mean, std = latents.new_zeros((), dtype=torch.float32), 1 / config.scaling_factor
        if (shift := getattr(config, "shift_factor", None)) is not None:
            mean = mean + shift
        return mean, latents.new_tensor(std, dtype=torch.float32)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder that encodes and decodes."""
        return self.pipe.vae

    def finish(self, images: Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
        """Images [B, 3, H, W] as `output_type`, and what a safety checker says of them."""
        return self.pipe.image_processor.postprocess(images, output_type=output_type), None

    # what is shared between threads

    @contextmanager
    def text_lock(self) -> Iterator[None]:
        """Fast tokenizers set their truncation in place: one thread at a time."""
        with _lock(self.pipe):
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around every run: an offloaded pipeline, whose hooks move the weights, serves one thread
        at a time and has all its models offloaded again afterwards."""
        hooks = getattr(self.pipe, "_all_hooks", [])
        parts = [part for module in self.modules().values() for part in module.modules()]
        # of accelerate, and of diffusers' own group offloading
        if not any(hasattr(p, "_hf_hook") or hasattr(p, "_diffusers_hook") for p in parts):
            yield
            return
        with _lock(self.pipe):
            try:
                yield
            finally:
                # not maybe_free_model_hooks(), which takes the hooks away and makes new ones
                for hook in hooks:
                    hook.offload()


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock(pipe: Any) -> threading.RLock:
    with _locks_guard:
        return _locks.setdefault(pipe, threading.RLock())
