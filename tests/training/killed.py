"""Kill trainings at random moments and resume them; run as a script by test_resume.py.

Everything is imported once, and every training is a fork. The parent computes nothing, so that no
thread is lost in a fork.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import peft  # noqa: E402, F401

import inpo_fast.training.step  # noqa: E402
from inpo_fast.training.trainer import PreferenceTrainer  # noqa: E402
from tests.training import tiny  # noqa: E402

inpo_fast.training.step.count_flops = lambda _: (1, 2)


def train(model: Path, output: Path) -> None:
    settings = {"resume_from_checkpoint": "latest", "checkpointing_steps": 2, "logging_steps": 5}
    schedule = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "use_ema": True}
    sizes = {"max_train_steps": 14, "gradient_accumulation_steps": 2, "inversion_steps": 2}
    config = tiny.config(model, output, checkpoints_total_limit=2, **settings, **schedule, **sizes)
    PreferenceTrainer(config, dataset=tiny.pairs()).train()


def forked(model: Path, output: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(model, output)
        status = 0
    finally:
        os._exit(status)


def main(root: Path, kills: int) -> None:
    model = root / "model"
    began = time.monotonic()
    if os.waitpid(forked(model, root / "whole"), 0)[1] != 0:
        sys.exit("the uninterrupted run failed")
    duration = time.monotonic() - began
    moments = random.Random(0)
    done = run = 0
    while done < kills:
        output = root / f"killed-{run}"
        child = forked(model, output)
        deadline = time.monotonic() + moments.uniform(0.1, 0.8) * duration
        while (finished := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline and done < kills:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                break
            time.sleep(0.002)
        else:
            if finished[1] != 0:
                sys.exit("a resumed run failed")
            run += 1
    if os.waitpid(forked(model, root / f"killed-{run}"), 0)[1] != 0:
        sys.exit("a resumed run failed")
    print(done, run + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
