"""The command line: `inpo-fast COMMAND`.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`. It is imported when
it is chosen, so that `inpo-fast env` works where the packages of another command are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from inpo_fast._version import __version__


class Command(NamedTuple):
    module: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "cache": Command(
        "inpo_fast.training.cache_command",
        "encode preference pairs once for all later training",
        extra="train",
    ),
    "demo": Command(
        "inpo_fast.demo",
        "invert, edit and align with the shipped model, and write a report",
        extra="demo",
    ),
    "edit": Command(
        "inpo_fast.pipelines.edit_command",
        "draw an inverted image under another prompt",
        extra="diffusers",
    ),
    "env": Command("inpo_fast.environment", "print versions, hardware and backends"),
    "eval": Command(
        "inpo_fast.evaluation.command",
        "win rates, with intervals, of a trained model over another from the same noise",
        extra="train",
    ),
    "invert": Command(
        "inpo_fast.pipelines.invert_command",
        "turn an image into noise from which it comes back exactly",
        extra="diffusers",
    ),
    "train": Command(
        "inpo_fast.train",
        "train a model on preference pairs (several devices: accelerate launch -m inpo_fast.train)",
        extra="train",
    ),
    "validate-data": Command(
        "inpo_fast.training.validate_data",
        "count pairs, ties, corrupt images and duplicates before training",
        extra="train",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="inpo-fast", description="Exact diffusion inversion and preference alignment."
    )
    parser.add_argument("--version", action="version", version=f"inpo_fast {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # Help and options belong to the command's own parser, made below.
        choices.add_parser(name, help=command.summary, add_help=False)
    chosen, rest = parser.parse_known_args(argv)

    command = COMMANDS[chosen.command]
    try:
        module = import_module(command.module)
        command_parser = argparse.ArgumentParser(
            prog=f"inpo-fast {chosen.command}", description=f"{command.summary.capitalize()}."
        )
        module.add_arguments(command_parser)
        status: int = module.run(command_parser.parse_args(rest))
    except ModuleNotFoundError as error:
        if command.extra is None or error.name is None or error.name.startswith("inpo_fast"):
            raise
        print(
            f"inpo-fast {chosen.command} needs the package {error.name}: "
            f'pip install "inpo-fast[{command.extra}]"',
            file=sys.stderr,
        )
        return 1
    return status
