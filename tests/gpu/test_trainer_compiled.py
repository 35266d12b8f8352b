"""Training with compiled blocks on a GPU: exact at the start, and as accurate as without."""

import math

import pytest
import torch

pytest.importorskip("accelerate")

from tests.gpu.trainings import (
    assert_resumed_run_is_whole,
    assert_steps_do_not_wait,
    trainer,
)
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("unmeasured")

SIDES = ("winner", "loser")


# In one process the graphs of one test serve the others. Calls without gradient have graphs of
# their own, which the inversion needs, so that only the first precision has an inversion.
@pytest.mark.parametrize(("precision", "source"), [("bf16", "ddim"), ("fp16", "q_sample")])
def test_the_policy_starts_as_the_reference(model, tmp_path, precision, source):
    run = trainer(
        *(model, tmp_path),
        mixed_precision=precision,
        latents=source,
        compile="blocks",
        max_train_steps=1,
    )
    (first,) = run.train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), first
    assert first["accuracy"] == 0.5, first


def test_steps_do_not_wait_for_the_device(model, tmp_path, no_sync):
    run = trainer(model, tmp_path, compile="blocks", gradient_accumulation_steps=2)
    assert_steps_do_not_wait(run, no_sync)


def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path):
    assert_resumed_run_is_whole(model, tmp_path, compile="blocks")


def test_it_trains_as_accurately_as_without(model, tmp_path):
    """Against the same training in float32 both bfloat16 runs have the error of bfloat16."""
    keys = ("loss", "policy_winner", "policy_loser", "reference_winner", "margin_mean")

    def curve(name, **changes):
        # β = 10 and a small rate: nothing magnifies roundings from step to step
        settings = {"loss_type": "dpo", "beta_dpo": 10.0, "latents": "ddim", "learning_rate": 1e-4}
        run = trainer(model, tmp_path / name, **{**settings, "max_train_steps": 4, **changes})
        rows = [[row[key] for key in keys] for row in run.train()]
        return torch.tensor(rows, dtype=torch.float64)

    exact = curve("exact", mixed_precision="no")
    eager = (curve("eager") - exact).norm(dim=0)
    compiled = (curve("compiled", compile="blocks") - exact).norm(dim=0)
    # Both round at the same places and differ in the order of their sums, so their errors are of
    # one size; over four steps the smaller of two such norms is seldom a quarter of the other. The
    # scale of every number is added, times the rounding of bfloat16 averaged over the elements.
    floor = 2**-8 * exact.abs().mean(dim=0) / math.sqrt(4 * tiny.SIZE**2)
    assert (compiled <= 4 * eager + floor).all(), (keys, eager, compiled, floor)


def test_in_float32_the_start_differs_by_roundings(model, tmp_path, monkeypatch):
    """Nothing rounds away what may differ between the graphs of policy and reference."""
    # TF32 would turn a last bit that differs into one of the 10 bits that it keeps
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run = trainer(
        *(model, tmp_path),
        mixed_precision="no",
        latents="q_sample",
        compile="blocks",
        max_train_steps=1,
    )
    (first,) = run.train()
    # u = β/2 D, β = 2000, each of the four errors in D with sixteen roundings in a row
    errors = sum(first[f"{who}_{side}"] for who in ("policy", "reference") for side in SIDES)
    bound = 1000 * errors * 2**-20
    assert abs(first["margin_mean"]) <= bound
    # softplus has the slope 1/2 at 0
    assert abs(first["loss"] - math.log(2)) <= bound / 2 + 1e-6
