"""The comparison on the shipped model, in miniature."""

import json
import math

import pytest
import torch

from benchmarks import align, common


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in each of several processes: more of them would add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(one_thread):
    return list(align.rows("cpu", True, ["inpo, 2 samples", "sft"], processes=1))


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
    # steps are seconds over those of one, and multiplied back: two roundings on either side
    first, second = (row.values["seconds"] for row in right[4:])
    assert math.isclose(first, second, rel_tol=4 * 2**-53)
    for row in right:
        assert row.values["low"] <= row.ours - base.ours + 1e-9
        assert row.values["high"] >= row.ours - base.ours - 1e-9


def test_rows_are_written_and_drawn(rows, tmp_path):
    common.write(tmp_path / "align.json", "cpu", rows)
    align.picture(rows, tmp_path / "align.png")
    assert len(json.loads((tmp_path / "align.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "align.png").read_bytes().startswith(b"\x89PNG")


def test_rows_hold_the_curves(rows):
    for row in rows:
        seeds = [row.values[f"seed {i}"] for i in range(2)]
        assert sum(seeds) / 2 == pytest.approx(row.ours)
    for row in rows[1:]:
        seconds = row.values["steps"] * row.values["seconds of a step"]
        assert seconds == pytest.approx(row.values["seconds"]) and seconds > 0


def test_processes_find_what_one_finds(rows):
    spread = list(align.rows("cpu", True, ["sft"], processes=2))
    assert [row.values["processes"] for row in (rows[0], spread[0])] == [1, 2]
    alone = [row for row in rows if row.case.startswith(("base", "sft, 1 s", "sft, 2 s"))]
    assert len(alone) == 5
    for row, other in zip(alone, spread, strict=False):
        assert row.case == other.case
        assert row.ours == other.ours
        assert row.values["seed 1"] == other.values["seed 1"]


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])],
)
def test_each_process_has_a_gpu_of_those_visible(monkeypatch, visible, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert align.visible_gpus() == names


def test_an_interrupt_leaves_equal_time_over_what_is_complete(monkeypatch, capsys):
    trained = []

    class Bench:
        def __init__(self, device, settings):
            self.stops = settings.stops

        def base(self, seed):
            return align.Point(0, 0.5, 0.0)

        def seconds_of_step(self, name):
            return 1.0 if name == "diffusion-dpo" else 2.0

        def train(self, name, seed):
            trained.append((name, seed))
            if name == "inpo, bdia" and seed == 1:
                raise KeyboardInterrupt
            return [align.Point(n, 0.5 + n / 10, n / 4) for n in self.stops]

    monkeypatch.setattr(align, "Bench", Bench)
    cases = [
        row.case
        for row in align.rows(
            *("cpu", True, ["sft", "inpo, bdia", "inpo", "diffusion-dpo"]), processes=1
        )
    ]
    assert [name for name, _ in trained] == ["diffusion-dpo"] * 2 + ["inpo"] * 2 + [
        "inpo, bdia"
    ] * 2
    assert "interrupted in inpo, bdia" in capsys.readouterr().err
    equal = [case.split(",")[0] for case in cases if "2.00 s of training, attr" in case]
    assert equal == ["diffusion-dpo", "inpo"]
    assert not any(case.startswith(("inpo, bdia", "sft")) for case in cases)


def test_curves_are_read_between_their_points():
    curve = align.Curves([[align.Point(0, 0.5, 0.0), align.Point(10, 0.7, 0.4)]], 0.2)
    (point,) = curve.at_time(1.0)
    assert point == pytest.approx((5.0, 0.6, 0.2))
    assert curve.at_stop(1) == [align.Point(10, 0.7, 0.4)] and curve.seconds == 2.0


def test_unknown_methods_are_refused():
    with pytest.raises(SystemExit, match="--only takes"):
        list(align.rows("cpu", True, ["ppo"]))


@pytest.mark.parametrize(
    ("device", "threads", "processes"),
    [("cpu", 1, 6), ("cpu", 4, 1), ("cpu", 8, 1), ("cuda", 1, 12)],
)
def test_as_many_trainings_as_there_is_room_for(monkeypatch, device, threads, processes):
    monkeypatch.setattr(align, "cores", lambda: 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert align.room(device) == processes
