"""Intervals of a win rate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(wins: float, trials: int) -> Interval:
    """Wilson's score interval (1927) of a rate, for independent trials; a tie is half a win.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Raises:
        ValueError: no trial, or wins outside 0 … trials.
    """
    if trials < 1 or not 0 <= wins <= trials:
        raise ValueError(f"wins must be in 0 … trials and trials positive, got {wins} of {trials}")
    p, square = wins / trials, _Z**2
    centre = p + square / (2 * trials)
    half = _Z * float(np.sqrt(p * (1 - p) / trials + square / (4 * trials**2)))
    scale = 1 + square / trials
    # at p = 0 and 1 the bound is exact but for rounding
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def bootstrap(values: NDArray[np.float64], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile interval of the mean over prompts.

    Images of one prompt are alike, so whole prompts are resampled.

    Args:
        values: [P, S] of P prompts with S seeds.
        resamples: draws of P prompts with replacement.
        seed: of the draws.

    Raises:
        ValueError: nothing to resample.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be [prompts, seeds], not empty, got {values.shape}")
    means = values.mean(axis=1)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975])
    return Interval(float(low), float(high))
