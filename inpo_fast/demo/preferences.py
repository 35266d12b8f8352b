"""Preference pairs for part 3: read, encoded once, and dealt out in batches of equal depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..training.images import decode, to_unit
from ..training.pairs import DataError, Ties, pair_of
from ..training.sources import open_source
from ..training.timesteps import inversion_depth
from .pipeline import DemoError, Pipeline


class Pairs(NamedTuple):
    """Preference pairs as the training sees them: nothing is encoded twice."""

    winners: Tensor  # [P, 4, h, w]
    losers: Tensor  # [P, 4, h, w]
    text: Tensor  # [P, L, D]


class MicroBatch(NamedTuple):
    """Pairs whose noisy latents need the same number of inversion steps."""

    chosen: Tensor  # [P], which of the pairs
    timesteps: list[int]  # [P]
    depth: int


def depth_buckets(
    first_timestep: int, num_train_timesteps: int, max_depth: int
) -> list[tuple[int, list[int]]]:
    """The timesteps from `first_timestep` to T−1 by the number of inversion steps that reach them.

    Returns:
        (depth, timesteps) by rising depth, none of them empty.
    """
    buckets: dict[int, list[int]] = {}
    for timestep in range(first_timestep, num_train_timesteps):
        depth = inversion_depth(timestep, num_train_timesteps, max_depth)
        buckets.setdefault(depth, []).append(timestep)
    return list(buckets.items())


def plan(
    num_pairs: int,
    buckets: Sequence[tuple[int, Sequence[int]]],
    *,
    steps: int,
    pairs: int,
    seed: int,
) -> list[list[MicroBatch]]:
    """The micro-batches of every optimiser step: one a bucket, so that a step covers all timesteps.

    Every pair has a timestep of its own, uniform in the bucket. All pairs are seen once before any
    is seen again.

    Args:
        num_pairs: pairs to draw from.
        buckets: see `depth_buckets`.
        steps, pairs: optimiser steps, and pairs of a micro-batch.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = steps * len(buckets) * pairs
    epochs = -(-needed // num_pairs)
    order = torch.cat([torch.randperm(num_pairs, generator=generator) for _ in range(epochs)])
    chunks = iter(order[:needed].split(pairs))
    return [
        [
            MicroBatch(next(chunks), _draw(timesteps, pairs, generator), depth)
            for depth, timesteps in buckets
        ]
        for _ in range(steps)
    ]


def _draw(values: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    picks = torch.randint(len(values), (count,), generator=generator)
    return [values[pick] for pick in picks.tolist()]


def load_pairs(path: Path, pipeline: Pipeline, wanted: int, seed: int) -> Pairs:
    """Read up to `wanted` random pairs of a Pick-a-Pic table, ties left out, and encode them.

    Raises:
        DemoError: the table is missing or cannot be read.
    """
    try:
        source = open_source(path)
        read = (pair_of(record, row, Ties("drop")) for row, record in source.records())
        pairs = [pair for pair in read if pair is not None]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        pairs = [pairs[i] for i in order[:wanted].tolist()]
        winners = torch.stack([_pixels(pair.winner) for pair in pairs])
        losers = torch.stack([_pixels(pair.loser) for pair in pairs])
    except DataError as error:
        raise DemoError(f"no preference pairs can be read from {path}: {error}") from error
    return Pairs(
        pipeline.encode(winners),
        pipeline.encode(losers),
        pipeline.embed([pair.caption for pair in pairs]),
    )


def _pixels(data: bytes) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    return to_unit(torch.from_numpy(np.array(decode(data))).permute(2, 0, 1))
