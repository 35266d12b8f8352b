"""Checkpoints: complete or absent, and enough to end with the bits of a run that went through."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from accelerate import Accelerator

from inpo_fast.training import checkpoint, weights
from inpo_fast.training.checkpoint import STATE, Checkpoints
from inpo_fast.training.config import ConfigError
from inpo_fast.training.optimization import TrainingError
from inpo_fast.training.trainer import PreferenceTrainer

from . import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    monkeypatch.setattr("inpo_fast.training.step.count_flops", lambda _: (1, 2))


def trainer(model, output, **changes):
    defaults = {"inversion_steps": 2, "checkpointing_steps": 2, "max_train_steps": 4}
    return PreferenceTrainer(
        tiny.config(model, output, **{**defaults, **changes}), dataset=tiny.pairs()
    )


def test_ten_kills_change_no_bit(tmp_path):
    tiny.save_pipeline(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", str(tmp_path), "10"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, runs = map(int, done.stdout.split())
    assert kills == 10
    written = "unet/diffusion_pytorch_model.safetensors"
    files = [written, f"checkpoint-14/{written}"]
    for run in range(runs):
        folder = tmp_path / f"killed-{run}"
        for name in files:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert sorted(f.name for f in folder.glob("checkpoint-*")) == [
            "checkpoint-12",
            "checkpoint-14",
        ]
        ours, theirs = (
            torch.load(where / "checkpoint-14" / "optimizer.bin")
            for where in (folder, tmp_path / "whole")
        )
        assert all(
            torch.equal(ours["state"][k][name], value)
            for k, state in theirs["state"].items()
            for name, value in state.items()
        )


@pytest.mark.parametrize("changes", [{"rank": 2}, {"optimizer": "adafactor"}])
def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path, changes):
    whole = trainer(model, tmp_path / "whole", **changes)
    logged = whole.train()
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = trainer(model, tmp_path / "resumed", resume_from_checkpoint="latest", **changes)
    assert resumed.step == 2
    again = resumed.train()
    same = ("loss", "margin_mean", "grad_norm", "lr")
    assert [[row[k] for k in same] for row in again] == [
        [row[k] for k in same] for row in logged[2:]
    ]
    mine = resumed.policy.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in whole.policy.state_dict().items())


def test_a_checkpoint_too_many_is_removed_by_the_run_that_goes_on(model, tmp_path):
    """As a kill between writing the newest and removing the oldest leaves it."""
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    trainer(model, tmp_path, **settings).train()
    for old in (1, 2):
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / f"checkpoint-{old}")
    resumed = trainer(model, tmp_path, resume_from_checkpoint="latest", **settings)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    resumed.train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_is_made_longer_is_one_that_was_longer(model, tmp_path):
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    trainer(model, tmp_path / "part", max_train_steps=2).train()
    longer = trainer(model, tmp_path / "part", resume_from_checkpoint="latest")
    assert (longer.step, longer.total_steps) == (2, 4)
    longer.train()
    mine = longer.policy.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in whole.policy.state_dict().items())


def test_a_checkpoint_holds_what_users_look_for(model, tmp_path):
    trainer(model, tmp_path / "full").train()
    names = {path.name for path in (tmp_path / "full" / "checkpoint-2").iterdir()}
    kept = {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "trainer_state.json"}
    assert names == kept | {"unet"}
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(tmp_path / "full" / "checkpoint-2", subfolder="unet")
    trainer(model, tmp_path / "lora", rank=2).train()
    names = {path.name for path in (tmp_path / "lora" / "checkpoint-2").iterdir()}
    assert names == kept | {"pytorch_lora_weights.safetensors"}


def test_the_oldest_checkpoints_go(model, tmp_path):
    trainer(model, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


@pytest.mark.parametrize(("limit", "left"), [(2, {2, 4}), (3, {2, 3, 4}), (9, {1, 2, 3, 4})])
def test_a_run_that_comes_by_again_keeps_its_newest_checkpoint(tmp_path, limit, left):
    checkpoints = Checkpoints(tmp_path, limit, Accelerator(cpu=True))
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE).touch()
    checkpoints.save(2, lambda folder: (folder / STATE).touch())
    assert set(checkpoints.steps()) == left


def test_a_checkpoint_of_another_configuration(model, tmp_path):
    trainer(model, tmp_path).train()
    with pytest.raises(ConfigError, match=r"seed: the checkpoint has 0, this run 1") as caught:
        trainer(model, tmp_path, resume_from_checkpoint="latest", seed=1, beta_dpo=3.0)
    assert "beta_dpo: the checkpoint has 2000.0, this run 3.0" in str(caught.value)
    other = trainer(model, tmp_path, resume_from_checkpoint="latest", logging_steps=3)
    assert other.step == 4
    with pytest.raises(ConfigError, match="pairs: the checkpoint has 12, this run 14"):
        PreferenceTrainer(other.config, dataset=tiny.pairs(14))


def test_a_checkpoint_of_another_precision(model, tmp_path, monkeypatch):
    """Also where the flags do not say which, but what accelerate was told."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer(model, tmp_path).train()
    for name in ("training_config.json", "checkpoint-2/trainer_state.json"):
        written = json.loads((tmp_path / name).read_text())
        assert written.get("config", written)["mixed_precision"] == "bf16"
    assert trainer(model, tmp_path, resume_from_checkpoint="latest").step == 4
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match="mixed_precision: the checkpoint has 'bf16', this run"):
        trainer(model, tmp_path, resume_from_checkpoint="latest")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match=r"mixed_precision .*fp8"):
        trainer(model, tmp_path / "other")


def test_the_state_of_generators_is_that_of_the_own_device(monkeypatch):
    """The machine that resumes may have fewer GPUs."""
    there, here = torch.device("cuda", 3), torch.device("cuda", 0)
    restored = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state})
    )
    state = checkpoint.rng_state(there)
    drawn = torch.rand(2)
    checkpoint.set_rng_state(state, here)
    assert restored == {here: torch.tensor([3])}
    assert torch.equal(torch.rand(2), drawn)
    assert checkpoint.rng_state(torch.device("cpu"))["device"] is None


def test_checkpoints_are_not_overwritten_by_a_new_run(model, tmp_path):
    trainer(model, tmp_path).train()
    with pytest.raises(ConfigError, match=r"has checkpoints up to step 4: set resume_from"):
        trainer(model, tmp_path)


def test_resuming_from_what_is_not_there(model, tmp_path):
    assert trainer(model, tmp_path, resume_from_checkpoint="latest").step == 0
    with pytest.raises(ConfigError, match="resume_from_checkpoint must be latest or a folder"):
        trainer(model, tmp_path, resume_from_checkpoint="checkpoint-7")


def test_a_result_is_not_overwritten_by_a_new_run(model, tmp_path):
    trainer(model, tmp_path, checkpointing_steps=100).train()
    with pytest.raises(ConfigError, match="holds the result of another training"):
        trainer(model, tmp_path)


def test_latest_replaces_the_result_of_the_same_run_only(model, tmp_path):
    """A run that is shorter than the way to its first checkpoint leaves none to resume from."""
    short = {"checkpointing_steps": 100, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    first = trainer(model, tmp_path, **short)
    first.train()
    written = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    before = written.read_bytes()
    with pytest.raises(ConfigError, match="loss_type: the result has 'inpo', this run 'dpo'"):
        trainer(model, tmp_path, loss_type="dpo", **short)
    with pytest.raises(ConfigError, match="pairs: the result has 12, this run 14"):
        PreferenceTrainer(first.config, dataset=tiny.pairs(14))
    with pytest.raises(ConfigError, match=r"has 2 optimiser steps, .* 1: choose another"):
        trainer(model, tmp_path, **{**short, "max_train_steps": 1})
    assert written.read_bytes() == before
    # what a job that had ended does when it is launched again
    trainer(model, tmp_path, **short).train()
    assert written.read_bytes() == before
    trainer(model, tmp_path, **{**short, "max_train_steps": 3}).train()
    assert json.loads((tmp_path / "training_config.json").read_text())["steps"] == 3


def test_a_checkpoint_beside_the_result_of_another_run(model, tmp_path):
    trainer(model, tmp_path / "lora", rank=2).train()
    trainer(model, tmp_path / "full", checkpointing_steps=100).train()
    copied = tmp_path / "full" / "checkpoint-2"
    shutil.copytree(tmp_path / "lora" / "checkpoint-2", copied)
    with pytest.raises(ConfigError, match="rank: the result has None, this run 2"):
        trainer(model, tmp_path / "full", rank=2, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        ("save_checkpoint", "has checkpoints up to step 0: .* choose another output_dir"),
        ("save", "holds the result of another training: choose another"),
    ],
)
def test_a_checkpoint_from_elsewhere_needs_a_folder_of_its_own(model, tmp_path, leave, said):
    trainer(model, tmp_path / "one").train()
    getattr(trainer(model, tmp_path / "two"), leave)()
    other = {"resume_from_checkpoint": str(tmp_path / "one" / "checkpoint-2")}
    with pytest.raises(ConfigError, match=said):
        trainer(model, tmp_path / "two", **other)
    # the same folder by another way is no other
    there = tmp_path / "one" / ".." / "one" / "checkpoint-2"
    assert trainer(model, tmp_path / "one", resume_from_checkpoint=str(there)).step == 2
    assert trainer(model, tmp_path / "three", **other).step == 2


def test_a_checkpoint_is_replaced_by_the_run_that_comes_by_again(model, tmp_path, monkeypatch):
    trainer(model, tmp_path, max_train_steps=2).train()
    part = tmp_path / "checkpoint-2"
    whole = {path.name for path in part.iterdir()}
    (part / "of-another-time").touch()
    run = trainer(model, tmp_path, resume_from_checkpoint="latest")

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="step 2 is untouched"):
        patch.setattr(run, "_save_weights", full)
        run.save_checkpoint()
    assert (part / "of-another-time").is_file()
    run.save_checkpoint()
    assert {path.name for path in part.iterdir()} == whole
    assert not any(tmp_path.glob(".checkpoint*"))


def test_a_broken_result(model, tmp_path):
    (tmp_path / "training_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"training_config\.json cannot be read"):
        trainer(model, tmp_path, resume_from_checkpoint="latest")


def test_no_lora_is_left_beside_the_result_of_another_kind(model, tmp_path):
    """Whoever loads the result would take it for that."""
    names = (weights.LORA, f"{tmp_path.name}_kohya.safetensors")
    for name in (*names, "other.safetensors"):
        (tmp_path / name).touch()
    trainer(model, tmp_path).train()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["other.safetensors"]


def test_a_full_disk_at_the_end_can_be_mended(model, tmp_path, monkeypatch):
    run = trainer(model, tmp_path, rank=2)

    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("inpo_fast.training.weights.save_lora", full)
    with pytest.raises(TrainingError, match=r"step 2 cannot be written .*No space.*; none before"):
        run.train()
    monkeypatch.setattr("inpo_fast.training.trainer.PreferenceTrainer.save_checkpoint", vars)
    with pytest.raises(TrainingError, match=r"the result cannot be written .*No space.* save\(\)"):
        run.train()
    assert not any(tmp_path.glob("*.safetensors")) and not any(tmp_path.glob(".result*"))
    monkeypatch.undo()
    run.save()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("name", ["optimizer.bin", "trainer_state.json"])
def test_a_full_disk_leaves_the_checkpoint_before(model, tmp_path, monkeypatch, name):
    """Real writes fail: of a file that torch writes, and of one that Python writes."""
    whole = trainer(model, tmp_path / "whole")
    whole.train()

    run = trainer(model, tmp_path / "full")
    real = checkpoint.Checkpoints.save

    def save(self, step, write):
        def limited(folder):
            if step == 4:
                (folder / name).symlink_to("/dev/full")
            write(folder)

        real(self, step, limited)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    with pytest.raises(TrainingError, match=r"step 4 cannot .* step 2 is untouched: free"):
        run.train()
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = trainer(model, tmp_path / "full", resume_from_checkpoint="latest")
    resumed.train()
    mine = resumed.policy.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in whole.policy.state_dict().items())


def test_a_broken_checkpoint(model, tmp_path):
    trainer(model, tmp_path).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    with pytest.raises(ConfigError, match="checkpoint-4 cannot be read"):
        trainer(model, tmp_path, resume_from_checkpoint="latest")


def test_dev_full_is_a_full_disk():
    with pytest.raises(OSError) as caught:
        Path("/dev/full").write_text("x" * 10)
    assert caught.value.errno == errno.ENOSPC


def test_the_state_names_what_made_it(model, tmp_path):
    trainer(model, tmp_path).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["step"] == 4
    assert state["config"]["loss_type"] == "inpo"
    assert state["versions"]["torch"] == torch.__version__
