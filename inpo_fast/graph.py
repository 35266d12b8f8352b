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
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _capturing:
            # thread_local: another thread may allocate meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = body()
            except BaseException:
                # the capture has failed already, and ending it says so once more
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    current.wait_stream(stream)
    return graph, result
