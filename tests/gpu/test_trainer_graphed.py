"""Model calls of a training as CUDA graphs: the same numbers, and nothing waits for the device."""

import math

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("triton")

from inpo_fast.determinism import reproducible_training
from inpo_fast.training.families import Conditioning
from inpo_fast.training.trajectory import Call
from tests.gpu.trainings import (
    assert_resumed_run_is_whole,
    assert_same_bits,
    assert_steps_do_not_wait,
    trainer,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

GRAPHED = {"cuda_graphs": True, "fused_layers": True}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_the_policy_starts_as_the_reference(model, tmp_path, precision, rank):
    changes = {"mixed_precision": precision, "rank": rank, "max_train_steps": 1, **GRAPHED}
    (first,) = trainer(model, tmp_path, **changes).train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), first
    assert first["accuracy"] == 0.5, first
    assert first["policy_winner"] == first["reference_winner"] > 0


def test_a_graph_computes_what_the_call_does(model, tmp_path):
    """For two shapes in turns, in the same memory, and with weights that change."""
    run = trainer(model, tmp_path, **GRAPHED)
    learner, device = run.learner, run.accelerator.device
    batch = next(run.data.loader(run.order, device=device))
    text = {name: torch.cat([value, value]) for name, value in batch.text.items()}
    with reproducible_training():
        for _ in range(2):
            for count in (2, 1, 2):
                z = torch.randn(count, *batch.latents.shape[1:], device=device)
                times = torch.tensor([7, 981][:count], device=device)
                call = Call(z, times, None, False)
                told = Conditioning({name: value[:count] for name, value in text.items()})
                graphed = learner._infer(run.policy, call, told)
                with torch.no_grad():
                    assert torch.equal(graphed, learner._predict(run.policy, call, told))
            with torch.no_grad():
                run.policy.conv_out.weight.mul_(1.5)
    assert len(learner.graphs) == 2


@pytest.mark.parametrize("changes", [{}, {"rank": 2}, {"use_ema": True}])
def test_steps_do_not_wait_for_the_device(model, tmp_path, no_sync, changes):
    run = trainer(model, tmp_path, gradient_accumulation_steps=2, **GRAPHED, **changes)
    assert_steps_do_not_wait(run, no_sync)


@pytest.mark.parametrize("latents", ["ddim", "bdia"])
def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path, latents):
    assert_resumed_run_is_whole(model, tmp_path, latents=latents, **GRAPHED)


@pytest.mark.parametrize(
    "changes",
    [
        {"cuda_graphs": True},
        {**GRAPHED, "gradient_accumulation_steps": 2, "samples_per_inversion": 2},
        {**GRAPHED, "rank": 2, "mixed_precision": "fp16", "gradient_checkpointing": True},
        {**GRAPHED, "gradient_checkpointing": True, "use_ema": True, "optimizer": "adafactor"},
    ],
)
def test_graphs_change_no_bits(model, tmp_path, changes):
    settings = {**changes, "max_train_steps": 8, "learning_rate": 1e-4, "lr_warmup_steps": 0}
    plain, graphed = (
        trainer(model, tmp_path / str(graphs), **{**settings, "cuda_graphs": graphs})
        for graphs in (False, True)
    )
    graphs = graphed.learner.graphs
    logged, again = plain.train(), graphed.train()
    keys = ("loss", "margin_mean", "policy_winner", "reference_winner", "grad_norm")
    for key in keys:
        # float16 has gradients that are not finite while it looks for its loss scale
        values = [[repr(row[key]) for row in rows] for rows in (again, logged)]
        assert values[0] == values[1], key
    assert logged[-1]["margin_mean"] != 0
    assert len(graphs._learnable) == 1
    assert_same_bits(graphed.policy.state_dict(), plain.policy.state_dict())


def test_shapes_take_turns_in_one_step(model, tmp_path):
    """Gradients of batches of two sizes, whose graphs share memory, add up to those without."""
    run = trainer(model, tmp_path, **GRAPHED)
    learner, device = run.learner, run.accelerator.device
    batch = next(run.data.loader(run.order, device=device))
    text = {name: torch.cat([value, value]) for name, value in batch.text.items()}

    def gradients(outputs):
        run.optimizer.zero_grad(set_to_none=True)
        for count in (2, 1, 2, 1):
            z = torch.randn(count, *batch.latents.shape[1:], device=device, generator=rng)
            told = Conditioning({name: value[:count] for name, value in text.items()})
            times = torch.tensor([7, 981][:count], device=device)
            with learner._repeating():
                outputs(Call(z, times, None, False), told).square().sum().backward()
        return [p.grad.clone() for p in run.parameters]

    with reproducible_training():
        rng = torch.Generator(device).manual_seed(0)
        plain = gradients(lambda *given: learner._predict(run.policy, *given))
        for _ in range(2):
            rng = torch.Generator(device).manual_seed(0)
            assert all(map(torch.equal, gradients(learner._learnable), plain))
