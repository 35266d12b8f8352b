"""Capture of CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_capturing = threading.RLock()
"""Torch allows one capture at a time in a process."""


def capture(
    body: Callable[[], T], warm_up: Callable[[], object], *, pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of what `body` launches, and what it returned.

    Args:
        body: launches kernels, waits for nothing, and leaves its result in memory of the graph.
        warm_up: run before: compiles, and loads whatever must not be loaded in a capture.
        pool: memory that graphs share which are never replayed at the same time.
        stream: where both run, after what the current stream has been given.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        warm_up()
        graph = torch.cuda.CUDAGraph()
        with _capturing:
            # what torch has cached for streams serves no capture, nor does it free that during one
            stream.synchronize()
            torch.cuda.empty_cache()
            # thread_local: another thread may allocate meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = body()
            except BaseException:
                _give_up(graph, pool, stream.device)
                raise
            graph.capture_end()
    current.wait_stream(stream)
    return graph, result


def _give_up(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """End a capture that has failed."""
    try:
        graph.capture_end()
    except RuntimeError:
        # It says so once more where CUDA has ended it. Torch (before 2.13) then goes on taking it
        # for under way, and frees no memory again.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
