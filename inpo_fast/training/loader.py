"""From pairs to batches: what every kind of pair data shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import draws
from .batch import PairBatch
from .examine import Report
from .order import BatchOrder, Last, Pick
from .workers import worker_options


@dataclass(frozen=True)
class Randomness:
    """How the draws of a run are made; see `draws`.

    Attributes:
        seed: of all of them.
        proportion_empty_prompts: probability that a pair's caption is replaced by the empty prompt.
    """

    seed: int
    proportion_empty_prompts: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(
                f"proportion_empty_prompts must be in [0, 1], got {self.proportion_empty_prompts}"
            )

    def flip(self, pick: Pick) -> bool:
        """Whether both images of the pair are mirrored."""
        return draws.uniform(draws.Purpose.FLIP, self.seed, *pick) < 0.5

    def crop(self, pick: Pick) -> tuple[float, float]:
        """Where both images are cropped, down and across, each in [0, 1)."""
        down, across = (
            draws.uniform(draws.Purpose.CROP, self.seed, *pick, axis) for axis in (0, 1)
        )
        return down, across

    def drop_caption(self, pick: Pick) -> bool:
        if not self.proportion_empty_prompts:
            return False
        drawn = draws.uniform(draws.Purpose.EMPTY_PROMPT, self.seed, *pick)
        return drawn < self.proportion_empty_prompts

    def posterior_noise(self, pick: Pick, shape: tuple[int, ...]) -> Tensor:
        """ε of both images, float32 of `shape`."""
        return draws.normal(draws.Purpose.POSTERIOR, self.seed, *pick, shape=shape)


class PairData(ABC):
    """Preference pairs that a trainer draws batches from.

    Attributes:
        report: counts of the source, with the rows that are left out as corrupt; None where nothing
            was counted.
    """

    report: Report | None = None

    @property
    @abstractmethod
    def buckets(self) -> Sequence[int]:
        """Bucket, that is image size, of every pair."""

    @property
    @abstractmethod
    def sure(self) -> bool:
        """Whether every label is 1: no pair whose winner may be the worse one."""

    @abstractmethod
    def _items(self, randomness: Randomness) -> Dataset[Any]:
        """A picklable data set that makes an item of a `Pick` in a worker."""

    @abstractmethod
    def _finish(self, items: Any, randomness: Randomness, device: torch.device) -> PairBatch:
        """The batch on `device`, of collated items."""

    @staticmethod
    @abstractmethod
    def _collate(items: list[Any]) -> Any:
        """One picklable object of the items of a batch, in a worker."""

    def __len__(self) -> int:
        return len(self.buckets)

    def order(
        self,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        last: Last = "drop",
    ) -> BatchOrder:
        """The order in which `loader` with these arguments takes the pairs."""
        return BatchOrder(
            self.buckets,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            last=last,
        )

    def loader(
        self,
        order: BatchOrder,
        *,
        start: int = 0,
        proportion_empty_prompts: float = 0.0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> Iterator[PairBatch]:
        """Batches of steps `start`, `start` + 1, … of `order`, without end.

        Step k is the same batch, to the bit, whatever `start` and `num_workers` are.

        Args:
            order: see `order`; its seed is that of the flips, crops and posterior noise too.
            start: first step, of all epochs; a resumed run passes the steps it has done.
            proportion_empty_prompts: probability that a caption is replaced by the empty prompt.
            num_workers: processes that read and decode; 0 does it here.
            device: of the batches.
        """
        randomness = Randomness(order.seed, proportion_empty_prompts)
        device = torch.device(device)
        loader = DataLoader(
            self._items(randomness),
            batch_sampler=_Steps(order, start),
            collate_fn=self._collate,
            pin_memory=device.type == "cuda",
            **worker_options(num_workers),
        )
        return (self._finish(items, randomness, device) for items in _ahead(loader, device))


def _ahead(items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The items, each made in a thread while the one before it is used."""
    # here, as an iterator of a `DataLoader` draws from the caller's generator when it is made
    source, end = iter(items), object()
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index

    def begin() -> None:
        # a thread has the first GPU as its current one, and pins memory for it
        if gpu is not None:
            torch.cuda.set_device(gpu)

    thread = ThreadPoolExecutor(1, "inpo-fast-batches", initializer=begin)
    try:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item
    finally:
        # not waited for: the garbage collector may drop this generator in that very thread
        thread.shutdown(wait=False)


class _Steps:
    """The batch sampler of a `DataLoader`."""

    def __init__(self, order: BatchOrder, start: int) -> None:
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[list[Pick]]:
        return self.order.from_step(self.start)
