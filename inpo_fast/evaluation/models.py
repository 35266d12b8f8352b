"""The models of a comparison: a pipeline, or a base with the result of a training."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..training.weights import LORA

_WEIGHTS = (".safetensors", ".bin")


def load_pipeline(
    base: str, result: str | None, *, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """A pipeline that is ready to draw.

    Args:
        base: folder or hub name of a pipeline.
        result: folder that a training wrote, with a LoRA, `unet/` or `transformer/`; or of another
            pipeline; None for the base itself.
        dtype, device: of the pipeline.

    Raises:
        ValueError: the result is none of these.
    """
    from diffusers import DiffusionPipeline

    # a saved pipeline may have one of these; diffusers loads only what has been imported
    import_module("inpo_fast.schedulers")
    options: dict[str, Any] = {"dtype": dtype}
    where = Path(result) if result is not None else None
    if where is not None and (where / "model_index.json").is_file():
        base, where = str(where), None
    index = DiffusionPipeline.load_config(base)
    if "safety_checker" in index:
        # it would black out images of one model and not of the other
        options["safety_checker"] = None
    pipeline = DiffusionPipeline.from_pretrained(base, **options)
    if where is not None:
        component = "transformer" if "transformer" in index else "unet"
        if (where / LORA).is_file():
            pipeline.load_lora_weights(str(where))
        elif (where / component).is_dir():
            kind = type(getattr(pipeline, component))
            trained = kind.from_pretrained(str(where), subfolder=component, dtype=dtype)
            setattr(pipeline, component, trained)
        else:
            raise ValueError(f"{where} must hold {LORA}, {component}/ or model_index.json")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def fingerprint(base: str, result: str | None) -> dict[str, str]:
    """SHA-256 of every weight file; of a hub name its cached files."""
    folders = [Path(base)] if Path(base).is_dir() else []
    if not folders:
        from huggingface_hub import snapshot_download

        folders = [Path(snapshot_download(base, local_files_only=True))]
    if result is not None:
        folders.append(Path(result))
    hashes = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.suffix in _WEIGHTS and not inside.parts[0].startswith(("checkpoint-", ".")):
                name = str(inside) if folder == folders[0] else f"{folder.name}/{inside}"
                hashes[name] = _sha256(path)
    return hashes


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
