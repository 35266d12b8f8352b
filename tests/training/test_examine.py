"""The counting pass and `inpo-fast validate-data`."""

import json

import pytest

from inpo_fast import cli
from inpo_fast.training.examine import Catalogue, Report, Rules, examine
from inpo_fast.training.pairs import DataError, Ties
from inpo_fast.training.sources import open_source
from tests.training import samples

FLAGS = ["--aspect_ratio_buckets", "16,24;24,16"]


@pytest.fixture
def path(tmp_path):
    return samples.write_parquet(tmp_path / "pairs.parquet", samples.mixed_rows(), row_group_size=3)


def check(report, *, ties="drop"):
    soft = ties != "drop"
    assert (report.rows, report.pairs, report.ties) == (10, 7 + soft, 1)
    assert sorted(report.corrupt) == [3, 7]
    assert report.corrupt[3] == "loser: OSError: image file is truncated"
    assert report.corrupt[7] == "winner: not an image in a known format"
    assert (report.duplicates, report.empty_captions) == (1, 1)
    assert report.sizes == {"16,24": 10 + 2 * soft, "24,16": 2, "17,33": 2}
    assert report.buckets == {"16,24": 6 + soft, "24,16": 1}
    assert report.caption_lengths == {14: 5, 0: 1, 4: 1, **({5: 1} if soft else {})}


@pytest.mark.parametrize("ties", ["drop", "soft", "random"])
def test_counts(path, ties):
    report = Catalogue.of(open_source(path), Rules(samples.BUCKETS, Ties(ties))).report
    check(report, ties=ties)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_counts_of_parts_add_up(path):
    source, rules = open_source(path), Rules(samples.BUCKETS)
    whole, parts, seen = Catalogue.of(source, rules).report, [Report(), Report()], set()
    for found in examine(source, rules):
        parts[found.row >= 4].add(found, rules.preprocess, seen)
    parts[0].merge(parts[1])
    assert parts[0] == whole


def test_two_spawned_workers_find_the_same_in_order(path):
    source, rules = open_source(path), Rules(samples.BUCKETS)
    here = list(examine(source, rules, start=1))
    there = list(examine(source, rules, start=1, num_workers=2))
    assert here == there
    assert [found.row for found in there] == list(range(1, 10))


def test_a_stream_counts_the_same(path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(samples.mixed_rows()).to_iterable_dataset()
    catalogue = Catalogue.of(open_source(stream), Rules(samples.BUCKETS))
    check(catalogue.report)
    assert catalogue.rows == [0, 1, 4, 5, 6, 8, 9] and catalogue.buckets == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_label_is_named_from_a_worker_too(tmp_path, num_workers):
    rows = [samples.row(0, label=1.0), samples.row(1, label=0.7)]
    source = open_source(samples.write_parquet(tmp_path / "a.parquet", rows))
    with pytest.raises(DataError, match=r"^label_0 must be 0, 0.5 or 1, got 0.7 in row 1$"):
        list(examine(source, Rules(samples.BUCKETS), num_workers=num_workers))


def test_pixels_are_both_views_of_both_images(path):
    rules = Rules(samples.BUCKETS)
    found = next(examine(open_source(path), rules, start=1, pixels=True)).pair
    assert found.pixels.shape == (2, 2, 3, 16, 24)
    assert (found.pixels[1] == found.pixels[0].flip(3)).all()
    # label 0: the second image is the winner
    winner = samples.BUCKETS.view(samples.picture(3), 0, flipped=False)
    assert (found.pixels[0, 0] == winner.pixels).all()


def test_command_prints_json(path, capsys):
    assert cli.main(["validate-data", str(path), *FLAGS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("source") == str(path)
    check(Report.from_json(printed))


def test_command_prints_text(path, capsys):
    assert cli.main(["validate-data", str(path), *FLAGS, "--ties", "soft"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for words in (["rows", "10"], ["ties", "1"], ["corrupt", "2"], ["duplicates", "1"]):
        assert words in lines
    text = "\n".join(" ".join(word for part in line for word in part.split()) for line in lines)
    assert "usable pairs 8" in text and "empty captions 1" in text
    assert "median 14, 95 % up to 14, longest 14 characters" in text
    assert "16,24 12" in text and "row 7 winner: not an image" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.parquet"], "a data set's name, and there is no nowhere.parquet"),
        (["SOURCE", "--ties", "error"], "row 2 is a tie"),
        (["SOURCE", "--resolution", "30"], "resolution must be a positive multiple of 8, got 30"),
        (["SOURCE", "--split", "test"], "has no splits, got split test"),
        (["SOURCE", "--streaming"], "streaming is for a data set that is named"),
    ],
)
def test_command_says_what_is_wrong_in_a_line(arguments, message, path, capsys):
    given = [str(path) if word == "SOURCE" else word for word in arguments]
    assert cli.main(["validate-data", *given]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [x for x in captured.err.splitlines() if x.startswith("inpo-fast validate-data: ")]
    assert message in line


def test_nothing_usable_is_a_failure(tmp_path, capsys):
    rows = [samples.row(0, label=0.5), samples.row(1, jpg_0=b"")]
    path = samples.write_parquet(tmp_path / "a.parquet", rows)
    assert cli.main(["validate-data", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["pairs"] == 0
    assert captured.err.endswith("inpo-fast validate-data: no pair can be used\n")
