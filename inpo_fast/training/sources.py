"""Where pairs come from: Parquet and Arrow files, folders of images, and `datasets`."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

from .pairs import CHOSEN, DataError, columns_of

Record = Mapping[str, Any]

_SIDES = (("w", "l"), ("win", "lose"))
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CAPTIONS = (".caption", ".txt")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?!\d).*")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words of a path that name a split, as `datasets.load_dataset` reads them."""


class Source(ABC):
    """Records in a fixed order.

    Attributes:
        name: for messages.
        fingerprint: changes with the content, as far as that shows without reading all of it.
    """

    name: str
    fingerprint: str

    @abstractmethod
    def records(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        """(row, record) from row `start` on."""


class IndexedSource(Source):
    """Records of any row."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, row: int) -> Record: ...

    def records(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        return ((row, self.record(row)) for row in range(start, len(self)))


class TableFiles(IndexedSource):
    """Parquet or Arrow files, one after the other.

    Arrow files are mapped into memory. Of Parquet files a row group is read at a time and the last
    one kept, so that random access costs a row group: a big table is better trained on from a
    cache.
    """

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = list(files)
        self._chunks: list[tuple[int, int]] = []  # (file, row group)
        counts, columns = [], set[tuple[str, ...]]()
        for number, path in enumerate(self._files):
            names, rows = _chunk_rows(path)
            columns.add(columns_of(names, str(path)))
            counts += rows
            self._chunks += [(number, chunk) for chunk in range(len(rows))]
        if len(columns) != 1:
            raise DataError(
                f"the files of {name} must have the same columns, got {sorted(columns)}"
            )
        (self._columns,) = columns
        self._ends = list(accumulate(counts))
        sizes = [(path.name, path.stat().st_size) for path in self._files]
        self.fingerprint = _digest(sizes)
        self._open: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, row: int) -> Record:
        place = bisect_right(self._ends, row)
        if self._open is None or self._open[0] != place:
            number, chunk = self._chunks[place]
            self._open = place, _read_chunk(self._files[number], chunk, self._columns)
        table = self._open[1]
        offset = row - (self._ends[place - 1] if place else 0)
        return {name: table[name][offset].as_py() for name in self._columns}

    def __getstate__(self) -> dict[str, Any]:
        # a worker opens its own
        return {**self.__dict__, "_open": None}


class PairFolders(IndexedSource):
    """`w/` and `l/`, or `win/` and `lose/`: images of the same stem, a caption beside either."""

    def __init__(self, root: Path, sides: tuple[str, str]) -> None:
        self.name = str(root)
        folders = [root / side for side in sides]
        winners, losers = (_by_stem(folder, _IMAGES) for folder in folders)
        if alone := sorted(winners.keys() ^ losers.keys()):
            raise DataError(
                f"{' and '.join(map(str, folders))} must hold the same names; without a partner: "
                f"{_some(alone)}"
            )
        self._rows = [
            (winners[stem], losers[stem], _caption_file(folders, stem)) for stem in sorted(winners)
        ]
        files = [(str(p.relative_to(root)), p.stat().st_size) for row in self._rows for p in row]
        self.fingerprint = _digest(files)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, row: int) -> Record:
        winner, loser, caption = self._rows[row]
        try:
            text = caption.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the caption {caption} cannot be read: {error}") from error
        return dict(zip(CHOSEN, (text, winner, loser), strict=True))


class FirstRows(IndexedSource):
    """The first rows of another source."""

    def __init__(self, source: IndexedSource, count: int) -> None:
        self.name = source.name
        self.fingerprint = _digest([source.fingerprint, count])
        self._source, self._count = source, count

    def __len__(self) -> int:
        return min(self._count, len(self._source))

    def record(self, row: int) -> Record:
        return self._source.record(row)


class DatasetRows(IndexedSource):
    """A `datasets.Dataset`."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self._columns = columns_of(dataset.column_names, name)
        self._dataset = _undecoded(dataset.select_columns(list(self._columns)))
        self.fingerprint = _digest([name, len(dataset), dataset._fingerprint])

    def __len__(self) -> int:
        return len(self._dataset)

    def record(self, row: int) -> Record:
        record: Record = self._dataset[row]
        return record


class DatasetStream(Source):
    """A `datasets.IterableDataset`: read in order, with no random access."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self._dataset = _undecoded(dataset)
        self.fingerprint = _digest([name, "stream"])

    def first(self, count: int) -> DatasetStream:
        return DatasetStream(self._dataset.take(count), f"{self.name} up to row {count}")

    def records(self, start: int = 0) -> Iterator[tuple[int, Record]]:
        for row, record in enumerate(self._dataset.skip(start), start):
            columns = columns_of(record, self.name)
            yield row, {name: record[name] for name in columns}


def open_source(
    source: str | PathLike[str] | Any,
    *,
    split: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
) -> Source:
    """Open a source of preference pairs.

    Args:
        source: a .parquet or .arrow file; a folder of them, as `datasets` writes them too, whose
            names may tell splits as on the hub; a folder with `w/` and `l/` or `win/` and `lose/`;
            a `datasets` object; or a name that `datasets.load_dataset` knows.
        split: of a folder or name that has several.
        streaming: read a name as a stream instead of downloading it first.
        max_samples: only so many rows, the first; None takes all.

    Raises:
        DataError: no such file or data set, columns missing, several splits and none chosen, files
            that name a split beside others that name none, no rows.
    """
    opened: IndexedSource | DatasetStream
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        if path.exists():
            if streaming:
                raise DataError(f"streaming is for a data set that is named, got the path {path}")
            opened = _open_path(path, split)
        elif isinstance(source, str) and _is_name(source):
            opened = _load(source, split or "train", streaming)
        else:
            raise DataError(
                f"source must be a file, a folder or a data set's name, and there is no {source}"
            )
    else:
        if split is not None or streaming:
            raise DataError(
                "split and streaming are for names and folders: pass one split's object"
            )
        opened = _wrap(source, "the data set")
    if isinstance(opened, IndexedSource) and len(opened) == 0:
        raise DataError(f"{opened.name} has no rows")
    if max_samples is None:
        return opened
    if max_samples < 1:
        raise DataError(f"max_samples must be at least 1, got {max_samples}")
    if isinstance(opened, IndexedSource):
        return FirstRows(opened, max_samples)
    return opened.first(max_samples)


def _open_path(path: Path, split: str | None) -> IndexedSource:
    if path.is_file():
        _no_split(path, split)
        if path.suffix not in (".parquet", ".arrow"):
            raise DataError(f"source must be a .parquet or .arrow file or a folder, got {path}")
        return TableFiles([path], str(path))
    for sides in _SIDES:
        if all((path / side).is_dir() for side in sides):
            _no_split(path, split)
            return PairFolders(path, sides)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return _open_path(path / _chosen_split(path, splits, split), None)
    if (path / "state.json").is_file():
        _no_split(path, split)
        state = json.loads((path / "state.json").read_text())
        return TableFiles([path / file["filename"] for file in state["_data_files"]], str(path))
    tables = {suffix: sorted(path.rglob(f"*{suffix}")) for suffix in (".parquet", ".arrow")}
    if all(tables.values()):
        raise DataError(
            f"{path} must hold .parquet or .arrow files, and holds both: name one of the files, or "
            "a folder with one kind"
        )
    for files in tables.values():
        if files:
            return TableFiles(_of_split(path, files, split), str(path))
    raise DataError(
        f"{path} must hold .parquet or .arrow files, w/ and l/, or win/ and lose/; it holds "
        f"{_some(sorted(entry.name for entry in path.iterdir())) or 'nothing'}"
    )


def _no_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{path} has no splits, got split {split}")


def _of_split(root: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split, all of them where they name none.

    Raises:
        DataError: no such split, several and none chosen, or a file that would be left out because
            it names none, or more than one.
    """
    named: dict[str, list[Path]] = {}
    nameless = []
    for path in files:
        splits = _splits_of(path.relative_to(root))
        if len(splits) > 1:
            raise DataError(f"{path} must name one split, and it names {', '.join(sorted(splits))}")
        for name in splits:
            named.setdefault(name, []).append(path)
        if not splits:
            nameless.append(path)
    if not named and split is None:
        return files
    if named and nameless:
        name, (path, *_) = next(iter(named.items()))
        raise DataError(
            f"the files of {root} must all name their split or none, got "
            f"{path.relative_to(root)} of {name}, and without one "
            f"{_some([str(path.relative_to(root)) for path in nameless])}: move them apart"
        )
    return named[_chosen_split(root, sorted(named), split)]


def _splits_of(path: Path) -> set[str]:
    """What a file in a folder names as its split: nothing, one, or several that cannot all be.

    That is NAME of NAME-00000-of-00004, as the hub writes it (with -HASH behind), or one of
    `_SPLITS` by a word of the path.
    """
    folders, shard = _words(str(path.parent)), _SHARD.fullmatch(path.stem)
    if shard and folders <= _words(shard[1]):
        return {shard[1]}
    return folders | _words(path.stem)


def _words(text: str) -> set[str]:
    """The splits that words of a text name."""
    words = set(re.split(r"[-._ /\d]+", text.lower()))
    return {split for split, names in _SPLITS.items() if words.intersection(names)}


def _chosen_split(root: Path, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        raise DataError(
            f"split must be one of {', '.join(splits) or 'none'} in {root}, got {split}"
        )
    return split


def _is_name(source: str) -> bool:
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None
        and not source.startswith(".")
        and Path(source).suffix not in (".parquet", ".arrow")
    )


def _load(name: str, split: str, streaming: bool) -> IndexedSource | DatasetStream:
    import datasets

    try:
        return _wrap(datasets.load_dataset(name, split=split, streaming=streaming), name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the data set {name} (split {split}) cannot be loaded: {error}") from error


def _wrap(dataset: Any, name: str) -> IndexedSource | DatasetStream:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return DatasetRows(dataset, name)
    if isinstance(dataset, datasets.IterableDataset):
        return DatasetStream(dataset, name)
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(f"source must be one split of {', '.join(dataset)}: pass source['train']")
    raise TypeError(
        f"source must be a path, a name, a Dataset or an IterableDataset, got "
        f"{type(dataset).__name__}"
    )


def _undecoded(dataset: Any) -> Any:
    """Images as the bytes they are stored in: a bad one must cost its pair, not the iterator."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _chunk_rows(path: Path) -> tuple[list[str], list[int]]:
    """Column names, and rows of every row group (an Arrow file counts as one)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                groups = range(file.metadata.num_row_groups)
                rows = [file.metadata.row_group(group).num_rows for group in groups]
                return file.schema_arrow.names, rows
        table = _map_arrow(path)
        return table.column_names, [table.num_rows]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_chunk(path: Path, chunk: int, columns: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                return file.read_row_group(chunk, columns=list(columns))
        return _map_arrow(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _map_arrow(path: Path) -> Any:
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    # `datasets` writes streams, others files
    magic = mapped.read(6)
    mapped.seek(0)
    reader = pa.ipc.open_file(mapped) if magic == b"ARROW1" else pa.ipc.open_stream(mapped)
    return reader.read_all()


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            if path.stem in found:
                raise DataError(f"{folder} has two images named {path.stem}")
            found[path.stem] = path
    return found


def _caption_file(folders: Sequence[Path], stem: str) -> Path:
    found = [
        path
        for folder in folders
        for suffix in _CAPTIONS
        if (path := folder / f"{stem}{suffix}").is_file()
    ]
    if not found:
        raise DataError(
            f"no caption {stem}.caption or {stem}.txt in {' or '.join(map(str, folders))}"
        )
    if len({path.read_bytes().strip() for path in found}) > 1:
        raise DataError(f"the captions {', '.join(map(str, found))} differ")
    return found[0]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
