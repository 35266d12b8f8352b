"""One preference pair: what a row of a source says, and what becomes of ties."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import draws

TieMode = Literal["drop", "random", "soft", "error"]

COMPARED = ("jpg_0", "jpg_1", "label_0", "caption")
"""Columns of Pick-a-Pic: two images, and 1 where the first is better, 0 the second, 0.5 a tie."""
CHOSEN = ("prompt", "chosen", "rejected")
"""Columns as language models' preference sets have them: two images, the better one named."""


class DataError(ValueError):
    """The data, or a cache of it, cannot be used: the message says where and why."""


class CorruptImage(DataError):
    """An image that cannot be decoded: its pair is dropped and counted."""


class PreferencePair(NamedTuple):
    """Two images of one caption, as they are stored."""

    winner: bytes
    loser: bytes
    caption: str
    label: float
    """Probability that the winner is the better one: 1, or 0.5 where a tie was kept."""
    row: int
    """Of the pair in its source."""

    def digest(self) -> bytes:
        """16 bytes that equal pairs share."""
        parts = (self.winner, self.loser, self.caption.encode())
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(digests).digest()[:16]


@dataclass(frozen=True)
class Ties:
    """What becomes of a pair whose label is 0.5.

    Attributes:
        mode: `drop` leaves it out; `random` declares one of the two the winner, for good; `soft`
            keeps it with p = 0.5, for objectives with smoothed labels; `error` refuses it.
        seed: of `random`.
    """

    mode: TieMode = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(TieMode):
            raise ValueError(f"ties must be one of {get_args(TieMode)}, got {self.mode!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def columns_of(available: Iterable[str], source: str) -> tuple[str, ...]:
    """The columns to read: those of Pick-a-Pic, or prompt, chosen and rejected.

    Raises:
        DataError: naming what is missing.
    """
    given = set(available)
    missing = {
        wanted: [name for name in wanted if name not in given] for wanted in (COMPARED, CHOSEN)
    }
    for wanted, absent in missing.items():
        if not absent:
            return wanted
    raise DataError(
        f"{source} must have the columns {', '.join(COMPARED)} (missing: "
        f"{', '.join(missing[COMPARED])}) or {', '.join(CHOSEN)} (missing: "
        f"{', '.join(missing[CHOSEN])}), got {', '.join(sorted(given)) or 'none'}"
    )


def is_tie(record: Mapping[str, Any]) -> bool:
    return record.get("label_0") == 0.5


def pair_of(record: Mapping[str, Any], row: int, ties: Ties) -> PreferencePair | None:
    """The pair of a record; None for a tie that is dropped. A missing caption is an empty one.

    Raises:
        DataError: a label outside {0, 0.5, 1}, a column of another type, a tie where ties are
            errors.
        CorruptImage: an image that is missing or whose file cannot be read.
    """
    if "chosen" in record:
        caption = _caption(record["prompt"], "prompt", row)
        winner, loser = (_image(record[name], name, row) for name in ("chosen", "rejected"))
        return PreferencePair(winner, loser, caption, 1.0, row)
    label = record["label_0"]
    if label not in (0, 0.5, 1):
        raise DataError(f"label_0 must be 0, 0.5 or 1, got {label!r} in row {row}")
    if label == 0.5:
        if ties.mode == "error":
            raise DataError(
                f"row {row} is a tie (label_0 0.5): choose ties='drop', 'random' or 'soft'"
            )
        if ties.mode == "drop":
            return None
    caption = _caption(record["caption"], "caption", row)
    first, second = (_image(record[name], name, row) for name in ("jpg_0", "jpg_1"))
    first_wins = label >= 0.5
    if label == 0.5 and ties.mode == "random":
        label, first_wins = 1, draws.uniform(draws.Purpose.TIE, ties.seed, row) < 0.5
    winner, loser = (first, second) if first_wins else (second, first)
    return PreferencePair(winner, loser, caption, 0.5 if label == 0.5 else 1.0, row)


def _caption(value: Any, column: str, row: int) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{column} must be text, got {type(value).__name__} in row {row}")
    return value or ""


def _image(value: Any, column: str, row: int) -> bytes:
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path") is not None:
            return _file(Path(value["path"]), column)
        value = value.get("bytes")
    if value is None:
        raise CorruptImage(f"{column} is missing")
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path):
        return _file(value, column)
    if hasattr(value, "save"):
        # an image that somebody has decoded: PNG keeps its pixels
        buffer = io.BytesIO()
        try:
            value.save(buffer, format="PNG")
        except OSError as error:
            raise CorruptImage(f"{column}: {error}") from error
        return buffer.getvalue()
    raise DataError(
        f"{column} must be bytes, a mapping with bytes or path, or an image, got "
        f"{type(value).__name__} in row {row}"
    )


def _file(path: Path, column: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptImage(f"{column}: {error}") from error
