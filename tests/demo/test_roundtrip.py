"""The round trip's rows state what was measured."""

import pytest
import torch

from inpo_fast.demo import roundtrip
from inpo_fast.demo.solvers import SOLVERS
from inpo_fast.ops import LatticeRangeError

STEPS = 10


@pytest.fixture(scope="module")
def rows(tiny):
    settings = (roundtrip.Setting(steps=STEPS),)
    result = roundtrip.run(tiny, count=2, settings=settings, seed=0)
    assert result.vae_floor > 0
    return {(row.solver, row.state): row for row in result.rows}


def test_every_solver_in_both_states(rows):
    assert set(rows) == {(solver, state) for solver in SOLVERS for state in roundtrip.STATES}


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddim"])
def test_the_lattice_is_exact_and_float32_is_not(rows, solver):
    assert rows[solver, "lattice"].bits_equal
    assert rows[solver, "lattice"].max_abs_error == 0
    assert not rows[solver, "float32"].bits_equal
    assert 0 < rows[solver, "float32"].max_abs_error < 1e-2


def test_ddim_does_not_come_back(rows):
    for state in roundtrip.STATES:
        row = rows["ddim", state]
        assert not row.bits_equal
        assert row.max_abs_error > rows["bdia 1", "float32"].max_abs_error


@pytest.mark.parametrize(
    ("solver", "calls"),
    # The first step of a two-step solver starts its second track: it needs no undoing.
    [("ddim", 2 * STEPS), ("edict 0.93", 4 * STEPS), ("bdia 1", 2 * STEPS - 1)],
)
def test_model_calls_are_counted_in_both_directions(rows, solver, calls):
    assert rows[solver, "float32"].model_calls == rows[solver, "lattice"].model_calls == calls


def test_other_settings(tiny):
    settings = (
        roundtrip.Setting(steps=2, guidance=1.0),
        roundtrip.Setting(steps=2, model_dtype=torch.bfloat16),
    )
    rows = roundtrip.run(tiny, count=1, settings=settings, seed=0).rows
    assert [row.guidance for row in rows[::10]] == [1.0, 3.0]
    assert [row.model_dtype for row in rows[::10]] == ["float32", "bfloat16"]
    assert all(row.bits_equal for row in rows if row.state == "lattice" and row.solver != "ddim")


def test_a_solver_that_leaves_the_lattice_is_a_row_not_the_end(tiny, monkeypatch):
    def leave(*_):
        raise LatticeRangeError("left the lattice at step 3", update=3)

    monkeypatch.setattr(roundtrip, "_travel", leave)
    row = roundtrip.run(tiny, count=1, settings=(roundtrip.Setting(steps=1),), seed=0).rows[0]
    assert row.error == "left the lattice at step 3"
    assert row.max_abs_error is None
    assert not row.bits_equal
