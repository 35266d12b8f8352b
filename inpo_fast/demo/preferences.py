"""Preference pairs for part 3: read, encoded once, and dealt out in batches of equal depth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..training.latents import inversion_depth
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


def depth_buckets(num_train_timesteps: int, depths: int) -> list[list[int]]:
    """The timesteps 1 … T−1 by the number of inversion steps that reach them, 1 … `depths`."""
    buckets: list[list[int]] = [[] for _ in range(depths)]
    for timestep in range(1, num_train_timesteps):
        buckets[inversion_depth(timestep, num_train_timesteps, depths) - 1].append(timestep)
    return buckets


def plan(
    num_pairs: int,
    *,
    steps: int,
    pairs: int,
    depths: int,
    num_train_timesteps: int,
    seed: int,
) -> list[list[MicroBatch]]:
    """The micro-batches of every optimiser step: one a depth, so that a step covers all timesteps.

    Every pair has a timestep of its own, uniform in the bucket. All pairs are seen once before any
    is seen again.

    Args:
        num_pairs: pairs to draw from.
        steps, pairs, depths: optimiser steps, pairs of a micro-batch, micro-batches of a step.
    """
    generator = torch.Generator().manual_seed(seed)
    buckets = depth_buckets(num_train_timesteps, depths)
    needed = steps * depths * pairs
    epochs = -(-needed // num_pairs)
    order = torch.cat([torch.randperm(num_pairs, generator=generator) for _ in range(epochs)])
    chunks = iter(order[:needed].split(pairs))
    return [
        [
            MicroBatch(next(chunks), _draw(bucket, pairs, generator), depth)
            for depth, bucket in enumerate(buckets, start=1)
        ]
        for _ in range(steps)
    ]


def _draw(values: list[int], count: int, generator: torch.Generator) -> list[int]:
    picks = torch.randint(len(values), (count,), generator=generator)
    return [values[pick] for pick in picks.tolist()]


def load_pairs(path: Path, pipeline: Pipeline, wanted: int, seed: int) -> Pairs:
    """Read up to `wanted` random pairs of a Pick-a-Pic table, ties left out, and encode them.

    Raises:
        DemoError: the table is missing or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = ["jpg_0", "jpg_1", "label_0", "caption"]
        table = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DemoError(f"no preference pairs can be read from {path}: {error}") from error
    rows = [row for row in table if row["label_0"] != 0.5]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = [rows[i] for i in order[:wanted].tolist()]
    winners, losers = [], []
    for row in rows:
        first, second = (_decode_jpeg(row[column]) for column in ("jpg_0", "jpg_1"))
        winners.append(first if row["label_0"] == 1 else second)
        losers.append(second if row["label_0"] == 1 else first)
    return Pairs(
        pipeline.encode(torch.stack(winners)),
        pipeline.encode(torch.stack(losers)),
        pipeline.embed([row["caption"] for row in rows]),
    )


def _decode_jpeg(data: bytes) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
