"""Which noise levels a micro-batch trains on: t uniform, the number of inversion steps shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


def inversion_depth(timestep: int, num_train_timesteps: int = 1000, max_steps: int = 10) -> int:
    """n = ⌈(t+1) · max_steps / T⌉: inversion steps of the paper's grid that reach level t.

    t counts from 0, so it is the (t+1)-th of T levels; counted so, every depth has the same share
    of the levels.
    """
    return -(-(timestep + 1) * max_steps // num_train_timesteps)


def even_grid(timesteps: Sequence[int] | NDArray[np.int64], num_steps: int) -> NDArray[np.int64]:
    """[n, B] levels of n equal steps (to the nearest level) from clean data to each t.

    Raises:
        ValueError: n outside 1 … t+1, where two steps would fall within one level.
    """
    levels = np.asarray(timesteps, dtype=np.int64) + 1  # [B]
    lowest = int(levels.min())
    if not 1 <= num_steps <= lowest:
        raise ValueError(
            f"num_steps must be in 1 … {lowest} for the timestep {lowest - 1}, so that no two "
            f"steps fall within one timestep, got {num_steps}"
        )
    k = np.arange(1, num_steps + 1)[:, None]
    return np.rint(levels * k / num_steps).astype(np.int64) - 1


class Draw(NamedTuple):
    """The levels of one micro-batch."""

    grid: NDArray[np.int64]
    """[n, B] levels of the inversion's nodes 1 … n."""
    train_at: tuple[int, ...]
    """The nodes that are training samples; the last is n."""


class TimestepSampler:
    """Draw levels t uniformly while every micro-batch shares its number of inversion steps n.

    The levels fall into `max_steps` buckets by `inversion_depth`. A micro-batch draws n with the
    share of its bucket and then a t of its own for each sample, uniform in the bucket, so t is
    exactly uniform. Its grid ends at t and steps back by T/max_steps: …, t − 2T/N, t − T/N, t.

    With several samples an inversion the bucket's place is drawn instead, uniformly, and a random
    set of buckets, uniform among the sets of that size: one path through all of them visits the
    same place in every bucket. Each sample's t is again exactly uniform; the path ends at the
    deepest. This needs buckets of one size.

    Args:
        num_train_timesteps: T.
        max_steps: steps that would reach the last level, 10 in the paper.
        samples_per_inversion: levels of one path that are trained on; 1 is the paper.
        first_timestep: t is uniform in first_timestep … T−1.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        max_steps: int = 10,
        *,
        samples_per_inversion: int = 1,
        first_timestep: int = 0,
    ) -> None:
        total = num_train_timesteps
        if not 1 <= max_steps <= total:
            raise ValueError(f"max_steps must be in 1 … {total}, got {max_steps}")
        if not 0 <= first_timestep < total:
            raise ValueError(f"first_timestep must be in 0 … {total - 1}, got {first_timestep}")
        self.num_train_timesteps, self.max_steps = total, max_steps
        self.samples_per_inversion = samples_per_inversion
        self.first_timestep = first_timestep
        depth = [inversion_depth(t, total, max_steps) for t in range(first_timestep, total)]
        depths, starts, sizes = np.unique(depth, return_index=True, return_counts=True)
        self._depths, self._starts, self._sizes = depths, starts + first_timestep, sizes
        if not 1 <= samples_per_inversion <= len(depths):
            raise ValueError(
                f"samples_per_inversion must be in 1 … {len(depths)}, the depths there are, got "
                f"{samples_per_inversion}"
            )
        if samples_per_inversion > 1 and len(set(sizes.tolist())) > 1:
            raise ValueError(
                "samples_per_inversion > 1 needs buckets of one size: max_steps must divide "
                f"num_train_timesteps and first_timestep must begin a bucket, got {max_steps}, "
                f"{total} and {first_timestep}"
            )

    @property
    def mean_calls(self) -> float:
        """Model calls of a path before its last sample, on average."""
        count, chosen = len(self._depths), self.samples_per_inversion
        if chosen == 1:
            return float((self._depths * self._sizes).sum() / self._sizes.sum())
        # the largest of `chosen` among 1 … count, and the depths below the first bucket
        return float(self._depths[0] - 1 + chosen * (count + 1) / (chosen + 1))

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draw:
        """The levels of `count` samples.

        Args:
            count: B, pairs or samples.
            generator: a CPU generator; its state is all the state there is.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if self.samples_per_inversion == 1:
            place = torch.randint(int(self._sizes.sum()), (1,), generator=generator).item()
            chosen = [int(np.searchsorted(np.cumsum(self._sizes), place, side="right"))]
        else:
            order = torch.randperm(len(self._depths), generator=generator)
            chosen = sorted(order[: self.samples_per_inversion].tolist())
        deepest = chosen[-1]
        offset = torch.randint(int(self._sizes[deepest]), (count,), generator=generator).numpy()
        levels = self._starts[deepest] + offset  # [B]
        depth = int(self._depths[deepest])
        back = np.arange(depth - 1, -1, -1)[:, None] * self.num_train_timesteps // self.max_steps
        train_at = tuple(int(self._depths[index]) for index in chosen)
        return Draw(levels - back, train_at)
