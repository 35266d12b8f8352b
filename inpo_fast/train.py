"""`accelerate launch -m inpo_fast.train …`, and `inpo-fast train …`: see `inpo_fast.training`."""

from __future__ import annotations

import argparse
import sys

from .training.config import ConfigError, PreferenceConfig
from .training.leaving import leave
from .training.optimization import TrainingError
from .training.pairs import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    PreferenceConfig.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .training.trainer import PreferenceTrainer

    try:
        trainer = PreferenceTrainer(PreferenceConfig.from_arguments(arguments))
        if trainer.data.report is not None:
            # what is trained on, and what is left out and why
            left_out = f"{trainer.order.left_out} pairs of an epoch fill no batch and are left out"
            trainer.accelerator.print(f"{trainer.data.report.text()}\n{left_out}")
        trainer.train()
    except (ConfigError, DataError, TrainingError) as error:
        print(f"inpo-fast train: {error}", file=sys.stderr)
        return 1
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="inpo_fast.train", description=__doc__)
    add_arguments(_parser)
    if _failed := run(_parser.parse_args()):
        sys.exit(_failed)
    leave()
