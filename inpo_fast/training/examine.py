"""The pass over a source that decides which pairs can be used, and counts what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .images import Preprocess, Size, decode
from .pairs import CorruptImage, DataError, Ties, is_tie, pair_of
from .sources import IndexedSource, Record, Source
from .workers import worker_options

if TYPE_CHECKING:
    from PIL.Image import Image


class Finding(NamedTuple):
    """What a row turned out to be."""

    row: int
    tie: bool
    problem: str | None
    """Why the pair is dropped as corrupt."""
    pair: FoundPair | None
    """None where the row gives no pair."""


class FoundPair(NamedTuple):
    """A usable pair."""

    caption: str
    label: float
    digest: bytes
    sizes: tuple[Size, Size]
    bucket: int
    pixels: Tensor | None
    """[V, 2, 3, H, W] uint8 of V views: as it is, and mirrored where pairs are mirrored."""
    time_ids: Tensor | None
    """[V, 2, 6]"""


@dataclass(frozen=True)
class Rules:
    """How rows become pairs."""

    preprocess: Preprocess
    ties: Ties = field(default_factory=Ties)

    def examine(self, row: int, record: Record, *, pixels: bool) -> Finding:
        """Decode the row's images completely; with `pixels`, prepare them for an encoder too."""
        tie = is_tie(record)
        try:
            pair = pair_of(record, row, self.ties)
            if pair is None:
                return Finding(row, tie, None, None)
            images = [_decoded(pair.winner, "winner"), _decoded(pair.loser, "loser")]
        except CorruptImage as error:
            return Finding(row, tie, str(error), None)
        first, second = ((image.height, image.width) for image in images)
        bucket = self.preprocess.bucket_of([first, second])
        views = time_ids = None
        if pixels:
            flips = (False, True) if self.preprocess.flip else (False,)
            seen = [
                [self.preprocess.view(image, bucket, flipped=flipped) for image in images]
                for flipped in flips
            ]
            views = torch.stack([torch.stack([view.pixels for view in both]) for both in seen])
            time_ids = torch.stack([torch.stack([view.time_ids for view in both]) for both in seen])
        found = FoundPair(
            pair.caption, pair.label, pair.digest(), (first, second), bucket, views, time_ids
        )
        return Finding(row, tie, None, found)


def _decoded(data: bytes, side: str) -> Image:
    try:
        return decode(data)
    except CorruptImage as error:
        raise CorruptImage(f"{side}: {error}") from error


def examine(
    source: Source, rules: Rules, *, start: int = 0, pixels: bool = False, num_workers: int = 0
) -> Iterator[Finding]:
    """Findings of the rows from `start` on, in order.

    Args:
        source: a stream is examined in this process, any other in `num_workers` of them.
        rules: see `Rules`.
        start: first row.
        pixels: prepare the images for an encoder.
        num_workers: processes; 0 does it here.

    Raises:
        DataError: see `pairs.pair_of`.
    """
    if not isinstance(source, IndexedSource) or num_workers == 0:
        for row, record in source.records(start):
            yield rules.examine(row, record, pixels=pixels)
        return
    rows = DataLoader(
        _Rows(source, rules, pixels),
        sampler=range(start, len(source)),
        batch_size=None,
        collate_fn=_as_it_is,
        **worker_options(num_workers),
    )
    for found in rows:
        if isinstance(found, DataError):
            raise found
        yield found


def _as_it_is(item: Any) -> Any:
    return item


class _Rows(Dataset[Any]):
    def __init__(self, source: IndexedSource, rules: Rules, pixels: bool) -> None:
        self.source, self.rules, self.pixels = source, rules, pixels

    def __getitem__(self, row: int) -> Finding | DataError:
        try:
            return self.rules.examine(row, self.source.record(row), pixels=self.pixels)
        except DataError as error:
            # raised here it would reach the user as a worker's traceback
            return error


class Catalogue(NamedTuple):
    """The usable pairs of a source: their rows, their buckets, and the counts of the pass."""

    rows: list[int]
    buckets: list[int]
    report: Report

    @classmethod
    def of(
        cls, source: Source, rules: Rules, *, num_workers: int = 0, progress: bool = True
    ) -> Catalogue:
        """Decode every image of a source once.

        Args:
            source, rules, num_workers: see `examine`.
            progress: show a bar.

        Raises:
            DataError: see `pairs.pair_of`.
        """
        found, seen = cls([], [], Report()), set[bytes]()
        findings = examine(source, rules, num_workers=num_workers)
        total = len(source) if isinstance(source, IndexedSource) else None
        for finding in tqdm(findings, total=total, desc="Pairs", unit="row", disable=not progress):
            found.report.add(finding, rules.preprocess, seen)
            if finding.pair is not None:
                found.rows.append(finding.row)
                found.buckets.append(finding.pair.bucket)
        return found


@dataclass
class Report:
    """Counts of a pass.

    Attributes:
        rows: examined.
        pairs: usable.
        ties: rows with label 0.5, whatever became of them.
        corrupt: row and reason of every pair that was dropped because of an image.
        duplicates: usable pairs that equal an earlier one in both images and the caption.
        empty_captions: of usable pairs.
        sizes: images of usable pairs by "height,width".
        buckets: usable pairs by "height,width".
        caption_lengths: usable pairs by the number of characters.
    """

    rows: int = 0
    pairs: int = 0
    ties: int = 0
    corrupt: dict[int, str] = field(default_factory=dict)
    duplicates: int = 0
    empty_captions: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    caption_lengths: Counter[int] = field(default_factory=Counter)

    def add(self, finding: Finding, preprocess: Preprocess, seen: set[bytes]) -> None:
        """Count a row; `seen` holds the digests of the pairs so far, and gets this one's."""
        self.rows += 1
        self.ties += finding.tie
        if finding.problem is not None:
            self.corrupt[finding.row] = finding.problem
        pair = finding.pair
        if pair is None:
            return
        self.pairs += 1
        self.duplicates += pair.digest in seen
        seen.add(pair.digest)
        self.empty_captions += not pair.caption.strip()
        self.sizes.update(_written(size) for size in pair.sizes)
        self.buckets[_written(preprocess.buckets[pair.bucket])] += 1
        self.caption_lengths[len(pair.caption)] += 1

    def merge(self, later: Report) -> None:
        """Add the counts of rows that come after."""
        for name, value in vars(later).items():
            if isinstance(value, dict):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            "ties": self.ties,
            "corrupt": {str(row): reason for row, reason in self.corrupt.items()},
            "duplicates": self.duplicates,
            "empty_captions": self.empty_captions,
            "sizes": dict(self.sizes.most_common()),
            "buckets": dict(self.buckets.most_common()),
            "caption_lengths": {
                str(k): self.caption_lengths[k] for k in sorted(self.caption_lengths)
            },
        }

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Report:
        return cls(
            **{
                **read,
                "corrupt": {int(row): reason for row, reason in read["corrupt"].items()},
                "sizes": Counter(read["sizes"]),
                "buckets": Counter(read["buckets"]),
                "caption_lengths": Counter({int(k): v for k, v in read["caption_lengths"].items()}),
            }
        )

    def quantile(self, fraction: float) -> int:
        """Caption length that `fraction` of the usable pairs do not exceed."""
        passed = 0
        for length in sorted(self.caption_lengths):
            passed += self.caption_lengths[length]
            if passed >= fraction * self.pairs:
                return length
        return 0

    def text(self, limit: int = 10) -> str:
        """The counts for people, at most `limit` lines of each list."""
        lines = [
            f"{'rows':<16}{self.rows}",
            f"{'usable pairs':<16}{self.pairs}",
            f"{'ties':<16}{self.ties}",
            f"{'corrupt':<16}{len(self.corrupt)}",
            f"{'duplicates':<16}{self.duplicates}",
            f"{'empty captions':<16}{self.empty_captions}",
            f"{'caption length':<16}median {self.quantile(0.5)}, 95 % up to {self.quantile(0.95)}, "
            f"longest {self.quantile(1.0)} characters",
        ]
        listed: dict[str, list[tuple[str, Any]]] = {
            "image sizes (height,width)": self.sizes.most_common(),
            "buckets (height,width)": self.buckets.most_common(),
            "corrupt rows": [(f"row {row}", reason) for row, reason in self.corrupt.items()],
        }
        for title, entries in listed.items():
            if entries:
                lines.append(title)
                lines += [f"  {name:<14}{value}" for name, value in entries[:limit]]
            if len(entries) > limit:
                lines.append(f"  and {len(entries) - limit} more")
        return "\n".join(lines)


def _written(size: Size) -> str:
    return f"{size[0]},{size[1]}"
