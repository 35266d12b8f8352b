"""The models of a comparison: a pipeline, or a base with the result of a training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..training.artefacts import CONFIG, read_result
from ..training.checkpoint import STATE, read_state
from ..training.models import other_denoiser, subfolder_of
from ..training.weights import LORA

_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Parts:
    """Where a model's parts are, as `find` has found them.

    Attributes:
        pipeline: folder or hub name.
        component: of the pipeline that is trained, `unet` or `transformer`.
        denoiser: folder with another for that component; None for the pipeline's.
        lora: folder of a LoRA, or None.
        start: `unet_init` of the LoRA's training, the denoiser that it belongs on; None for the
            pipeline's.
    """

    pipeline: str
    component: str
    denoiser: Path | None = None
    lora: Path | None = None
    start: str | None = None

    @classmethod
    def find(cls, base: str, result: str | None) -> Parts:
        """Look where the parts are; no weights are read.

        Args:
            base: folder or hub name of a pipeline.
            result: folder that a training wrote, with a LoRA, `unet/` or `transformer/`; or of
                another pipeline; None for the base itself. A LoRA belongs on the denoiser that its
                training started from; without a training's config, on the base's.

        Raises:
            OSError: there is no such base.
            ValueError: the result is none of these, or the LoRA's denoiser cannot be had.
        """
        from diffusers import DiffusionPipeline

        where = Path(result) if result is not None else None
        if where is not None and (where / "model_index.json").is_file():
            base, where = str(where), None
        index = DiffusionPipeline.load_config(base)
        component = "transformer" if "transformer" in index else "unet"
        if where is None:
            return cls(base, component)
        if (where / LORA).is_file():
            return cls(base, component, lora=where, start=_start(where, component))
        if (where / component).is_dir():
            return cls(base, component, denoiser=where)
        raise ValueError(f"{where} must hold {LORA}, {component}/ or model_index.json")

    def load(self, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """A pipeline that is ready to draw.

        Raises:
            OSError, ValueError: a part cannot be loaded.
        """
        from diffusers import DiffusionPipeline

        # a saved pipeline may have one of these; diffusers loads only what has been imported
        import_module("inpo_fast.schedulers")
        options: dict[str, Any] = {"dtype": dtype}
        if "safety_checker" in DiffusionPipeline.load_config(self.pipeline):
            # it would black out images of one model and not of the other
            options["safety_checker"] = None
        pipeline = DiffusionPipeline.from_pretrained(self.pipeline, **options)
        component, kind = self.component, type(getattr(pipeline, self.component))
        if self.denoiser is not None:
            trained = kind.from_pretrained(str(self.denoiser), subfolder=component, dtype=dtype)
            setattr(pipeline, component, trained)
        if self.start is not None:
            trained = other_denoiser(self.start, kind, component, {"dtype": dtype})
            setattr(pipeline, component, trained)
        if self.lora is not None:
            pipeline.load_lora_weights(str(self.lora))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of every weight file; of a hub name its cached files."""
        folders = {"": _folder(self.pipeline)}
        if self.start is not None:
            inside = subfolder_of(self.start, self.component) or "."
            folders["unet_init/"] = _folder(self.start) / inside
        for result in (self.denoiser, self.lora):
            if result is not None:
                folders[f"{result.name}/"] = result
        return {
            prefix + str(path.relative_to(folder)): _sha256(path)
            for prefix, folder in folders.items()
            for path in sorted(folder.rglob("*"))
            if path.suffix in _WEIGHTS
            and not path.relative_to(folder).parts[0].startswith(("checkpoint-", "."))
        }


def _start(folder: Path, component: str) -> str | None:
    """`unet_init` of the training that wrote a result or a checkpoint; None where there was none,
    and for another tool's folder.

    Raises:
        ValueError: it cannot be told, or had.
    """
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        config = read_result(folder)
    elif (folder / STATE).is_file():
        config = read_state(folder)["config"]
    start: str | None = config.get("unet_init")
    if start is not None:
        from diffusers import AutoModel

        try:
            AutoModel.load_config(start, subfolder=subfolder_of(start, component))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the LoRA in {folder} was trained on the denoiser unet_init={start}, which cannot "
                f"be loaded: {error}"
            ) from error
    return start


def _folder(model: str) -> Path:
    """The folder of a model; of a hub name that in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
