"""Processes that read and decode for a `DataLoader`."""

from __future__ import annotations

import atexit
from typing import Any

from .leaving import leave


def worker_options(count: int) -> dict[str, Any]:
    """Arguments of a `DataLoader` with so many processes; 0 does the work in this one."""
    if not count:
        return {}
    return {
        "num_workers": count,
        # a fork of a process with threads (torch's, pyarrow's) or CUDA can hang
        "multiprocessing_context": "spawn",
        "worker_init_fn": _leave_at_once,
    }


def _leave_at_once(_: int) -> None:
    """Leave when this process's work is done; torch raises in the training, at whatever it does
    then, if a worker aborts."""
    atexit.register(leave)
