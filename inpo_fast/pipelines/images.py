"""Images as users have them, to one tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_tensor(image: Any, multiple: int, *, name: str = "image") -> Tensor:
    """Float32 [B, 3, H, W] in [0, 1] of images in any of the usual forms.

    Nothing is resized, converted or clamped.

    Args:
        image: a PIL image in mode RGB; a numpy array [H, W, 3] or [B, H, W, 3] or a tensor
            [3, H, W] or [B, 3, H, W], uint8 or floating in [0, 1]; or a list of such of one size.
        multiple: what H and W must be a multiple of.
        name: the argument, for errors.

    Raises:
        TypeError: another type or dtype.
        ValueError: mode, shape, size or range; says what to change.
    """
    items = list(image) if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise ValueError(f"{name} must be at least one image, got an empty list")
    tensors = [_one(item, name) for item in items]
    if len({t.shape[1:] for t in tensors}) > 1:
        sizes = [tuple(t.shape[-2:]) for t in tensors]
        raise ValueError(f"{name}: all images must have one size, got (H, W) of {sizes}")
    batch = torch.cat(tensors).contiguous()
    if 0 in batch.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(batch.shape)}")
    height, width = batch.shape[-2:]
    if height % multiple or width % multiple:
        nearest = tuple(
            max(multiple, round(side / multiple) * multiple) for side in (height, width)
        )
        raise ValueError(
            f"{name}: height and width must be multiples of {multiple}, got {height} x {width}; "
            f"resize to {nearest[0]} x {nearest[1]} first"
        )
    return batch


def _one(item: Any, name: str) -> Tensor:
    """[B, 3, H, W]"""
    if hasattr(item, "convert") and hasattr(item, "mode"):
        if item.mode != "RGB":
            raise ValueError(
                f"{name} must have mode RGB, got {item.mode}; use image.convert('RGB')"
            )
        item = np.array(item)
    if isinstance(item, np.ndarray):
        if item.ndim not in (3, 4) or item.shape[-1] != 3:
            raise ValueError(
                f"{name} as an array must be [H, W, 3] or [B, H, W, 3], got {item.shape}"
            )
        if item.dtype != np.uint8 and item.dtype.kind != "f":
            raise TypeError(f"{name} must be uint8 or floating, got {item.dtype}")
        # a copy: torch wants memory that may be written, in the machine's byte order
        kind = np.uint8 if item.dtype == np.uint8 else np.float32
        tensor = torch.from_numpy(item.astype(kind, order="C")).movedim(-1, -3)
    elif isinstance(item, Tensor):
        if item.ndim not in (3, 4) or item.shape[-3] != 3:
            raise ValueError(
                f"{name} as a tensor must be [3, H, W] or [B, 3, H, W], got {tuple(item.shape)}"
            )
        tensor = item.detach().cpu()
    else:
        raise TypeError(
            f"{name} must be a PIL image, a numpy array, a tensor or a list of these, got "
            f"{type(item).__name__}"
        )
    tensor = tensor if tensor.ndim == 4 else tensor[None]
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floating, got {tensor.dtype}")
    tensor = tensor.float()
    if tensor.numel() and not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(
            f"{name} must have finite values in [0, 1], got {tensor.min():.3g} … {tensor.max():.3g}"
        )
    return tensor
