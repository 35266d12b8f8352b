"""Encoded pairs on disk: written once, resumed after a kill at any moment, read without encoders.

A folder holds

    key.json                  what the cache is of; written first
    shard-00000.safetensors   pairs in source order, new captions, counts of the rows it covers
    index.json                written last: without it the cache is unfinished

A shard is written to a temporary name and renamed, and says at which row the next one starts, so an
interrupted cache goes on after its last shard. Of a pair it holds `PLACE.mean` and `PLACE.std`,
[V, 2, C, h, w] with V = 2 where pairs are mirrored (as they are, and mirrored); of a caption
`text.NUMBER.NAME`, once for all pairs that have it. Caption 0 is the empty prompt.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import write_json, write_tensors
from .encoders import Encoders, ModelFiles
from .examine import FoundPair, Report, Rules, examine
from .families import FAMILIES, check_sizes
from .pairs import DataError
from .sources import IndexedSource, Source
from .stored import EncodedPair, EncodedPairs, Scaling

FORMAT = 1
_KEY, _INDEX = "key.json", "index.json"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def is_cache(path: str | PathLike[str]) -> bool:
    """Whether `path` is the folder of a cache, finished or not."""
    return (Path(path) / _KEY).is_file()


def training_key(files: ModelFiles, rules: Rules) -> dict[str, Any]:
    """What a run must agree on with the cache that it trains from."""
    ties: dict[str, Any] = {"mode": rules.ties.mode}
    if rules.ties.mode == "random":
        ties["seed"] = rules.ties.seed
    return {
        "format": FORMAT,
        "model": files.fingerprint(),
        "preprocess": rules.preprocess.to_json(),
        "ties": ties,
    }


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """What `wanted` has that `cached` has not, a line each; keys of `cached` alone do not count."""
    lines = []
    for name, value in wanted.items():
        there = cached.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            lines += differences(there, value, f"{path}{name}.")
            lines += [
                f"{path}{name}.{extra}: the cache has it" for extra in there.keys() - value.keys()
            ]
        elif there != value:
            lines.append(f"{path}{name}: the cache has {there}, this run {value}")
    return lines


class CacheWriter:
    """Writes a cache, or goes on with one.

    Args:
        folder: new, empty, or an unfinished cache of the same key.
        source: of the pairs.
        rules: preprocessing and ties; no random crop, since only one view is stored (and its mirror
            image where pairs are mirrored).
        files: of the model.
        dtype: of what is stored.
        compute_dtype: of the encoders.

    Raises:
        DataError: the folder holds something else, and the message says what differs; sizes that
            the model's family cannot be trained on.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        source: Source,
        rules: Rules,
        files: ModelFiles,
        *,
        dtype: torch.dtype = torch.float16,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if rules.preprocess.random_crop:
            raise DataError(
                "random_crop cannot be cached: crop in the centre, or train without a cache"
            )
        try:
            check_sizes(files.family, rules.preprocess.buckets)
        except ValueError as error:
            raise DataError(str(error)) from error
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self.folder, self.source, self.rules, self.files = Path(folder), source, rules, files
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.key = {
            **training_key(files, rules),
            "source": source.fingerprint,
            "dtype": str(dtype),
            "compute_dtype": str(compute_dtype),
        }
        _claim(self.folder, self.key)
        for left in self.folder.glob("*.tmp"):
            left.unlink()

    def write(
        self,
        *,
        device: torch.device | str = "cpu",
        shard_size: int = 256,
        num_workers: int = 0,
    ) -> Report:
        """Encode what is missing and finish the cache.

        Args:
            device: of the encoders; they are not loaded where nothing is missing.
            shard_size: pairs of a shard, which is what a kill can lose.
            num_workers: processes that read and decode.

        Raises:
            DataError: no pair can be used; values that are not finite, naming the pair.
        """
        if shard_size < 1:
            raise DataError(f"shard_size must be at least 1, got {shard_size}")
        if (self.folder / _INDEX).is_file():
            return Report.from_json(_read_json(self.folder / _INDEX)["report"])
        state = _State.read(self.folder)
        total = len(self.source) if isinstance(self.source, IndexedSource) else None
        if total is None or state.next_row < total or state.shards == 0:
            encoders = Encoders.load(self.files, dtype=self.compute_dtype, device=device)
            self._write_shards(state, encoders, shard_size, num_workers, total)
        if state.report.pairs == 0:
            raise DataError(f"{self.source.name} has no usable pair:\n{state.report.text()}")
        index = {
            "shards": state.shards,
            "pairs": state.report.pairs,
            "captions": len(state.captions),
            "report": state.report.to_json(),
        }
        write_json(self.folder / _INDEX, index)
        return state.report

    def _write_shards(
        self,
        state: _State,
        encoders: Encoders,
        shard_size: int,
        num_workers: int,
        total: int | None,
    ) -> None:
        findings = examine(
            self.source, self.rules, start=state.next_row, pixels=True, num_workers=num_workers
        )
        shard = _Shard(state, encoders, self.dtype)
        with tqdm(total=total, initial=state.next_row, desc="Cache", unit="row") as bar:
            for found in findings:
                shard.report.add(found, self.rules.preprocess, state.seen)
                state.next_row = found.row + 1
                if found.pair is not None:
                    shard.add(found.row, found.pair)
                if len(shard) == shard_size:
                    shard.save(self.folder)
                    shard = _Shard(state, encoders, self.dtype)
                corrupt = len(state.report.corrupt) + len(shard.report.corrupt)
                bar.set_postfix(corrupt=corrupt, refresh=False)
                bar.update()
        if len(shard):
            shard.save(self.folder)
        else:
            # rows after the last pair: their counts go into the index alone
            state.report.merge(shard.report)


class _State:
    """How far the shards on disk go."""

    def __init__(self) -> None:
        self.shards = 0
        self.next_row = 0
        self.report = Report()
        self.captions: dict[str, int] = {}
        self.seen: set[bytes] = set()

    @classmethod
    def read(cls, folder: Path) -> _State:
        state = cls()
        for opened in _shards(folder):
            state.shards += 1
            meta = opened.meta
            state.next_row = meta["next_row"]
            state.report.merge(Report.from_json(meta["report"]))
            for caption in meta["captions"]:
                state.captions[caption] = len(state.captions)
            digests = opened.file.get_tensor("digest")
            state.seen.update(bytes(row.tolist()) for row in digests)
        return state


class _Shard:
    """A shard in memory."""

    def __init__(self, state: _State, encoders: Encoders, dtype: torch.dtype) -> None:
        self.state, self.encoders, self.dtype = state, encoders, dtype
        self.tensors: dict[str, Tensor] = {}
        self.captions: list[str] = []
        self.report = Report()
        self.rows: dict[str, list[Any]] = {
            name: [] for name in ("row", "bucket", "caption", "label", "time_ids", "digest")
        }
        if not state.captions:
            self._caption("")

    def __len__(self) -> int:
        return len(self.rows["row"])

    def add(self, row: int, pair: FoundPair) -> None:
        assert pair.pixels is not None and pair.time_ids is not None
        encoded = [self.encoders.posterior(view, row) for view in pair.pixels]
        for name, values in zip(("mean", "std"), zip(*encoded, strict=True), strict=True):
            stored = self._stored(torch.stack(values), f"the latents of the pair in row {row}")
            self.tensors[f"{len(self)}.{name}"] = stored
        values = (
            row,
            pair.bucket,
            self._caption(pair.caption),
            pair.label,
            pair.time_ids,
            torch.tensor(list(pair.digest), dtype=torch.uint8),
        )
        for column, value in zip(self.rows.values(), values, strict=True):
            column.append(value)

    def _caption(self, caption: str) -> int:
        known = self.state.captions
        if caption not in known:
            number = known[caption] = len(known)
            self.captions.append(caption)
            for name, value in self.encoders.text(caption).items():
                what = f"the embeddings of the caption {caption!r}"
                self.tensors[f"text.{number}.{name}"] = self._stored(value, what)
        return known[caption]

    def _stored(self, value: Tensor, what: str) -> Tensor:
        stored = value.to("cpu", self.dtype)
        if not bool(stored.isfinite().all()):
            raise DataError(f"{what} overflow {self.dtype}: store bfloat16 or float32")
        return stored.contiguous()

    def save(self, folder: Path) -> None:
        stacked = {
            name: torch.stack(column) if isinstance(column[0], Tensor) else torch.tensor(column)
            for name, column in self.rows.items()
        }
        scaling = self.encoders.scaling
        tensors = {
            **self.tensors,
            **stacked,
            "scaling.shift": scaling.shift.contiguous(),
            "scaling.scale": scaling.scale.contiguous(),
        }
        meta = {
            "next_row": self.state.next_row,
            "captions": self.captions,
            "report": self.report.to_json(),
        }
        path = folder / _shard_name(self.state.shards)
        write_tensors(path, tensors, {"inpo_fast": json.dumps(meta)})
        self.state.shards += 1
        self.state.report.merge(self.report)


class _Opened(NamedTuple):
    file: Any
    meta: dict[str, Any]


def _open(path: Path) -> _Opened:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        meta = json.loads(file.metadata()["inpo_fast"])  # type: ignore[no-untyped-call]
        return _Opened(file, meta)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no readable shard of a cache: {error}") from error


def _shards(folder: Path) -> Iterator[_Opened]:
    number = 0
    while (path := folder / _shard_name(number)).is_file():
        yield _open(path)
        number += 1


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return read


def _claim(folder: Path, key: Mapping[str, Any]) -> None:
    """Make `folder` a cache of `key`, or see that it is one."""
    if (folder / _KEY).is_file():
        cached = _read_json(folder / _KEY)
        if lines := differences(cached, key):
            raise DataError(
                f"{folder} is a cache of something else; choose another folder or delete it:\n  "
                + "\n  ".join(lines)
            )
        return
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; name a folder to write to")
    if folder.exists() and any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):
        raise DataError(f"{folder} is neither empty nor a cache: it has no {_KEY}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error}") from error
    write_json(folder / _KEY, key)


class CachedPairs(EncodedPairs):
    """Pairs from a cache; neither autoencoder nor text encoders are loaded.

    Args:
        folder: a finished cache.
        key: what the run needs, see `training_key`; None takes the cache as it is.

    Raises:
        DataError: no cache, an unfinished one, or one of something else, saying what differs.
    """

    def __init__(self, folder: str | PathLike[str], key: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / _KEY).is_file():
            raise DataError(f"{folder} is no cache: it has no {_KEY}")
        self.key = _read_json(self.folder / _KEY)
        if lines := differences(self.key, {"format": FORMAT} if key is None else key):
            raise DataError(f"the cache {folder} does not fit this run:\n  " + "\n  ".join(lines))
        if not (self.folder / _INDEX).is_file():
            raise DataError(f"the cache {folder} is unfinished: run inpo-fast cache again")
        index = _read_json(self.folder / _INDEX)
        self.report = Report.from_json(index["report"])
        self.flips = self.key["preprocess"]["flip"]
        self._has_time_ids = FAMILIES[self.key["model"]["family"]].time_ids
        columns: dict[str, list[Any]] = {name: [] for name in ("row", "bucket", "caption", "label")}
        self._starts: list[int] = []
        self._first_captions: list[int] = []
        captions = 0
        self._open_shards: dict[int, Any] = {}
        for opened in _shards(self.folder):
            self._starts.append(len(columns["row"]))
            self._first_captions.append(captions)
            captions += len(opened.meta["captions"])
            for name, column in columns.items():
                column += opened.file.get_tensor(name).tolist()
        found = (len(self._starts), len(columns["row"]), captions)
        if found != (index["shards"], index["pairs"], index["captions"]):
            raise DataError(
                f"the cache {folder} must have {index['shards']} shards, {index['pairs']} pairs "
                f"and {index['captions']} captions, got {found[0]}, {found[1]} and {found[2]}"
            )
        self._columns = columns
        first = self._shard(0)
        self.scaling = Scaling(first.get_tensor("scaling.shift"), first.get_tensor("scaling.scale"))
        probe = first.keys()
        self._names = [name.split(".", 2)[2] for name in probe if name.startswith("text.0.")]

    @property
    def buckets(self) -> Sequence[int]:
        buckets: list[int] = self._columns["bucket"]
        return buckets

    @property
    def sure(self) -> bool:
        return all(label == 1 for label in self._columns["label"])

    def read(self, position: int, *, flipped: bool, empty_prompt: bool) -> EncodedPair:
        number = bisect_right(self._starts, position) - 1
        shard, place = self._shard(number), position - self._starts[number]
        mean, std = (shard.get_slice(f"{place}.{name}")[int(flipped)] for name in ("mean", "std"))
        time_ids = shard.get_slice("time_ids")[place, int(flipped)] if self._has_time_ids else None
        caption = 0 if empty_prompt else self._columns["caption"][position]
        texts = self._shard(bisect_right(self._first_captions, caption) - 1)
        text = {name: texts.get_tensor(f"text.{caption}.{name}") for name in self._names}
        label, row = self._columns["label"][position], self._columns["row"][position]
        return EncodedPair(mean, std, text, time_ids, label, row)

    def _shard(self, number: int) -> Any:
        if number not in self._open_shards:
            self._open_shards[number] = _open(self.folder / _shard_name(number)).file
        return self._open_shards[number]

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the files itself
        return {**self.__dict__, "_open_shards": {}}
