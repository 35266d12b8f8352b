"""Processes that read and decode for a `DataLoader`."""

from __future__ import annotations

import atexit
import os
from typing import Any


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
    """End this process without taking the interpreter down.

    A thread of the process hands over what was read. If it is in torch's C++ when the interpreter
    goes, Python (before 3.14) unwinds it, which aborts the process, and torch raises an error for
    that in the training, at whatever it does then.
    """
    atexit.register(os._exit, 0)
