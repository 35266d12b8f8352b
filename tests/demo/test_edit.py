"""Edits change one attribute, and the measures say what pixels show."""

import pytest
import torch

from inpo_fast.demo import edit
from inpo_fast.demo.measures import mean_and_error
from inpo_fast.demo.solvers import SOLVERS
from inpo_fast.shipped import scenes


@pytest.fixture(scope="module")
def edits():
    return edit.choose_edits(16, seed=0)


def test_an_edit_changes_exactly_one_attribute(edits):
    for change in edits:
        before, after = scenes.attributes(change.source), scenes.attributes(change.target)
        assert [key for key in before if before[key] != after[key]] == [change.key]
        assert change.prompt == scenes.prompt(change.target)
        assert change.change == f"{change.key}: {before[change.key]} -> {after[change.key]}"
    kinds = [change.key.split()[-1] for change in edits]
    assert all(kinds.count(kind) == 4 for kind in ("color", "background", "shape", "size"))


def test_edits_depend_on_the_seed_alone(edits):
    assert edit.choose_edits(16, seed=0) == edits
    assert edit.choose_edits(16, seed=1) != edits


def test_a_perfect_edit(edits):
    success, preserved = edit.measure(edits, scenes.render([change.target for change in edits]))
    assert success.tolist() == preserved.tolist() == [1.0] * 16


def test_an_untouched_image_preserves_and_fails(edits):
    success, preserved = edit.measure(edits, scenes.render([change.source for change in edits]))
    assert success.tolist() == [0.0] * 16
    assert preserved.tolist() == [1.0] * 16


def test_a_side_effect_costs_preservation(edits):
    damaged = []
    for change in edits:
        options = [scene for key, scene in scenes.edits(change.target) if key != change.key]
        damaged.append(options[0])
    success, preserved = edit.measure(edits, scenes.render(damaged))
    assert success.tolist() == [1.0] * 16
    others = [len(scenes.attributes(change.target)) - 1 for change in edits]
    torch.testing.assert_close(preserved, torch.tensor([(n - 1) / n for n in others]))


def test_garbage_is_neither(edits):
    success, preserved = edit.measure(edits, torch.zeros(16, 3, 64, 64))
    assert success.sum() == 0
    assert preserved.max() < 0.5


def test_run_has_a_row_and_a_picture_for_every_solver(tiny):
    result = edit.run(tiny, count=2, steps=3, guidance=3.0, seed=0)
    assert [row.solver for row in result.rows] == list(SOLVERS) == list(result.edited)
    for row in result.rows:
        assert row.edits == 2
        assert row.state == ("float32" if row.solver == "ddim" else "lattice")
        assert 0 <= row.success <= 1
        assert 0 <= row.preservation <= 1
    assert all(images.shape == (2, 3, 64, 64) for images in result.edited.values())


def test_mean_and_error():
    assert mean_and_error(torch.tensor([0.0, 1.0, 1.0, 0.0])) == (0.5, pytest.approx(0.288675))
    assert mean_and_error(torch.tensor([0.5])) == (0.5, 0.0)
