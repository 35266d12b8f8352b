"""Pairs that are decoded and encoded while training: nothing to prepare, slower than a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .batch import PairBatch
from .encoders import Encoders
from .examine import Report, Rules, examine
from .images import decode
from .loader import PairData, Randomness
from .order import Pick
from .pairs import DataError, pair_of
from .sources import IndexedSource, Source
from .stored import Sample, collate


class LivePairs(PairData):
    """The usable pairs of a source, encoded batch by batch.

    All images are decoded once when it is made: so the batches of every step are known, corrupt
    pairs are out, and a run can be resumed at any step.

    Args:
        source: see `sources.open_source`; a stream has no random access and must be cached first.
        rules: preprocessing and ties.
        encoders: they stay in memory.
        num_workers: processes of the first pass.

    Raises:
        DataError: no pair can be used, or see `pairs.pair_of`.
    """

    def __init__(
        self, source: Source, rules: Rules, encoders: Encoders, *, num_workers: int = 0
    ) -> None:
        if not isinstance(source, IndexedSource):
            raise DataError(
                f"{source.name} is a stream and has no random access: write a cache of it "
                f"(inpo-fast cache) and train from that"
            )
        self._source, self._rules, self._encoders = source, rules, encoders
        self.report = Report()
        """Counts of the first pass."""
        self._rows: list[int] = []
        self._buckets: list[int] = []
        seen: set[bytes] = set()
        findings = examine(source, rules, num_workers=num_workers)
        for found in tqdm(findings, total=len(source), desc="Pairs", unit="row"):
            self.report.add(found, rules.preprocess, seen)
            if found.pair is not None:
                self._rows.append(found.row)
                self._buckets.append(found.pair.bucket)
        if not self._rows:
            raise DataError(f"{source.name} has no usable pair:\n{self.report.text()}")
        self._captions: dict[str, dict[str, Tensor]] = {"": encoders.text("")}

    @property
    def buckets(self) -> Sequence[int]:
        return self._buckets

    def _items(self, randomness: Randomness) -> Dataset[Any]:
        return _Views(self._source, self._rules, self._rows, self._buckets, randomness)

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
        rows: list[int],
        buckets: list[int],
        randomness: Randomness,
    ) -> None:
        self.source, self.rules, self.rows, self.buckets = source, rules, rows, buckets
        self.randomness = randomness

    def __getitem__(self, pick: Pick) -> _Item:
        row, bucket = self.rows[pick.position], self.buckets[pick.position]
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
