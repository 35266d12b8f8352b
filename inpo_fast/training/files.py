"""Files that are there completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def write_json(path: Path, content: Any) -> None:
    _replace(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        _replace(path, lambda part: save_file(dict(tensors), part, metadata=dict(metadata)))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """A PNG of [H, W, 3]."""
    from PIL import Image

    _replace(path, lambda part: Image.fromarray(pixels).save(part, format="PNG"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, force it to the disk, rename; a full disk leaves nothing behind."""
    part = path.with_name(path.name + ".tmp")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
