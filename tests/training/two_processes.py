"""What test_processes.py runs under `accelerate launch`: trainings whose processes share the pairs.

Arguments: folder, pairs of a process and micro-batch, and "compiled" for what is compiled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import inpo_fast.training.step
import inpo_fast.training.trainer
from inpo_fast.training.leaving import leave
from inpo_fast.training.optimization import TrainingError
from inpo_fast.training.trainer import PreferenceTrainer
from tests.training import tiny

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
}
"""What `accelerate launch` would set."""


def measure_nothing() -> None:
    """Counting FLOPs and measuring the peak take longer than the trainings here."""
    inpo_fast.training.step.count_flops = lambda _: (1, 2)
    inpo_fast.training.trainer.measured_peak = lambda *_: 1.0


def whole(tensor):
    """A gathered tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_on_cpu() -> None:
    """accelerate has FSDP2 on accelerators only: let it take these processes for those of one."""
    os.environ.update(FSDP)
    begin = PartialState.__init__

    def begin_as_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


def train(root: Path, name: str, batch: int, **changes) -> PreferenceTrainer:
    """Train, and write the first step's gradient and the logged values into `root`."""
    config = tiny.config(
        root / "model",
        root / name,
        **{
            "train_batch_size": batch,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 2,
            "inversion_steps": 2,
            "checkpointing_steps": 1,
            **changes,
        },
    )
    run = PreferenceTrainer(config, dataset=tiny.pairs())
    gradients = {}

    def keep(*_):
        named = {n: p.grad for n, p in run.policy.named_parameters() if p.grad is not None}
        gradients.setdefault("first", {n: whole(g).clone() for n, g in named.items()})

    run.optimizer.register_step_pre_hook(keep)
    history = run.train()
    if run.accelerator.is_main_process:
        torch.save({"gradients": gradients["first"], "history": history}, root / f"{name}.pt")
    return run


def assert_alike(one, two) -> None:
    """What `train` has written is the same training, to the rounding of float32."""
    total = torch.stack([gradient.norm() for gradient in one["gradients"].values()]).norm()
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        # both sum the same float32 terms in another order; β makes them large, not inexact
        error = (gradient.cpu() - two["gradients"][name].cpu()).norm()
        assert error <= 1e-5 * max(gradient.norm(), 1e-3 * total), name
    first, other = one["history"][0], two["history"][0]
    for key in ("loss", "policy_winner", "policy_loser", "reference_winner", "reference_loser"):
        if key in first:
            assert math.isclose(other[key], first[key], rel_tol=1e-6), key
    assert math.isclose(other["grad_norm"], first["grad_norm"], rel_tol=1e-5)


def main() -> None:
    root, batch = Path(sys.argv[1]), int(sys.argv[2])
    measure_nothing()
    if "compiled" in sys.argv:
        shard_on_cpu()
        train(root, "compiled", batch, max_train_steps=1, **COMPILED)
    else:
        run_cases(root, f"ddp-{batch}", batch, CASES)
        shard_on_cpu()
        cases = {name: CASES[name] for name in ("full", "lora")}
        run_cases(root, f"fsdp-{batch}", batch, cases)
        for name, changes in cases.items():
            count_gathered(root, f"gathered-{name}", batch, **changes)
        fail_to_write(root, batch)
    torch.distributed.destroy_process_group()


def count_gathered(root: Path, name: str, batch: int, **changes) -> None:
    """Note how often weights were gathered, and used, by what FSDP2 calls it in a profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run = train(root, name, batch, **changes)
    done = [event.name.split(" ")[0] for event in profiler.events()]
    counts = [done.count(name) for name in ("FSDP::all_gather", "FSDP::all_gather_copy_out")]
    (root / f"{name}-{run.accelerator.process_index}.json").write_text(json.dumps(counts))


def fail_to_write(root: Path, batch: int) -> None:
    """Note what every process hears where the main one, which alone writes, cannot."""
    module = inpo_fast.training.trainer
    config = tiny.config(
        *(root / "model", root / "unwritten"), train_batch_size=batch, rank=2, push_to_hub=True
    )
    run = PreferenceTrainer(config, dataset=tiny.pairs())
    rank = run.accelerator.process_index

    def full(*_):
        if rank == 0:
            raise OSError("No space left on device")

    heard = []
    writers = {"write_result": run.save, "keep_images": run._validate, "push": run.save}
    for name, action in writers.items():
        with patch.object(module, name, full), patch.object(module, "draw_images"):
            try:
                action()
            except TrainingError as error:
                heard.append(str(error))
    (root / f"unwritten-{rank}.json").write_text(json.dumps(heard))


CASES = {
    "full": {},
    "noised": {"latents": "q_sample"},
    "kto": {"loss_type": "kto"},
    "lora": {"rank": 2},
}
COMPILED = {"compile": "blocks", "latents": "q_sample", "mixed_precision": "bf16"}


def run_cases(root: Path, suffix: str, batch: int, cases) -> None:
    for name, change in cases.items():
        run = train(root, f"{name}-{suffix}", batch, **change)
    # the last step of the LoRA again, from the checkpoint
    if run.accelerator.is_main_process:
        (root / f"again-{suffix}").mkdir()
        checkpoint = root / f"lora-{suffix}" / "checkpoint-1"
        shutil.copytree(checkpoint, root / f"again-{suffix}" / "checkpoint-1")
    run.accelerator.wait_for_everyone()
    train(root, f"again-{suffix}", batch, rank=2, resume_from_checkpoint="latest")


if __name__ == "__main__":
    main()
    leave()
