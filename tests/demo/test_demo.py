"""The whole demo in miniature: its files, its repeatability and its failures."""

import json
import os
import sys
from functools import partial

import pytest

from inpo_fast import cli, demo
from inpo_fast.demo import report, roundtrip
from inpo_fast.demo.pipeline import DemoError

COLUMNS = {
    "roundtrip": (
        "solver state model_dtype guidance steps model_calls bits_equal max_abs_error noise_std "
        "seconds"
    ),
    "edit": "solver edits success preservation",
    "align": "objective steps seconds accuracy_before accuracy_after",
}


@pytest.fixture
def miniature(monkeypatch, settings, shipped):
    """`inpo-fast demo` with the miniature settings and the tiny model."""
    small = {name: getattr(settings, name) for name in ("scenes", "round_trips", "edits")}
    small |= {"edit_steps": settings.edit_steps, "align": settings.align}
    monkeypatch.setattr(demo, "Settings", partial(demo.Settings, **small))
    monkeypatch.setattr(demo, "SHIPPED", shipped)
    return partial(cli_demo, "--device", "cpu")


def cli_demo(*arguments):
    return cli.main(["demo", *map(str, arguments)])


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_files_schema_and_the_same_numbers_twice(miniature, tmp_path, capsys):
    first, second = tmp_path / "one" / "deep", tmp_path / "two"
    second.mkdir()
    (second / "mine.txt").write_text("kept")
    (second / "report.md").write_text("old")
    assert miniature("--output", first) == 0
    printed = capsys.readouterr().out
    assert miniature("--output", second) == 0

    assert sorted(os.listdir(first)) == sorted(report.FILES)
    assert sorted(os.listdir(second)) == sorted([*report.FILES, "mine.txt"])
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (first, second))
    assert without_times(one) == without_times(two)
    for name in ("edits.png", "aligned.png", "curves.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes().startswith(b"\x89PNG")
    assert "mine.txt" not in (second / "report.md").read_text()

    for table, columns in COLUMNS.items():
        assert one[table]
        assert all(set(columns.split()) <= row.keys() for row in one[table])
    assert {"versions", "seeds", "machine", "settings", "vae_floor"} <= one.keys()
    assert [row["objective"] for row in one["align"]] == ["inpo", "diffusion-dpo"]
    text = (first / "report.md").read_text()
    assert all(name in text for name in ("edits.png", "aligned.png", "curves.png"))
    assert "bdia 15/16" in text
    assert all(part in printed for part in ("Round trip.", "Edit.", "Align.", "report.md"))


def test_another_seed_gives_other_numbers(tiny):
    rows = [
        roundtrip.run(tiny, count=2, settings=(roundtrip.Setting(steps=2),), seed=seed).rows[0]
        for seed in (0, 0, 1)
    ]
    errors = [row.max_abs_error for row in rows]
    assert errors[0] == errors[1] != errors[2]


def test_full_adds_settings(miniature, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "measure", lambda settings, **_: asked.append(settings))
    monkeypatch.setattr(report, "write", lambda *_: None)
    monkeypatch.setattr(demo, "summary", lambda _: "")
    miniature("--output", tmp_path, "--full", "--seed", 7)
    (settings,) = asked
    assert settings.seed == 7
    assert {s.guidance for s in settings.round_trips} == {1.0, 3.0, 7.5}
    assert {s.steps for s in settings.round_trips[1:]} == {10, 20, 50, 100}
    assert len({s.model_dtype for s in settings.round_trips}) == 3


def test_a_file_in_place_of_the_folder(miniature, tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("mine")
    for output in (path, path / "below"):
        assert miniature("--output", output) == 1
        error = capsys.readouterr().err
        assert error.startswith("inpo-fast demo: --output must be a folder")
        assert error.count("\n") == 1
    assert path.read_text() == "mine"


def test_a_folder_in_place_of_a_file(miniature, tmp_path, capsys):
    (tmp_path / "report.json").mkdir()
    assert miniature("--output", tmp_path) == 1
    assert "report.json is a folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["report.json"]


def test_missing_model_and_device(miniature, monkeypatch, tmp_path, capsys):
    assert miniature("--output", tmp_path, "--device", "nothing") == 1
    assert "--device nothing is not available" in capsys.readouterr().err
    monkeypatch.setattr(demo, "SHIPPED", tmp_path)
    assert miniature("--output", tmp_path) == 1
    assert "no model can be loaded" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["matplotlib", "diffusers", "pyarrow"])
def test_a_missing_package_is_named_before_any_work(
    miniature, monkeypatch, tmp_path, capsys, package
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(demo, "measure", lambda *_, **__: pytest.fail("work has begun"))
    assert miniature("--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.splitlines() == [
        f'inpo-fast demo needs the package {package}: pip install "inpo-fast[demo]"'
    ]
    assert not (tmp_path / "out").exists()


def test_nothing_is_half_written(tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("old")
    whole = {"report.md": b"new", "report.json": b"{}"}
    real = report.Path.write_bytes

    def full_disk(path, data):
        if "report.json" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(report.Path, "write_bytes", full_disk)
    with pytest.raises(DemoError, match="No space left on device"):
        report._write_all(tmp_path, whole)
    assert os.listdir(tmp_path) == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "old"
