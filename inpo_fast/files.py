"""Files that are there completely or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def write_json(path: Path, content: Any) -> None:
    _replace(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
    """A safetensors file of tensors and text.

    Raises:
        OSError: it cannot be written, as on a full disk or where there is no folder for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        _replace(path, lambda part: save_file(contiguous, part, metadata=dict(fields)))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and text of a safetensors file.

    Every tensor has memory of its own. Those that safetensors hands out lie anywhere in the file's,
    and products round by where their operands begin: a model would return other bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is corrupt.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a readable safetensors file: {error}") from None


def write_picture(path: Path, picture: Image) -> None:
    """A picture in the format that the ending of `path` names."""
    from PIL import Image as pil

    kind = pil.registered_extensions()[path.suffix.lower()]
    _replace(path, lambda part: picture.save(part, format=kind))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, force it to the disk, rename; a full disk leaves nothing behind.

    Raises:
        FileNotFoundError: no folder to write to.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to")
    # threads may write the same file
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
