"""Pairs that are decoded and encoded while training: nothing to prepare, slower than a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import PairBatch
from .encoders import Encoders
from .examine import Catalogue, Rules
from .images import decode
from .loader import PairData, Randomness
from .order import Pick
from .pairs import DataError, pair_of
from .sources import IndexedSource, Source
from .stored import Sample, collate


class LivePairs(PairData):
    """The usable pairs of a source, encoded batch by batch.

    All images are decoded once beforehand: so the batches of every step are known, corrupt pairs
    are out, and a run can be resumed at any step.

    Args:
        source: see `sources.open_source`; a stream has no random access and must be cached first.
        rules: preprocessing and ties.
        encoders: they stay in memory.
        catalogue: of the source under the same rules, for ranks that get it from the first one;
            None makes it here.
        num_workers: processes of that pass.

    Raises:
        DataError: no pair can be used, or see `pairs.pair_of`.
    """

    def __init__(
        self,
        source: Source,
        rules: Rules,
        encoders: Encoders,
        *,
        catalogue: Catalogue | None = None,
        num_workers: int = 0,
    ) -> None:
        if not isinstance(source, IndexedSource):
            raise DataError(
                f"{source.name} is a stream and has no random access: write a cache of it "
                f"(inpo-fast cache) and train from that"
            )
        self._source, self._rules, self._encoders = source, rules, encoders
        if catalogue is None:
            catalogue = Catalogue.of(source, rules, num_workers=num_workers)
        self.catalogue, self.report = catalogue, catalogue.report
        if not catalogue.rows:
            raise DataError(f"{source.name} has no usable pair:\n{self.report.text()}")
        self._captions: dict[str, dict[str, Tensor]] = {"": encoders.text("")}

    @property
    def buckets(self) -> Sequence[int]:
        return self.catalogue.buckets

    @property
    def sure(self) -> bool:
        return self._rules.ties.mode != "soft" or self.catalogue.report.ties == 0

    def _items(self, randomness: Randomness) -> Dataset[Any]:
        return _Views(self._source, self._rules, self.catalogue, randomness)

    @staticmethod
    def _collate(items: list[Any]) -> list[_Item]:
        return items

    def _finish(self, items: Any, randomness: Randomness, device: torch.device) -> PairBatch:
        return collate([self._encode(item, randomness) for item in items]).to(device)

    def _encode(self, item: _Item, randomness: Randomness) -> Sample:
        encoders = self._encoders
        mean, std = encoders.posterior(item.pixels, item.row)
        noise = randomness.posterior_noise(item.pick, tuple(mean.shape)).to(mean.device)
        empty = randomness.drop_caption(item.pick)
        return Sample(
            encoders.scaling.sample(mean, std, noise),
            self._captions[""] if empty else encoders.text(item.caption),
            item.time_ids.to(mean.device) if encoders.family.time_ids else None,
            item.label,
            item.row,
            item.pick.epoch,
        )


class _Item(NamedTuple):
    pixels: Tensor  # [2, 3, H, W] uint8
    time_ids: Tensor  # [2, 6]
    caption: str
    label: float
    row: int
    pick: Pick


class _Views(Dataset[Any]):
    """Pixels of a pick: what a worker does."""

    def __init__(
        self,
        source: IndexedSource,
        rules: Rules,
        catalogue: Catalogue,
        randomness: Randomness,
    ) -> None:
        self.source, self.rules, self.catalogue = source, rules, catalogue
        self.randomness = randomness

    def __getitem__(self, pick: Pick) -> _Item:
        row, bucket = (part[pick.position] for part in self.catalogue[:2])
        preprocess = self.rules.preprocess
        pair = pair_of(self.source.record(row), row, self.rules.ties)
        if pair is None:
            raise DataError(f"row {row} of {self.source.name} has changed during the run")
        flipped = preprocess.flip and self.randomness.flip(pick)
        place = self.randomness.crop(pick) if preprocess.random_crop else None
        views = [
            preprocess.view(decode(data), bucket, flipped=flipped, place=place)
            for data in (pair.winner, pair.loser)
        ]
        return _Item(
            torch.stack([view.pixels for view in views]),
            torch.stack([view.time_ids for view in views]),
            pair.caption,
            pair.label,
            row,
            pick,
        )
