"""Model calls as CUDA graphs: captured once for every shape of a batch, then replayed.

A denoiser's call is a thousand kernels, and a GPU may run them faster than the host can launch them
one by one. A graph of them is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import capture


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """Functions of tensors, without gradient, as graphs that share their memory.

    What else a function reads, weights above all, may change its values, but not its place in
    memory. Graphs are replayed one after the other.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Any, _Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.no_grad()
    def call(self, name: Hashable, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """What the function returns.

        Args:
            name: by which a function is known again.
            function: waits for nothing on the host; called where no graph has these shapes.
            given: its arguments.
        """
        # the kernels are chosen at the capture, by the settings of that time
        settings = torch.get_deterministic_debug_mode(), torch.backends.cuda.cudnn_sdp_enabled()
        key = (name, settings, *((t.shape, t.stride(), t.dtype) for t in given))
        if key not in self._graphs:
            self._graphs[key] = self._capture(function, given)
        found = self._graphs[key]
        for mine, theirs in zip(found.inputs, given, strict=True):
            mine.copy_(theirs)
        found.graph.replay()
        return found.output.clone()

    def _capture(self, function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> _Graph:
        inputs = tuple(t.clone() for t in given)

        def body() -> Tensor:
            return function(*inputs)

        graph, output = capture(body, body, pool=self._pool, stream=self._stream)
        return _Graph(graph, inputs, output)
