"""The training benchmark on tiny models: every code path runs, and the losses are compared."""

import pytest
import torch

from benchmarks import official, train, training_loop


def test_every_row_of_a_tiny_model(monkeypatch):
    monkeypatch.setattr(train, "REUSE", (1, 2))
    rows = {row.case: row for row in train.rows("cpu", True, ["sd15"])}
    assert any("samples_per_inversion 2" in case for case in rows)
    levers = [case.split("lever: ")[1] for case in rows if "lever: " in case]
    assert len(levers) == 4
    assert all(row.ours > 0 for row in rows.values())
    # of one pair, and of the micro-batch
    assert sum("stock layers, 1 pairs" in case for case in rows) == 1


def test_lora_of_a_tiny_xl_runs():
    (row,) = train.rows("cpu", True, ["sdxl lora"])
    assert "lora" in row.case


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_different_loss_is_refused(name):
    given = training_loop.setting(name, quick=True)
    trainer = training_loop.make_trainer(given, "cpu", mixed_precision="no", latents="official")
    networks = trainer.learner.networks
    table = trainer.model.loaded.scheduler.alphas_cumprod
    right = official.OfficialStep(
        networks.policy, networks.reference, table, given.beta, torch.float32
    )
    assert train.check(trainer, right) <= 1
    wrong = official.OfficialStep(
        networks.policy, networks.reference, table * 0.99, given.beta, torch.float32
    )
    with pytest.raises(AssertionError, match="the losses differ"):
        train.check(trainer, wrong)


@pytest.mark.parametrize(("samples", "mean"), [(1, 5.5), (2, 22 / 3), (4, 8.8)])
def test_the_steps_have_the_samplers_mean_depth(samples, mean):
    trainer = training_loop.make_trainer(training_loop.setting("sd15", quick=True), "cpu")
    learner = training_loop.with_config(trainer.learner, samples_per_inversion=samples)
    numbers = training_loop.micro_steps(learner, pairs=3)
    depths = [share * train.calls_before_the_last(learner, 3, number) for number, share in numbers]
    assert sum(depths) == pytest.approx(mean, abs=1e-12)


def test_the_script_inverts_by_as_many_calls_as_its_description_says():
    assert train.mean_official_calls() == pytest.approx(6.38, abs=0.005)


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match="--only takes"):
        list(train.rows("cpu", True, ["sd3"]))
