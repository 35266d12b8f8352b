"""A pipeline's autoencoder and text encoders, without its denoiser."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES, own_resolution
from .images import to_unit
from .pairs import DataError
from .stored import Scaling


@dataclass(frozen=True)
class ModelFiles:
    """Where the encoders of a model are, and what they are.

    Attributes:
        folder: of the pipeline.
        vae: folder of the autoencoder.
        variant: of the weight files, as `fp16`.
        family: class of the pipeline.
    """

    folder: Path
    vae: Path
    variant: str | None
    family: str

    @classmethod
    def find(
        cls,
        model: str | PathLike[str],
        *,
        vae: str | PathLike[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> ModelFiles:
        """Find a pipeline by its folder or its name on the hub, and read what family it is of.

        Args:
            model: of the pipeline.
            vae: of another autoencoder, a folder or a name.
            revision: of a name.
            variant: see above.

        Raises:
            DataError: nothing is there, or the family is not supported.
        """
        folder = _fetch_pipeline(model, revision, variant)
        own = folder / "vae" if vae is None else _fetch_vae(vae)
        for needed in (folder / "model_index.json", own / "config.json"):
            if not needed.is_file():
                raise DataError(f"{needed} must exist: {needed.parent} is not in diffusers' format")
        index = json.loads((folder / "model_index.json").read_text())
        family = index.get("_class_name")
        if family not in FAMILIES:
            raise DataError(
                f"the pipeline {model} must be one of {', '.join(FAMILIES)}, got {family}"
            )
        return cls(folder, own, variant, family)

    def resolution(self, model: str | PathLike[str], revision: str | None = None) -> int:
        """Pixels along a side that the denoiser was made for, by its config alone.

        Args:
            model, revision: as given to `find`, which does not fetch the denoiser.

        Raises:
            DataError: there is no such config, or it does not say.
        """
        from diffusers import AutoModel

        part = FAMILIES[self.family].component
        try:
            return own_resolution(AutoModel.load_config(model, subfolder=part, revision=revision))
        except (OSError, ValueError) as error:
            raise DataError(
                f"resolution must be given, as the model {model} does not say: {error}"
            ) from error

    def fingerprint(self) -> dict[str, str]:
        """Digest of config, weights and vocabulary of every part that decides what is encoded."""
        parts = {
            entry.name: entry
            for entry in sorted(self.folder.iterdir())
            if entry.is_dir() and entry.name.startswith(("text_encoder", "tokenizer"))
        }
        digests = {name: _digest(part, self.variant) for name, part in parts.items()}
        return {"family": self.family, "vae": _digest(self.vae, self.variant), **digests}


class Encoders:
    """The autoencoder's encoder and the text encoders.

    In float16 an autoencoder that says `force_upcast`, as SDXL's does because it overflows, runs in
    float32.

    A call encodes one pair, or one caption: then the bits do not depend on what else a batch holds,
    and live and cached training see the same numbers.
    """

    def __init__(self, pipeline: Any) -> None:
        """Take the parts of a loaded pipeline, whose denoiser may be missing, and freeze them.

        Raises:
            DataError: a pipeline of an unsupported family, or without one of its encoders.
        """
        name = type(pipeline).__name__
        if name not in FAMILIES:
            raise DataError(f"the pipeline must be one of {', '.join(FAMILIES)}, got {name}")
        self.family = FAMILIES[name]
        self.vae = pipeline.vae
        for name, part in pipeline.components.items():
            if name.startswith(("vae", "text_encoder")):
                if part is None:
                    raise DataError(f"the pipeline must have its {name}, got None")
                # attention chooses its kernel, and so the last bits, by requires_grad too
                part.requires_grad_(False).eval()
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)
        self.scaling = Scaling.of(self.vae.config)
        self._pipeline = pipeline

    def to(self, device: torch.device) -> Encoders:
        """Move the encoders of the pipeline, and nothing else of it."""
        for name, part in self._pipeline.components.items():
            if name.startswith(("vae", "text_encoder")):
                part.to(device)
        return self

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Encoders:
        """Load autoencoder and text encoders, and no denoiser.

        Raises:
            DataError: a part cannot be loaded.
        """
        from diffusers import AutoencoderKL, DiffusionPipeline

        without_denoiser = {FAMILIES[files.family].component: None}
        options = {"dtype": dtype, "variant": files.variant, "local_files_only": True}
        try:
            vae = AutoencoderKL.from_pretrained(str(files.vae), **options)
            pipeline = DiffusionPipeline.from_pretrained(
                str(files.folder), vae=vae, scheduler=None, **without_denoiser, **options
            )
        except (OSError, ValueError) as error:
            raise DataError(f"the encoders of {files.folder} cannot be loaded: {error}") from error
        return cls(pipeline.to(device))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vae.device
        return device

    @torch.no_grad()
    def posterior(self, pixels: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation, [2, C, h, w] float32, of a pair's pixels [2, 3, H, W] uint8.

        Raises:
            DataError: they are not finite; the message names the pair by its row.
        """
        images = to_unit(pixels.to(self.device)).to(self.vae.dtype)
        found = self.vae.encode(images).latent_dist
        mean, std = found.mean.float(), found.std.float()
        if not bool((mean.isfinite() & std.isfinite()).all()):
            remedy = (
                "the autoencoder's weights or config are broken"
                if self.vae.dtype == torch.float32
                else f"the autoencoder overflows in {self.vae.dtype}: encode in float32"
            )
            raise DataError(f"the latents of the pair in row {row} are not finite: {remedy}")
        return mean, std

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, Tensor]:
        """Float32 conditioning of a caption by name, [L, D] and [D].

        Raises:
            DataError: it is not finite.
        """
        encoded = self._pipeline.encode_prompt(
            [caption], device=self.device, **self.family.arguments
        )
        text = {name: encoded[place][0].float() for name, place in self.family.outputs.items()}
        if not all(bool(value.isfinite().all()) for value in text.values()):
            raise DataError(f"the embeddings of the caption {caption!r} are not finite")
        return text


def _fetch_pipeline(name: str | PathLike[str], revision: str | None, variant: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from diffusers import DiffusionPipeline

    try:
        # the denoiser is not needed here
        fetched = DiffusionPipeline.download(
            _hub_name(name), revision=revision, variant=variant, unet=None, transformer=None
        )
    # the hub's errors have no common type but these
    except (OSError, ValueError) as error:
        raise DataError(f"the model {name} cannot be fetched: {error}") from error
    return Path(fetched)


def _fetch_vae(name: str | PathLike[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "diffusion_pytorch_model*.safetensors"]
        return Path(snapshot_download(_hub_name(name), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise DataError(f"the autoencoder {name} cannot be fetched: {error}") from error


def _hub_name(name: str | PathLike[str]) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is None or str(name).startswith("."):
        raise DataError(f"the model must be a folder or a name on the hub, got {name}")
    return str(name)


def _digest(folder: Path, variant: str | None) -> str:
    """Of the files that are loaded: everything in JSON or text, and the variant's weights."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    weights = [path for path in files if path.suffix in (".safetensors", ".bin")]
    # "model.fp16.safetensors", and in parts "model.fp16-00001-of-00002.safetensors"
    of_variant = [path for path in weights if f".{variant}" in path.stem] if variant else []
    chosen = of_variant or [path for path in weights if "." not in path.stem]
    chosen = [path for path in chosen if path.suffix == ".safetensors"] or chosen
    others = [path for path in files if path.suffix in (".json", ".txt", ".model")]
    whole = hashlib.sha256()
    for path in sorted(chosen + others):
        whole.update(f"{path.name}:{_file_digest(path)}\n".encode())
    return whole.hexdigest()[:32]


def _file_digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            content.update(block)
    return content.hexdigest()
