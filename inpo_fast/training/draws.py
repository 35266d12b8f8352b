"""Random draws that depend on what they are for, never on who makes them or in which order.

A draw is a function of (purpose, seed, epoch, pair). Workers, ranks, a resumed run and the
cached and the live path therefore all see the same flips, crops and posterior noise.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for; equal seeds give independent draws for different purposes."""

    ORDER = 0
    TIE = 1
    FLIP = 2
    CROP = 3
    POSTERIOR = 4
    EMPTY_PROMPT = 5
    TIMESTEP = 6
    NOISE = 7


def uniform(purpose: Purpose, *key: int) -> float:
    """A number in [0, 1) for the key, as a rule (seed, epoch, pair)."""
    # 53 bits, as many as a float64 has
    return int(_state(purpose, key) >> np.uint64(11)) * 2.0**-53


def normal(purpose: Purpose, *key: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers of `shape` for the key, made on the CPU."""
    return torch.randn(shape, generator=generator(purpose, *key))


def generator(purpose: Purpose, *key: int) -> torch.Generator:
    """A CPU generator for the key."""
    # torch takes seeds below 2^63 on every platform
    return torch.Generator().manual_seed(int(_state(purpose, key) >> np.uint64(1)))


def _state(purpose: Purpose, key: tuple[int, ...]) -> np.uint64:
    if any(part < 0 for part in key):
        raise ValueError(f"seed, epoch and index must not be negative, got {key}")
    state: np.uint64 = np.random.SeedSequence([purpose, *key]).generate_state(1, np.uint64)[0]
    return state
