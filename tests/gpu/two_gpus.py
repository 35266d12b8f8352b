"""What test_two_gpus.py runs, one process a GPU: the trainings of tests/training/two_processes.py.

Arguments: folder, and ddp, fsdp or compiled (by FSDP2). How they share the work accelerate reads
from the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from inpo_fast.training.leaving import leave
from tests.training import two_processes

BATCH = 2
CASES = {"ddp": ("full", "noised", "kto", "lora"), "fsdp": ("full", "lora")}
ROUNDED = {
    "full": {"mixed_precision": "bf16"},
    "lora": {"mixed_precision": "bf16", "rank": 2},
}
"""In which policy and reference must be rounded alike."""
FAST = {"ddp": {"fused_layers": True, "cuda_graphs": True}, "fsdp": {"fused_layers": True}}
"""The same with kernels and graphs: FSDP2 spreads the weights that a graph would read."""


def exact_float32() -> None:
    """TF32 keeps 10 bits of what a convolution reads, so that a last bit that differs, as it does
    when another batch is summed in another order, may become one of those."""
    torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    root, kind = Path(sys.argv[1]), sys.argv[2]
    two_processes.measure_nothing()
    exact_float32()
    if kind in CASES:
        cases = {name: two_processes.CASES[name] for name in CASES[kind]}
        two_processes.run_cases(root, f"{kind}-{BATCH}", BATCH, cases)
        for name, changes in ROUNDED.items():
            two_processes.train(root, f"rounded-{name}-{kind}", BATCH, **changes)
            changes = {**changes, **FAST[kind]}
            two_processes.train(root, f"fast-{name}-{kind}", BATCH, **changes)
    else:
        two_processes.train(root, f"rounded-full-{kind}", BATCH, **two_processes.COMPILED)
    assert torch.distributed.get_backend() in ("nccl", "cuda:nccl,cpu:gloo")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
