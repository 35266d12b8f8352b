"""Scorers: how good an image is for a prompt. Higher is better."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class ScorerError(RuntimeError):
    """A scorer cannot be used; the message says what to do."""


class Scorer(Protocol):
    """Scores a batch of images.

    One that cannot judge every prompt has a method `check(prompts)` too, which raises a ValueError:
    it is called before anything is drawn.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 of images [B, 3, H, W] in [0, 1] and their prompts."""
        ...


def make_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer called `name`, loaded.

    Raises:
        ValueError: no such name.
        ScorerError: its package or weights are missing.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {name!r}")
    return SCORERS[name](torch.device(device))


def check_prompts(scorers: Mapping[str, Scorer], prompts: Sequence[str]) -> None:
    """Refuse prompts that a scorer cannot judge.

    Raises:
        ValueError: naming the scorer and the prompt.
    """
    for name, scorer in scorers.items():
        check = getattr(scorer, "check", None)
        if check is None:
            continue
        try:
            check(prompts)
        except ValueError as error:
            raise ValueError(f"the scorer {name} cannot judge every prompt: {error}") from error


class _Attributes:
    """The fraction of the prompt's attributes that the shipped model's reader finds."""

    def __init__(self, device: torch.device) -> None:
        from .. import shipped

        self._shipped = shipped

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self._shipped.parse(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scenes = [self._shipped.parse(prompt) for prompt in prompts]
        return self._shipped.score(images.float() * 2 - 1, scenes).cpu()


def _jpeg_size(device: torch.device) -> Scorer:
    """Bytes of the image as JPEG of quality 95, a measure of detail."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(_jpeg_bytes(image)) for image in _pictures(images)])

    return score


def _jpeg_bytes(picture: Any) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def _clip(device: torch.device) -> Scorer:
    """CLIP score (Hessel et al. 2021): 100 · cosine of image and prompt, at least 0."""
    scored = _clip_cosine("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", device)
    return lambda images, prompts: (100 * scored(images, prompts)).clamp(min=0)


def _pickscore(device: torch.device) -> Scorer:
    """PickScore (Kirstain et al. 2023): 100 · cosine in the space of its CLIP-H."""
    scored = _clip_cosine(
        "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", device
    )
    return lambda images, prompts: 100 * scored(images, prompts)


def _clip_cosine(model: str, processor: str, device: torch.device) -> Scorer:
    from transformers import CLIPModel, CLIPProcessor

    try:
        loaded = CLIPModel.from_pretrained(model).eval().to(device)
        prepare = CLIPProcessor.from_pretrained(processor)
    except (OSError, ValueError) as error:
        raise ScorerError(
            f"the weights {model} cannot be loaded; fetch them with `hf download {model}`: {error}"
        ) from error

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        given = prepare(
            text=list(prompts),
            images=_pictures(images),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        output = loaded(**given)
        # both are of unit length
        cosine: Tensor = (output.image_embeds * output.text_embeds).sum(dim=1)
        return cosine.float().cpu()

    return score


def _hpsv2(device: torch.device) -> Scorer:
    """HPSv2.1 (Wu et al. 2023) of the package hpsv2."""
    hpsv2 = _package("hpsv2", "hpsv2")

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(_pictures(images), prompts, strict=True)
        scores = [hpsv2.score(image, prompt, hps_version="v2.1")[0] for image, prompt in pairs]
        return torch.tensor([float(value) for value in scores])

    return score


def _aesthetic(device: torch.device) -> Scorer:
    """LAION's aesthetic score (Schuhmann et al. 2022); the prompt plays no part."""
    predictors = _package("aesthetics_predictor", "simple-aesthetics-predictor")
    from transformers import CLIPProcessor

    name = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    try:
        loaded = predictors.AestheticsPredictorV2Linear.from_pretrained(name).eval().to(device)
        prepare = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ScorerError(
            f"the weights {name} cannot be loaded; fetch them with `hf download {name}`: {error}"
        ) from error

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        given = prepare(images=_pictures(images), return_tensors="pt").to(device)
        scores: Tensor = loaded(**given).logits.flatten()
        return scores.float().cpu()

    return score


def _package(module: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ScorerError(f"this scorer needs {name}: pip install {name} ({error})") from error


def _pictures(images: Tensor) -> list[Any]:
    """PIL images."""
    from PIL import Image

    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]


SCORERS: Mapping[str, Callable[[torch.device], Scorer]] = {
    "attributes": _Attributes,
    "jpeg-size": _jpeg_size,
    "clip": _clip,
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
    "aesthetic": _aesthetic,
}
"""By name: a function that loads the scorer on a device."""
