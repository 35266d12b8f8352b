"""Two processes that share the pairs are one process with all of them: DDP and FSDP2, over gloo."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from inpo_fast.training import step as training_step
from inpo_fast.training.config import ConfigError
from inpo_fast.training.processes import make_accelerator
from inpo_fast.training.weights import LORA
from tests.gpu.trainings import BLOCKS, save_model

from . import tiny, two_processes

ROOT = Path(__file__).parents[2]


def launch(root, *arguments):
    """Run two_processes.py."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "tests.training.two_processes"),
            *(str(root), "2", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    tiny.save_pipeline(root / "model")
    launch(root)
    return root


PAIRED = [("ddp", case) for case in two_processes.CASES] + [("fsdp", "full"), ("fsdp", "lora")]


@pytest.mark.parametrize(("kind", "case"), PAIRED)
def test_two_processes_are_one_with_twice_the_pairs(folder, kind, case, monkeypatch):
    monkeypatch.setattr(training_step, "count_flops", lambda _: (1, 2))
    together = folder / f"{case}-one-{kind}"
    two_processes.train(folder, together.name, 4, **two_processes.CASES[case])
    one = torch.load(together.with_suffix(".pt"))
    two = torch.load(folder / f"{case}-{kind}-2.pt")
    two_processes.assert_alike(one, two)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_resume_with_the_same_bits(folder, kind):
    for name in (LORA, f"checkpoint-2/{LORA}"):
        whole, again = (load_file(folder / f"{run}-{kind}-2" / name) for run in ("lora", "again"))
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[key], value) for key, value in whole.items())
    ranks = sorted(path.name for path in (folder / f"lora-{kind}-2/checkpoint-2").glob("random*"))
    assert ranks == ["random_states_0.pkl", "random_states_1.pkl"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["full", "lora"])
def test_fsdp_gathers_nothing_that_is_not_used(folder, case, rank):
    """Whose memory would be taken back while other processes still write into it."""
    gathered, used = json.loads((folder / f"gathered-{case}-{rank}.json").read_text())
    assert gathered == used > 0


def test_compiled_blocks_are_sharded_and_start_as_the_reference(tmp_path):
    save_model(tmp_path / "model", **BLOCKS)
    launch(tmp_path, "compiled")
    (first,) = torch.load(tmp_path / "compiled.pt")["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), first
    assert first["accuracy"] == 0.5


def test_no_process_waits_for_one_that_could_not_write(folder):
    for rank, why in enumerate(["No space left on device", "see the other process"]):
        heard = json.loads((folder / f"unwritten-{rank}.json").read_text())
        for said, what in zip(
            heard,
            ["the result cannot be written", "validation images cannot be", "cannot be uploaded"],
            strict=True,
        ):
            assert what in said and f"({why})" in said


def test_fsdp_rounds_no_more_than_autocast(tmp_path, monkeypatch):
    """accelerate has FSDP2 on accelerators only, so the plugin is that of a run on them."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    sharding = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        process_index=0,
    )
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: sharding)
    made = make_accelerator(tiny.config(tmp_path, tmp_path, mixed_precision="bf16"))
    assert made.state.fsdp_plugin.mixed_precision_policy is None


def test_the_greatest_seed_has_a_successor(tmp_path, monkeypatch):
    """Which the second process takes."""
    second = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU, mixed_precision="no", process_index=1
    )
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: second)
    make_accelerator(tiny.config(tmp_path, tmp_path, seed=2**32 - 1))
    assert torch.initial_seed() == 0


def test_one_process_refuses_the_checkpoint_of_two(folder):
    copy = folder / "of-two"
    shutil.copytree(folder / "lora-ddp-2" / "checkpoint-1", copy / "checkpoint-1")
    with pytest.raises(ConfigError, match="processes: the checkpoint has 2, this run 1"):
        two_processes.train(folder, copy.name, 2, rank=2, resume_from_checkpoint="latest")
