"""Checkpoints that are there completely or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .artefacts import CONFIG
from .config import ConfigError
from .optimization import TrainingError
from .processes import on_main, together

_NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"


class Checkpoints:
    """The folders `checkpoint-<step>` of a run.

    A checkpoint is written beside its place, forced to the disk and renamed, so a kill or a full
    disk leaves the ones before it as they are. All processes write, into one file system.

    Args:
        folder: of the run.
        limit: how many to keep; None keeps all.
        accelerator: of the run.
    """

    def __init__(self, folder: Path, limit: int | None, accelerator: Any) -> None:
        self.folder, self.limit, self.accelerator = folder, limit, accelerator

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def resolve(self, wanted: str | None) -> Path | None:
        """The checkpoint to go on from; None begins anew.

        Raises:
            ConfigError: it does not exist; or the folder has checkpoints or a result that a run
                which does not go on from there would overwrite.
        """
        steps = self.steps()
        if wanted == "latest":
            return self.path(steps[-1]) if steps else None
        path = None if wanted is None else self._find(wanted)
        if path is not None and path.resolve().parent == self.folder.resolve():
            return path
        if steps:
            raise ConfigError(
                f"output_dir {self.folder} has checkpoints up to step {steps[-1]}: set "
                f"resume_from_checkpoint=latest, or choose another output_dir"
            )
        if (self.folder / CONFIG).exists():
            raise ConfigError(
                f"output_dir {self.folder} holds the result of another training: choose another"
            )
        return path

    def _find(self, wanted: str) -> Path:
        for path in (Path(wanted), self.folder / wanted):
            if (path / STATE).is_file():
                return path
        raise ConfigError(
            f"resume_from_checkpoint must be latest or a folder with {STATE}, got {wanted}; "
            f"{self.folder} has the steps {self.steps()}"
        )

    def prune(self, step: int) -> None:
        """Remove the oldest beyond the limit, but not that of `step`: it stays also where a run
        that was resumed before others comes by again. For the main process."""
        others = [other for other in self.steps() if other != step]
        many = len(others) + 1 - self.limit if self.limit else 0
        for old in others[: max(0, many)]:
            shutil.rmtree(self.path(old))

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Write the checkpoint of `step`, or replace it; all processes must call it.

        Args:
            write: puts this process's part into a folder; no collectives in there.

        Raises:
            TrainingError: on all processes, where one of them could not write.
        """
        final = self.path(step)
        part = self.folder / f".{final.name}.tmp"
        replaced = self.folder / f".{final.name}.replaced.tmp"

        def prepare() -> None:
            # also those of runs that were killed while they wrote
            for left in self.folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(left)
            part.mkdir(parents=True)

        def finish() -> None:
            _sync(part)
            if final.is_dir():
                # a run that was resumed before it comes by again; the next `prepare` removes this
                # where a kill does not let this process do so
                os.replace(final, replaced)
            os.replace(part, final)
            _sync_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self.prune(step)

        def failed(error: object) -> str:
            steps = self.steps()
            kept = f"the checkpoint of step {steps[-1]} is untouched" if steps else "none before it"
            return (
                f"the checkpoint of step {step} cannot be written to {self.folder} ({error}); "
                f"{kept}: free disk space and resume with resume_from_checkpoint=latest"
            )

        accelerator = self.accelerator
        try:
            together(accelerator, on_main(accelerator, prepare), failed)
            together(accelerator, lambda: write(part), failed)
            together(accelerator, on_main(accelerator, finish), failed)
        except TrainingError:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
            raise


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators that this process draws from: on the host and, where that is
    a GPU, on its device. Of other GPUs it has nothing, as they may not be there to resume on."""
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what `rng_state` returned; a GPU takes the state of any, and the CPU none."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    random.setstate(state["python"])


def read_state(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the checkpoint {path} cannot be read: {error}") from error
    return state


def _sync(folder: Path) -> None:
    """Force all files of a folder to the disk."""
    for entry in sorted(folder.rglob("*")):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(entry)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
