"""Settings of torch under which computations repeat their bits, for the time of a run only."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

# not cudnn.flags(): it would also reset the settings that it is not given, TF32 among them
_SETTINGS = {
    ("torch.backends.cudnn", "benchmark"): False,
    ("torch.backends.cudnn", "deterministic"): True,
    ("torch._inductor.config", "deterministic"): True,
}
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_settings_lock = threading.Lock()
_running = 0
_before: dict[tuple[str, str], bool] = {}


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """The settings under which a model returns the same bits for the same input, while a run lasts.

    cuDNN takes its deterministic algorithms, chosen without benchmarking. Inductor chooses its
    kernels without benchmarking too, so that another process compiles the same ones. The settings
    are global: runs at the same time share them, and the last one to end restores them.
    """
    global _running
    with _settings_lock:
        for (module, name), value in _SETTINGS.items():
            # of modules that are there: importing Inductor takes a second, and whoever compiles has
            # done so, perhaps since the first of the runs began
            owner = sys.modules.get(module)
            if owner is not None and (module, name) not in _before:
                _before[module, name] = getattr(owner, name)
                setattr(owner, name, value)
        _running += 1
    try:
        yield
    finally:
        with _settings_lock:
            _running -= 1
            if _running == 0:
                for (module, name), before in _before.items():
                    setattr(sys.modules[module], name, before)
                _before.clear()


class _Shared:
    """A setting of the process that the first to enter makes, and the last to leave takes back.

    Args:
        make: makes it, and is given where to say how it is undone.
    """

    def __init__(self, make: Callable[[contextlib.ExitStack], None]) -> None:
        self._make, self._undo, self._inside = make, contextlib.ExitStack(), 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with _settings_lock:
            if self._inside == 0:
                self._make(self._undo)
            self._inside += 1
        try:
            yield
        finally:
            with _settings_lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


def _set_workspace(undo: contextlib.ExitStack) -> None:
    if _WORKSPACE not in os.environ:
        undo.callback(os.environ.pop, _WORKSPACE, None)
        os.environ[_WORKSPACE] = ":4096:8"


def _set_algorithms(undo: contextlib.ExitStack) -> None:
    # not use_deterministic_algorithms(), which imports Inductor and changes its setting too
    undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
    torch.set_deterministic_debug_mode("error")
    # it would write to every new tensor, for programs that read what they have not written
    filling: Any = torch.utils.deterministic
    undo.callback(setattr, filling, "fill_uninitialized_memory", filling.fill_uninitialized_memory)
    filling.fill_uninitialized_memory = False
    if torch.cuda.is_initialized() and not _products_may_run():
        # Only cuBLAS is in the way, and torch gives it a workspace for every stream, with which
        # it repeats its sums too. What this mode still lets through is kept from running.
        torch.set_deterministic_debug_mode("warn")
        attention = torch.backends.cuda
        undo.callback(attention.enable_cudnn_sdp, attention.cudnn_sdp_enabled())
        attention.enable_cudnn_sdp(False)


@functools.cache
def _products_may_run() -> bool:
    """Whether torch lets cuBLAS run in this mode: it looks for the workspace once, at the first
    product of the process, which may have come before the training."""
    one = torch.ones(1, 1, device="cuda")
    try:
        torch.mm(one, one)
    except RuntimeError:
        return False
    return True


_workspace, _algorithms = _Shared(_set_workspace), _Shared(_set_algorithms)


@contextlib.contextmanager
def reproducible_training() -> Iterator[None]:
    """`reproducible`, and what `deterministic_gradients` needs of the process.

    cuBLAS repeats its sums with the workspace that torch's documentation names.
    """
    with _workspace.held(), reproducible():
        yield


@contextlib.contextmanager
def deterministic_gradients() -> Iterator[None]:
    """The same gradient for the same input: for forward and backward, in `reproducible_training`.

    torch takes deterministic algorithms and raises where there is none. Attention above all: the
    backward of cuDNN's, torch's first choice on recent GPUs, adds in the order in which blocks
    finish. In a process that has used cuBLAS before, torch warns instead, and the backward of
    float32 attention may then repeat no bits.
    """
    with _algorithms.held():
        yield
