"""The comparison on the shipped model, in miniature."""

import json

import pytest

from benchmarks import align, common


@pytest.fixture(scope="module")
def rows():
    return list(align.rows("cpu", True, ["inpo, 2 samples", "sft"]))


def test_rows_at_equal_steps_and_at_equal_time(rows):
    base, *others = rows
    assert base.case.startswith("base") and base.rivals == {}
    assert base.values["low"] <= base.ours <= base.values["high"]
    right = [row for row in others if row.metric == "attributes right"]
    moved = [row for row in others if row.metric == "moved"]
    assert [row.values["steps"] for row in right[:4]] == [1, 2, 1, 2]
    assert len(right) == len(moved) == 6
    assert all(row.ours > 0 for row in moved)
    # at equal time the fastest has done all its steps, the other no more than all
    steps = [row.values["steps"] for row in right[4:]]
    assert max(steps) > 1 and max(steps) <= 2
    assert right[4].values["seconds"] == right[5].values["seconds"]
    for row in right:
        assert row.values["low"] <= row.ours - base.ours + 1e-9
        assert row.values["high"] >= row.ours - base.ours - 1e-9


def test_rows_are_written_and_drawn(rows, tmp_path):
    common.write(tmp_path / "align.json", "cpu", rows)
    align.picture(rows, tmp_path / "align.png")
    assert len(json.loads((tmp_path / "align.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "align.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_read_between_their_points():
    curve = align.Curves([[align.Point(0, 0.0, 0.5, 0.0), align.Point(10, 2.0, 0.7, 0.4)]])
    assert curve.at_time(1.0, "accuracy") == pytest.approx([0.6])
    assert curve.at_time(1.0, "steps") == [5.0]


def test_unknown_methods_are_refused():
    with pytest.raises(SystemExit, match="--only takes"):
        list(align.rows("cpu", True, ["ppo"]))
