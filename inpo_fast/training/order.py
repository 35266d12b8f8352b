"""The order of the pairs: a pure function of the seed, with any step at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import draws

Last = Literal["drop", "pad"]


class Pick(NamedTuple):
    """A pair of a batch: what a worker needs to make it."""

    epoch: int
    position: int
    """Of the pair in the data set."""


class BatchOrder:
    """Batches of every step, for ever: step k is a function of (k, seed, rank) and no other state.

    In an epoch the pairs of each bucket are shuffled and cut into global batches of
    `world_size · batch_size`, and the global batches of all buckets are shuffled. A rank takes its
    own part of each, so all ranks have one image size at a step, and no pair is seen twice in an
    epoch.

    Args:
        buckets: bucket of every pair.
        batch_size: P, pairs of a rank's batch.
        seed, rank, world_size: as they say.
        last: what becomes of the pairs of a bucket that fill no global batch. `drop` leaves them
            out of this epoch (another epoch has others). `pad` fills the batch with pairs of the
            same bucket that the epoch has had already.

    Raises:
        ValueError: naming the argument; no bucket has pairs for one batch.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        last: Last = "drop",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 … {world_size - 1}, got {rank}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if last not in ("drop", "pad"):
            raise ValueError(f"last must be 'drop' or 'pad', got {last!r}")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.last = last
        given = np.asarray(buckets, dtype=np.int64)
        self._members = [np.flatnonzero(given == bucket) for bucket in np.unique(given)]
        size = batch_size * world_size
        counts = [len(members) for members in self._members]
        round_up = size - 1 if last == "pad" else 0
        self.steps_per_epoch = sum((count + round_up) // size for count in counts)
        """Steps of an epoch, the same for every epoch and rank."""
        self.left_out = sum(count % size for count in counts) if last == "drop" else 0
        """Pairs that an epoch does not see."""
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"no bucket has the {size} pairs that a batch takes (batch_size {batch_size} on "
                f"{world_size} ranks): the buckets have {counts} pairs; lower batch_size or set "
                f"last='pad'"
            )
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> list[Pick]:
        """The batch of this rank at `step`, counted over all epochs."""
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._epoch(epoch)[place, self.rank]
        return [Pick(epoch, position) for position in chosen.tolist()]

    def from_step(self, start: int) -> Iterator[list[Pick]]:
        """The batches of steps `start`, `start` + 1, … without end."""
        step = start
        while True:
            yield self[step]
            step += 1

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """[steps, world_size, batch_size] positions."""
        generator = draws.generator(draws.Purpose.ORDER, self.seed, epoch)
        size = self.batch_size * self.world_size
        batches = []
        for members in self._members:
            order = members[torch.randperm(len(members), generator=generator).numpy()]
            if self.last == "pad":
                # np.resize starts over, as often as a small bucket needs
                order = np.resize(order, -(-len(order) // size) * size)
            batches.append(order[: len(order) // size * size].reshape(-1, size))
        stacked = np.concatenate(batches)
        stacked = stacked[torch.randperm(len(stacked), generator=generator).numpy()]
        shuffled: NDArray[np.int64] = stacked.reshape(-1, self.world_size, self.batch_size)
        return shuffled
