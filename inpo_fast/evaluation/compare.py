"""Draw the same prompts from the same noise with two models, score, and count wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .scorers import Scorer, check_prompts
from .statistics import Interval, bootstrap, wilson


@dataclass(frozen=True)
class Settings:
    """What both models draw.

    Attributes:
        prompts: of the images.
        seeds: an image each; the noise is drawn on the CPU, for every image by itself.
        steps: of the sampling, with the scheduler of each pipeline.
        guidance: scale.
        height, width: None for what the pipeline draws by default.
        batch_size: images of a call.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 50
    guidance: float = 7.5
    height: int | None = None
    width: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Comparison:
    """By one scorer.

    Attributes:
        candidate, baseline: [P][S] scores of P prompts with S seeds.
        win_rate: of the candidate over images of equal prompt and seed, ties counting half.
        ties: images with equal scores.
        wilson_95: of the win rate, as if all images were independent.
        bootstrap_95: of the win rate, over prompts.
        difference: mean of candidate − baseline.
        difference_95: bootstrapped over prompts.
    """

    scorer: str
    candidate: list[list[float]]
    baseline: list[list[float]]
    win_rate: float
    ties: int
    wilson_95: Interval
    bootstrap_95: Interval
    difference: float
    difference_95: Interval

    @classmethod
    def of(cls, scorer: str, candidate: Tensor, baseline: Tensor) -> Comparison:
        """Count the wins of scores [P, S].

        Raises:
            ValueError: a score that is not finite.
        """
        mine, theirs = (scores.double().cpu().numpy() for scores in (candidate, baseline))
        for name, scores in (("candidate", mine), ("baseline", theirs)):
            if not np.isfinite(scores).all():
                raise ValueError(f"the scores of {scorer} for the {name} must be finite")
        wins = (mine > theirs) + 0.5 * (mine == theirs)
        difference = mine - theirs
        return cls(
            scorer,
            mine.tolist(),
            theirs.tolist(),
            float(wins.mean()),
            int((mine == theirs).sum()),
            wilson(float(wins.sum()), wins.size),
            bootstrap(wins),
            float(difference.mean()),
            bootstrap(difference),
        )

    def text(self) -> str:
        """One line for people."""
        low, high = self.bootstrap_95
        return (
            f"{self.scorer}: the candidate wins {self.win_rate:.1%} "
            f"(95 % interval over prompts {low:.1%} … {high:.1%}), mean difference "
            f"{self.difference:+.4g} ({self.difference_95.low:+.4g} … "
            f"{self.difference_95.high:+.4g})"
        )


def compare(
    candidate: Callable[[], Any],
    baseline: Callable[[], Any],
    settings: Settings,
    scorers: Mapping[str, Scorer],
    *,
    keep: Callable[[str, int, int, Tensor], object] | None = None,
) -> tuple[list[Comparison], dict[str, Any]]:
    """Compare two models.

    Args:
        candidate, baseline: load a pipeline; only one is in memory at a time.
        settings: what is drawn.
        scorers: by name.
        keep: called with (`candidate` or `baseline`, prompt, seed, image [3, H, W]) for each image.

    Returns:
        a comparison for each scorer, and the scheduler of each model.

    Raises:
        ValueError: prompts that a scorer refuses, before anything is drawn, or see `Comparison.of`.
    """
    check_prompts(scorers, settings.prompts)
    scores: dict[str, dict[str, Tensor]] = {}
    schedulers: dict[str, Any] = {}
    for name, load in (("candidate", candidate), ("baseline", baseline)):
        pipeline = load()
        schedulers[name] = {
            "class": type(pipeline.scheduler).__name__,
            **{k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
        }
        scores[name] = _score(pipeline, settings, scorers, name, keep)
        del pipeline
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    compared = [
        Comparison.of(scorer, scores["candidate"][scorer], scores["baseline"][scorer])
        for scorer in scorers
    ]
    return compared, schedulers


def _score(
    pipeline: Any,
    settings: Settings,
    scorers: Mapping[str, Scorer],
    name: str,
    keep: Callable[[str, int, int, Tensor], object] | None,
) -> dict[str, Tensor]:
    """[P, S] by scorer."""
    places = [(p, s) for p in range(len(settings.prompts)) for s in range(len(settings.seeds))]
    found: dict[str, list[Tensor]] = {scorer: [] for scorer in scorers}
    size = settings.batch_size
    for start in tqdm(range(0, len(places), size), desc=name.capitalize(), unit="batch"):
        part = places[start : start + size]
        prompts = [settings.prompts[p] for p, _ in part]
        images = _draw(pipeline, settings, prompts, [settings.seeds[s] for _, s in part])
        for scorer, score in scorers.items():
            found[scorer].append(score(images, prompts))
        if keep is not None:
            for (prompt, seed), image in zip(part, images, strict=True):
                keep(name, prompt, seed, image)
    shape = (len(settings.prompts), len(settings.seeds))
    return {scorer: torch.cat(values).view(shape) for scorer, values in found.items()}


def _draw(
    pipeline: Any, settings: Settings, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """[B, 3, H, W] images in [0, 1]."""
    images: Tensor = pipeline(
        list(prompts),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images


def as_json(settings: Settings, compared: Sequence[Comparison]) -> dict[str, Any]:
    """Settings and comparisons, with what the intervals are."""
    return {
        "settings": asdict(settings),
        "intervals": "95 %; wilson_95 takes images as independent, bootstrap_95 and difference_95 "
        "are percentiles of 10000 resamples of prompts (seed 0)",
        "comparisons": [asdict(comparison) for comparison in compared],
    }
