"""The shipped pipeline as the demo uses it: images, prompts and a model for the sampler."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..shipped.sampling import load_pipeline
from ..solvers import ddim

_CPU_CHUNK, _GPU_CHUNK = 64, 512
"""Images per call of the autoencoder and of generation. What fits a CPU's caches is fastest there;
on a GPU a call of so small a model takes as long for hundreds of images as for one."""


class DemoError(Exception):
    """Something that the user can mend: printed as one line, without a traceback."""


@dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion pipeline, frozen and in float32 on one device."""

    unet: nn.Module
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def chunk(self) -> int:
        """Images or prompts per call."""
        return _CPU_CHUNK if self.device.type == "cpu" else _GPU_CHUNK

    def schedule(self, num_steps: int) -> NoiseSchedule:
        """The grid of the pipeline's own scheduler."""
        return NoiseSchedule.from_diffusers(self.scheduler, num_steps)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, D] text embeddings of B prompts, padded to the tokenizer's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        chunks = tokens.input_ids.to(self.device).split(self.chunk)
        return torch.cat([self.text_encoder(chunk)[0] for chunk in chunks])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 4, h, w] latents, the mean of the posterior, of images [B, 3, H, W] in [-1, 1]."""
        factor = self.vae.config.scaling_factor
        chunks = images.to(self.device).split(self.chunk)
        return torch.cat([self.vae.encode(chunk).latent_dist.mode() * factor for chunk in chunks])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] images in [-1, 1], on the CPU, of latents [B, 4, h, w]."""
        return self.pixels(latents).cpu()

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, and the images stay on the device."""
        chunks = (latents / self.vae.config.scaling_factor).split(self.chunk)
        return torch.cat([self.vae.decode(chunk).sample for chunk in chunks]).clamp(-1, 1)

    def noise(self, count: int, seed: int) -> Tensor:
        """[B, 4, h, w] standard normal latents, the same on every device."""
        config: Any = self.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return seeded_noise(shape, seed).to(self.device)

    def denoiser(self, prompts: Sequence[str], unet: nn.Module | None = None) -> Denoiser:
        """The UNet (the pipeline's own unless given) under `prompts`, for the sampler."""
        unet = self.unet if unet is None else unet
        dtype = next(unet.parameters()).dtype
        conditional = self.embed(prompts).to(dtype)
        return Denoiser(unet, self.embed([""]).to(dtype).expand_as(conditional), conditional)

    def generate(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        unet: nn.Module | None = None,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """[B, 3, H, W] images by DDIM, on the CPU, from noise [B, 4, h, w]."""
        text, empty = self.embed(prompts), self.embed([""])
        unet = self.unet if unet is None else unet
        return self.decode(self.sample(unet, text, empty, noise, steps=steps, guidance=guidance))

    def sample(
        self,
        unet: nn.Module,
        text: Tensor,
        empty: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """[B, 4, h, w] latents by DDIM from noise, under embeddings [B, L, D] and [1, L, D]."""
        program = ddim(self.schedule(steps))
        dtype = next(unet.parameters()).dtype
        text, empty = text.to(dtype), empty.to(dtype)
        latents = []
        for words, start in zip(text.split(self.chunk), noise.split(self.chunk), strict=True):
            model = Denoiser(unet, empty.expand_as(words), words)
            sampler = Sampler(model, program, guidance_scale=guidance, state="float32")
            latents.append(sampler.run(start).sample())
        return torch.cat(latents)


class Denoiser:
    """The sampler's model: a UNet with the text embeddings bound to it. Counts its calls."""

    def __init__(self, unet: nn.Module, unconditional: Tensor, conditional: Tensor) -> None:
        self.unet = unet
        self.batch = len(conditional)
        self.conditional = conditional  # [B, L, D]
        self.both = torch.cat([unconditional, conditional])  # [2B, L, D]
        self.calls = 0

    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        text = self.conditional if len(sample) == self.batch else self.both
        output: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
        return output


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 noise on the CPU from a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cast(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `unet` in `dtype`; the UNet itself where it has that dtype already."""
    if next(unet.parameters()).dtype == dtype:
        return unet
    return copy.deepcopy(unet).to(dtype)


def load(folder: str | os.PathLike[str], device: str) -> Pipeline:
    """Load the pipeline in `folder`, offline, in float32.

    Raises:
        DemoError: the folder holds no readable pipeline.
    """
    import diffusers
    import transformers

    # their progress bars and advice are about loading, which takes a second
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        pipe = load_pipeline(Path(folder), device=device)
    except (OSError, ValueError) as error:
        raise DemoError(f"no model can be loaded from {os.fspath(folder)}: {error}") from error
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    for module in (pipe.unet, pipe.vae):
        # on a CPU a third faster than channels first
        module.to(memory_format=torch.channels_last)
    return Pipeline(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


def choose_device(name: str) -> str:
    """`auto` is the GPU if torch sees one, else the CPU.

    Raises:
        DemoError: a device that this torch does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--device {name} is not available: {reason}") from error
    return name


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms and true float32 while the demo runs; restored afterwards."""
    # cuBLAS reads it when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
