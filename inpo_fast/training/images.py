"""Pixels of a pair: decoding, the bucket that both images share, crop, flip and sizes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pairs import CorruptImage

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width."""

FACTOR = 8
"""Pixels to a latent along a side, in every autoencoder of these families."""


class View(NamedTuple):
    """What the model sees of an image."""

    pixels: Tensor
    """[3, H, W] uint8"""
    time_ids: Tensor
    """[6] int64, SDXL's: original height and width, top and left of the crop, height and width."""


@dataclass(frozen=True)
class Preprocess:
    """From images of any size to those of a batch.

    An image is scaled (bilinear, antialiased) until it just covers its bucket, mirrored if its pair
    is, then cropped: in the centre, or at random at the same relative place for both images.

    Attributes:
        buckets: sizes of the batches.
        random_crop: see above.
        flip: mirror a pair in half of the epochs.
    """

    buckets: tuple[Size, ...]
    random_crop: bool = False
    flip: bool = True

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets must hold at least one size, got none")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"buckets must differ, got {self.buckets}")
        for size in self.buckets:
            if any(side < FACTOR or side % FACTOR for side in size):
                raise ValueError(
                    f"height and width of a bucket must be positive multiples of {FACTOR}, got "
                    f"{size[0]},{size[1]}"
                )

    @classmethod
    def of_flags(
        cls,
        *,
        resolution: int | None = None,
        aspect_ratio_buckets: str | None = None,
        random_crop: bool = False,
        no_hflip: bool = False,
    ) -> Preprocess:
        """Read the flags that diffusers' scripts have; buckets are written `h,w;h,w` and take
        the place of the resolution.

        Raises:
            ValueError: naming the flag.
        """
        if aspect_ratio_buckets is None:
            if resolution is None or resolution < FACTOR or resolution % FACTOR:
                raise ValueError(
                    f"resolution must be a positive multiple of {FACTOR}, got {resolution}"
                )
            buckets = [(resolution, resolution)]
        else:
            written = [part.strip() for part in aspect_ratio_buckets.split(";")]
            matches = [re.fullmatch(r"(\d+)\s*,\s*(\d+)", part) for part in written]
            if not all(matches):
                raise ValueError(
                    f"aspect_ratio_buckets must be written h,w;h,w, got {aspect_ratio_buckets!r}"
                )
            buckets = [(int(match[1]), int(match[2])) for match in matches if match]
        return cls(tuple(buckets), random_crop=random_crop, flip=not no_hflip)

    def bucket_of(self, sizes: Sequence[Size]) -> int:
        """The bucket nearest in aspect to the images of a pair together.

        Σ_i |h_i·w_b − w_i·h_b| / √(h_i·w_i) is least; for images of one size that is the bucket
        that diffusers chooses for one, the later of two that are equally near.
        """

        def distance(bucket: Size) -> float:
            high, wide = bucket
            return sum(abs(h * wide - w * high) / math.sqrt(h * w) for h, w in sizes)

        distances = [distance(bucket) for bucket in self.buckets]
        nearest = min(distances)
        return max(i for i, value in enumerate(distances) if value == nearest)

    def view(
        self, image: Image, bucket: int, *, flipped: bool, place: tuple[float, float] | None = None
    ) -> View:
        """What the model sees of `image`.

        Args:
            image: RGB.
            bucket: of its pair.
            flipped: mirror it left to right.
            place: of the crop, down and across, 0 at the start and 1 at the end of what there is to
                choose from; None is the centre.
        """
        from PIL import Image as pil

        high, wide = self.buckets[bucket]
        width, height = image.size
        scale = max(high / height, wide / width)
        scaled = max(high, round(height * scale)), max(wide, round(width * scale))
        picture = image.resize(scaled[::-1], pil.Resampling.BILINEAR)
        if flipped:
            picture = picture.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        slack = scaled[0] - high, scaled[1] - wide
        if place is None:
            top, left = (round(free / 2) for free in slack)
        else:
            top, left = (
                min(int(at * (free + 1)), free) for at, free in zip(place, slack, strict=True)
            )
        pixels = np.array(picture.crop((left, top, left + wide, top + high)))
        ids = torch.tensor([height, width, top, left, high, wide])
        return View(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), ids)

    def to_json(self) -> dict[str, Any]:
        return {
            "buckets": [list(size) for size in self.buckets],
            "random_crop": self.random_crop,
            "flip": self.flip,
        }


def decode(data: bytes) -> Image:
    """The RGB image of encoded bytes, upright, fully decoded.

    Raises:
        CorruptImage: it cannot be decoded to its last pixel.
    """
    from PIL import Image as pil
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with pil.open(io.BytesIO(data)) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        # Pillow's own message holds an address
        raise CorruptImage("not an image in a known format") from error
    # Pillow's readers raise whatever their format's parser happens to: OSError, SyntaxError,
    # struct.error, zlib.error, DecompressionBombError …
    except Exception as error:
        raise CorruptImage(f"{type(error).__name__}: {error}") from error


def to_unit(pixels: Tensor) -> Tensor:
    """Float32 in [−1, 1] of uint8 pixels."""
    return pixels.float() / 127.5 - 1
