"""Preference pairs for part 3: read and encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..training.images import decode, to_unit
from ..training.pairs import DataError, Ties, pair_of
from ..training.sources import open_source
from .pipeline import DemoError, Pipeline


class Pairs(NamedTuple):
    """Preference pairs as the training sees them: nothing is encoded twice."""

    winners: Tensor  # [P, 4, h, w]
    losers: Tensor  # [P, 4, h, w]
    text: Tensor  # [P, L, D]


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
