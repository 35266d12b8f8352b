# SPDX-License-Identifier: Apache-2.0
"""One process of the trainer under DDP; `benchmarks.train` starts them.

``python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.train_scaling
--device cuda`` prints a line of JSON: samples/s of all processes together, SD1.5, full fine-tuning
eager, gradients exchanged once an optimiser step.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

import torch

from benchmarks import training_loop
from benchmarks.training_loop import batches, micro_steps, wall_clock
from inpo_fast.determinism import reproducible_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=16, help="of a process's micro-batch")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    pairs = 1 if options.quick else options.pairs
    # every process takes other pairs, as many of them
    given = replace(
        training_loop.setting("sd15", options.quick), pairs=pairs * int(os.environ["WORLD_SIZE"])
    )
    trainer = training_loop.make_trainer(
        given,
        options.device,
        gradient_accumulation_steps=options.accumulation,
    )
    learner, accelerator = trainer.learner, trainer.accelerator
    # as often as each other, which is all that counts here
    numbers = [number for number, _ in micro_steps(learner, pairs)]
    numbers = numbers * (options.accumulation // len(numbers) or 1)
    if len(numbers) % options.accumulation:
        numbers = numbers * options.accumulation
    loader = batches(trainer, pairs)

    def job() -> None:
        for index, number in enumerate(numbers):
            last = (index + 1) % options.accumulation == 0
            learner.learn(next(loader), number, last=last)
            if last:
                trainer.stepper.step()

    with reproducible_training():  # as `PreferenceTrainer.train` does it
        job()
    accelerator.wait_for_everyone()
    # every process must run as often: by count, not by time
    repeats = 1 if options.quick else 3

    def together() -> None:
        for _ in range(repeats):
            job()
        accelerator.wait_for_everyone()

    with reproducible_training():
        seconds = wall_clock(together, options.device, least=0.0)
    samples = repeats * len(numbers) * pairs * accelerator.num_processes
    if accelerator.is_main_process:
        print(json.dumps({"samples_per_second": samples / seconds, "pairs": pairs}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
