# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels that cost the host little."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of x the current one: Triton launches there, on its current stream."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


# Compiled kernels, each with a grid, by what they were compiled for and the values of scalars.
_compiled: dict[tuple[Any, ...], Callable[..., None]] = {}
MOST_COMPILED = 4096


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[float, ...],
    options: Mapping[str, Any],
) -> None:
    """Launch the kernel with the tensors and then the scalars as its arguments, by position.

    Args:
        kernel: a Triton kernel.
        grid: of its programs.
        tensors: on one device: the second launch takes their addresses, whatever they are.
        scalars: numbers, and compile-time constants after them.
        options: for its compilation.

    For Triton to find the compiled kernel that fits takes several times as long as to launch it.
    What it compiles depends on the dtype and the alignment of a tensor and on the value of a
    scalar, so where these come again, the kernel that it took before is launched.
    """
    knobs = triton.knobs
    if knobs.runtime.add_stages_inspection_hook is not None:
        # It may have every launch compiled in another way.
        kernel[grid](*tensors, *scalars, **options)
        return
    device = tensors[0].get_device()  # type: ignore[union-attr]
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        # The hash of a kernel is that of its source.
        id(kernel),
        grid,
        device,
        scalars,
        *options.items(),
        *[None if t is None else t.dtype for t in tensors],
        *[None if pointer is None else pointer & 15 for pointer in pointers],
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
    )
    again = _compiled.get(key)
    if again is not None:
        stream = triton.runtime.driver.active.get_current_stream(device)
        again(*pointers, *scalars, stream=stream)
        return
    compiled = kernel[grid](*tensors, *scalars, **options)
    if isinstance(compiled, CompiledKernel):  # The interpreter has none.
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled[grid]
