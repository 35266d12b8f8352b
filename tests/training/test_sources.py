"""Every kind of source gives the same records, and says what is wrong with a bad one."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.shipped import preferences_path
from inpo_fast.training.pairs import DataError
from inpo_fast.training.sources import IndexedSource, open_source
from tests.training import samples

datasets = pytest.importorskip("datasets")

ROWS = [samples.row(number, label=number % 2) for number in range(5)]


def write_arrow(path, rows, kind):
    table = pa.Table.from_pylist(rows)
    writer = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with writer(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=2)


def records(source):
    return [record for _, record in source.records()]


def make(kind, folder):
    if kind == "parquet":
        return samples.write_parquet(folder / "pairs.parquet", ROWS, row_group_size=2)
    if kind == "parquet folder":
        samples.write_parquet(folder / "train-00000-of-00002.parquet", ROWS[:3])
        samples.write_parquet(folder / "train-00001-of-00002.parquet", ROWS[3:])
        return folder
    if kind.startswith("arrow"):
        write_arrow(folder / "pairs.arrow", ROWS, kind.split()[1])
        return folder / "pairs.arrow"
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder / "set", num_shards=2)
        return folder / "set"
    if kind == "saved splits":
        parts = {"train": datasets.Dataset.from_list(ROWS)}
        datasets.DatasetDict(parts).save_to_disk(folder / "set")
        return folder / "set"
    return datasets.Dataset.from_list(ROWS)


KINDS = ["parquet", "parquet folder", "arrow stream", "arrow file", "saved", "saved splits", "set"]


@pytest.mark.parametrize("kind", KINDS)
def test_indexed_sources(kind, tmp_path):
    source = open_source(make(kind, tmp_path))
    assert len(source) == 5 and isinstance(source, IndexedSource)
    assert records(source) == ROWS
    assert [source.record(row) for row in (4, 0, 3)] == [ROWS[4], ROWS[0], ROWS[3]]
    assert list(source.records(3)) == [(3, ROWS[3]), (4, ROWS[4])]
    sent = pickle.loads(pickle.dumps(source))
    assert sent.record(2) == ROWS[2] and sent.fingerprint == source.fingerprint
    assert len(source.fingerprint) == 32


def test_columns_that_are_not_needed_are_not_read(tmp_path):
    rows = [{**row, "model_0": "x", "has_label": True} for row in ROWS]
    source = open_source(samples.write_parquet(tmp_path / "a.parquet", rows))
    assert records(source) == ROWS
    assert records(open_source(datasets.Dataset.from_list(rows))) == ROWS


def test_a_stream_is_read_in_order_and_can_start_anywhere():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2)
    source = open_source(stream)
    assert not isinstance(source, IndexedSource)
    assert records(source) == ROWS
    assert list(source.records(3)) == [(3, ROWS[3]), (4, ROWS[4])]


def test_the_first_rows_only(tmp_path):
    whole = open_source(samples.write_parquet(tmp_path / "a.parquet", ROWS))
    source = open_source(tmp_path / "a.parquet", max_samples=3)
    assert len(source) == 3 and records(source) == ROWS[:3]
    assert source.fingerprint != whole.fingerprint
    assert len(open_source(tmp_path / "a.parquet", max_samples=30)) == 5
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert records(open_source(stream, max_samples=3)) == ROWS[:3]
    assert list(open_source(stream, max_samples=3).records(2)) == [(2, ROWS[2])]
    with pytest.raises(DataError, match="max_samples must be at least 1, got 0"):
        open_source(stream, max_samples=0)


def test_a_generator_stream_of_decoded_images():
    def generate():
        for row in ROWS:
            yield {**row, "jpg_0": samples.picture(0)}

    stream = datasets.IterableDataset.from_generator(generate)
    assert [record["caption"] for record in records(open_source(stream))] == [
        row["caption"] for row in ROWS
    ]


def test_images_of_datasets_stay_encoded():
    broken = [*ROWS, samples.row(5, jpg_1=b"broken")]
    features = datasets.Features(
        {
            "jpg_0": datasets.Image(),
            "jpg_1": datasets.Image(),
            "label_0": datasets.Value("float32"),
            "caption": datasets.Value("string"),
        }
    )
    data = datasets.Dataset.from_list(broken, features=features)
    for source in (open_source(data), open_source(data.to_iterable_dataset())):
        found = records(source)
        assert [record["jpg_1"]["bytes"] for record in found] == [row["jpg_1"] for row in broken]


def test_a_named_data_set_is_loaded_lazily_and_streams(tmp_path, monkeypatch):
    # a script-less data set in a folder is what a name on the hub resolves to
    samples.write_parquet(tmp_path / "train.parquet", ROWS)
    load, asked = datasets.load_dataset, []

    def local(name, *, split, streaming):
        asked.append((name, split, streaming))
        return load(
            "parquet",
            data_files=str(tmp_path / "train.parquet"),
            split=split,
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert records(open_source("someone/pairs")) == ROWS
    assert records(open_source("someone/pairs", streaming=True)) == ROWS
    assert asked == [("someone/pairs", "train", False), ("someone/pairs", "train", True)]
    with pytest.raises(DataError, match=r"someone/pairs \(split test\) cannot be loaded: .*test"):
        open_source("someone/pairs", split="test")


@pytest.mark.parametrize("sides", [("w", "l"), ("win", "lose")])
def test_two_folders(sides, tmp_path):
    for side, kind in zip(sides, ("PNG", "JPEG"), strict=True):
        (tmp_path / side).mkdir()
        for number, stem in enumerate(("b", "a", "c.d")):
            suffix = {"PNG": ".png", "JPEG": ".JPG"}[kind]
            (tmp_path / side / f"{stem}{suffix}").write_bytes(samples.encoded(number, kind=kind))
    # captions in either folder, in both if they agree
    (tmp_path / sides[0] / "a.caption").write_text("first\n")
    (tmp_path / sides[1] / "a.txt").write_text("first")
    (tmp_path / sides[1] / "b.txt").write_text("zweiter ö", encoding="utf-8")
    (tmp_path / sides[0] / "c.d.txt").write_text("")
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert [record["prompt"] for record in records(source)] == ["first", "zweiter ö", ""]
    assert source.record(1)["chosen"].read_bytes() == samples.encoded(0, kind="PNG")
    assert source.record(1)["rejected"].read_bytes() == samples.encoded(0, kind="JPEG")

    (tmp_path / sides[1] / "a.txt").write_text("other")
    with pytest.raises(DataError, match=r"the captions .*a\.caption, .*a\.txt differ"):
        open_source(tmp_path)
    (tmp_path / sides[1] / "b.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt differ|no caption b\.caption or b\.txt in"):
        open_source(tmp_path)
    (tmp_path / sides[0] / "e.png").write_bytes(samples.encoded(0))
    with pytest.raises(DataError, match="must hold the same names; without a partner: e"):
        open_source(tmp_path)


def test_the_shipped_pairs():
    source = open_source(preferences_path())
    assert len(source) == pq.read_metadata(preferences_path()).num_rows
    assert set(source.record(len(source) - 1)) == {"jpg_0", "jpg_1", "label_0", "caption"}


def test_missing_columns_are_named(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label_0"} for row in ROWS]
    message = (
        r"must have the columns jpg_0, jpg_1, label_0, caption \(missing: label_0\) or prompt, "
        r"chosen, rejected \(missing: prompt, chosen, rejected\), got caption, jpg_0, jpg_1"
    )
    with pytest.raises(DataError, match=message):
        open_source(samples.write_parquet(tmp_path / "a.parquet", rows))
    with pytest.raises(DataError, match=message):
        open_source(datasets.Dataset.from_list(rows))
    with pytest.raises(DataError, match=message):
        records(open_source(datasets.Dataset.from_list(rows).to_iterable_dataset()))


def test_splits_must_be_chosen(tmp_path):
    for split in ("train", "validation"):
        samples.write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", ROWS[: len(split) - 4])
    with pytest.raises(DataError, match=r"split must be one of train, validation in .*, got None"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"split must be one of train, validation in .*, got test"):
        open_source(tmp_path, split="test")
    assert records(open_source(tmp_path, split="train")) == ROWS[:1]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        # as the hub names the files that it converts, and as Pick-a-Pic's splits are called
        (("train-00000-of-00002-f8f7a3.parquet", "train-00001-of-00002-7ab1.parquet"), "train"),
        (("test_unique-00000-of-00001-f8.parquet", "test-00000-of-00001-7a.parquet"), "test"),
        (("train.parquet", "test.parquet", "validation.parquet"), "validation"),
        (("pairs_training.parquet", "pairs.dev.parquet", "eval2.parquet"), "validation"),
        (("train/0.parquet", "train/1.parquet", "test/0.parquet"), "train"),
        (("dev/part-00000-of-00001.parquet", "test/part-00000-of-00001.parquet"), "validation"),
        (("training_pairs.parquet",), "train"),
    ],
)
def test_splits_have_the_names_that_datasets_reads(names, split, tmp_path):
    for row, name in zip(ROWS, names, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        samples.write_parquet(tmp_path / name, [row])
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path.with_name("cache")))
    found = records(open_source(tmp_path, split=split))
    # names in data/ only are those of splits there
    if "_unique" not in names[0]:
        assert [row["caption"] for row in found] == list(theirs[split]["caption"])
    if len(found) == len(names):
        assert records(open_source(tmp_path)) == found
    else:
        with pytest.raises(DataError, match=rf"split must be one of .*{split}.*, got None"):
            open_source(tmp_path)


@pytest.mark.parametrize("names", [("a", "b"), ("tests", "trained"), ("0001", "latest")])
def test_files_that_name_no_split_are_one_data_set(names, tmp_path):
    for row, name in zip(ROWS, names, strict=False):
        samples.write_parquet(tmp_path / f"{name}.parquet", [row])
    assert records(open_source(tmp_path)) == ROWS[:2]
    with pytest.raises(DataError, match=r"split must be one of none in .*, got train"):
        open_source(tmp_path, split="train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train-00000-of-00001", "more", "others"),
            r"must all name their split or none, got train-00000-of-00001\.parquet of train, and "
            r"without one more\.parquet, others\.parquet",
        ),
        (("test", "pairs"), r"got test\.parquet of test, and without one pairs\.parquet"),
        (("train_and_test",), r"train_and_test\.parquet must name one split, .* test, train"),
        (("test/train",), r"test/train\.parquet must name one split, and it names test, train"),
    ],
)
def test_no_file_is_left_out_in_silence(names, message, tmp_path):
    for row, name in zip(ROWS, names, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        samples.write_parquet(tmp_path / f"{name}.parquet", [row])
    for split in (None, "train"):
        with pytest.raises(DataError, match=message):
            open_source(tmp_path, split=split)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "none", "must be a file, a folder or a data set's name"),
        (lambda folder: str(folder / "none.parquet"), "must be a file, a folder"),
        (lambda folder: "none.parquet", "must be a file, a folder"),
        (
            lambda folder: folder,
            "must hold .parquet or .arrow files, .*; it holds junk.csv, x.parq",
        ),
        (lambda folder: folder / "junk.csv", "must be a .parquet or .arrow file or a folder"),
        (lambda folder: folder / "x.parq" / "bad.parquet", "bad.parquet cannot be read"),
        (lambda folder: folder / "x.parq" / "bad.arrow", "bad.arrow cannot be read"),
        (lambda folder: folder / "x.parq" / "empty.parquet", "empty.parquet has no rows"),
    ],
)
def test_what_cannot_be_opened(prepare, message, tmp_path):
    (tmp_path / "junk.csv").write_text("a,b")
    (tmp_path / "x.parq").mkdir()
    bad = tmp_path / "x.parq"
    target = prepare(tmp_path)
    if target != tmp_path:
        (bad / "bad.parquet").write_bytes(b"PAR1 nothing")
        (bad / "bad.arrow").write_bytes(b"nothing at all")
        pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), bad / "empty.parquet")
    with pytest.raises(DataError, match=message):
        open_source(target)


def test_files_of_two_kinds(tmp_path):
    samples.write_parquet(tmp_path / "some.parquet", ROWS)
    write_arrow(tmp_path / "others.arrow", ROWS, "file")
    with pytest.raises(DataError, match="files, and holds both: name one"):
        open_source(tmp_path)


def test_files_with_different_columns(tmp_path):
    samples.write_parquet(tmp_path / "a.parquet", ROWS)
    other = [{"prompt": "a", "chosen": b"", "rejected": b""}]
    samples.write_parquet(tmp_path / "b.parquet", other)
    with pytest.raises(DataError, match="must have the same columns"):
        open_source(tmp_path)


def test_objects_of_other_kinds():
    with pytest.raises(TypeError, match=r"must be a path, a name, .* got list"):
        open_source(ROWS)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match="must be one split of train"):
        open_source(splits)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    one = open_source(samples.write_parquet(tmp_path / "a.parquet", ROWS)).fingerprint
    (tmp_path / "b").mkdir()
    same = open_source(samples.write_parquet(tmp_path / "b" / "a.parquet", ROWS)).fingerprint
    other = open_source(samples.write_parquet(tmp_path / "a.parquet", ROWS[1:])).fingerprint
    assert one == same != other
