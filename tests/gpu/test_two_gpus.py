"""Two GPUs that share the pairs are one with all of them: DDP and FSDP2, over NCCL."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

from inpo_fast.training.weights import LORA
from tests.gpu import two_gpus
from tests.gpu.trainings import BLOCKS, save_model, without_measuring
from tests.training import two_processes

ROOT = Path(__file__).parents[2]
KINDS = {"ddp": {}, "fsdp": two_processes.FSDP, "compiled": two_processes.FSDP}

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder with the trainings of two processes, by kind; run once."""
    done = {}

    def run(kind):
        if kind not in done:
            # a launch that fails fails the tests of its kind, and is not tried again
            done[kind] = None
            root = tmp_path_factory.mktemp(kind)
            shape = BLOCKS if kind == "compiled" else {}
            save_model(root / "model", **shape)
            launched = subprocess.run(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *("--nproc_per_node", "2", "-m", "tests.gpu.two_gpus", str(root), kind),
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **KINDS[kind]},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert launched.returncode == 0, launched.stderr[-6000:]
            done[kind] = root
        assert done[kind] is not None, f"the two processes of {kind} failed in an earlier test"
        return done[kind]

    return run


PAIRED = [(kind, case) for kind, cases in two_gpus.CASES.items() for case in cases]


@pytest.mark.parametrize(("kind", "case"), PAIRED)
def test_two_gpus_are_one_with_twice_the_pairs(folder_of, kind, case, monkeypatch):
    folder = folder_of(kind)
    without_measuring(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    two_gpus.exact_float32()
    together = folder / f"{case}-one-{kind}"
    twice = 2 * two_gpus.BATCH
    two_processes.train(folder, together.name, twice, **two_processes.CASES[case])
    one = torch.load(together.with_suffix(".pt"), map_location="cpu")
    two = torch.load(folder / f"{case}-{kind}-{two_gpus.BATCH}.pt", map_location="cpu")
    two_processes.assert_alike(one, two)


@pytest.mark.parametrize("kind", two_gpus.CASES)
@pytest.mark.parametrize("name", two_gpus.ROUNDED)
@pytest.mark.parametrize("layers", ["rounded", "fast"])
def test_in_bfloat16_the_policy_starts_as_the_reference(folder_of, kind, name, layers):
    first = torch.load(folder_of(kind) / f"{layers}-{name}-{kind}.pt")["history"][0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5


@pytest.mark.parametrize("kind", two_gpus.CASES)
def test_two_gpus_resume_with_the_same_bits(folder_of, kind):
    folder = folder_of(kind)
    for name in (LORA, f"checkpoint-2/{LORA}"):
        whole, again = (
            load_file(folder / f"{run}-{kind}-{two_gpus.BATCH}" / name) for run in ("lora", "again")
        )
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[key], value) for key, value in whole.items())
    checkpoint = folder / f"lora-{kind}-{two_gpus.BATCH}" / "checkpoint-2"
    ranks = sorted(path.name for path in checkpoint.glob("random*"))
    assert ranks == ["random_states_0.pkl", "random_states_1.pkl"]


def test_compiled_blocks_are_sharded(folder_of):
    saved = torch.load(folder_of("compiled") / "rounded-full-compiled.pt", map_location="cpu")
    first, second = saved["history"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), first
    assert math.isfinite(second["loss"]) and second["margin_mean"] != 0
