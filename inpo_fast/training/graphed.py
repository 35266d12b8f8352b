"""Model calls as CUDA graphs: captured once for every shape of a batch, then replayed.

A denoiser's call is a thousand kernels, and a GPU may run them faster than the host can launch them
one by one. A graph of them is one launch. With gradient it is two, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..graph import capture


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, given: tuple[Tensor, ...]) -> Tensor:
        for mine, theirs in zip(self.inputs, given, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.output.clone()


@dataclass(frozen=True)
class _Learnable:
    """Forward and backward, and what the second reads of the output's gradient."""

    forward: _Graph
    backward: torch.cuda.CUDAGraph
    gradient: Tensor
    sums: _Sums


Gradients = list[tuple[nn.Parameter, "Tensor | None"]]


class _Sums:
    """Where graphs add the gradients of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._own: list[tuple[nn.Parameter, Tensor]] = []

    def make(self, reached: Sequence[nn.Parameter]) -> None:
        """Have a sum for each of these parameters, which a backward reaches: others have no
        gradient without graphs, either, and an optimiser leaves them alone."""
        if not self._own:
            self._own = [(p, torch.zeros_like(p)) for p in reached]

    def drop(self) -> Gradients:
        """Let the parameters have no gradient; those they had are returned."""
        had: Gradients = [(p, p.grad) for p in self._parameters]
        self.give([(p, None) for p in self._parameters])
        return had

    def give(self, gradients: Gradients | None = None) -> None:
        """Let parameters have these gradients, by default the sums."""
        for parameter, gradient in self._own if gradients is None else gradients:
            parameter.grad = gradient

    def hand_out(self) -> None:
        """Let the sums be the parameters' gradients, and go on from those they have."""
        if fresh := [own for parameter, own in self._own if parameter.grad is None]:
            torch._foreach_zero_(fresh)
        for parameter, own in self._own:
            if parameter.grad is not None and parameter.grad is not own:
                own.copy_(parameter.grad)
        self.give()


class _Replayed(torch.autograd.Function):
    """A forward that is replayed, and whose backward is."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, graphs: _Learnable, *given: Tensor) -> Tensor:
        ctx.graphs = graphs
        return graphs.forward.replay(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        graphs: _Learnable = ctx.graphs
        graphs.sums.hand_out()
        graphs.gradient.copy_(dy)
        graphs.backward.replay()
        return (None,) * (2 + len(graphs.forward.inputs))


class Graphs:
    """Functions of tensors as graphs, which share their memory.

    What else a function reads, weights above all, may change its values, but not its place in
    memory. Graphs are replayed one after the other.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # between a forward and its backward graphs without gradient are replayed
        self._pool_with_gradient = torch.cuda.graph_pool_handle()
        self._graphs: dict[Any, _Graph] = {}
        self._learnable: dict[Any, _Learnable] = {}
        self._sums: dict[nn.Module, _Sums] = {}

    def __len__(self) -> int:
        return len(self._graphs) + len(self._learnable)

    @torch.no_grad()
    def call(self, name: Hashable, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """What the function returns, without gradient.

        Args:
            name: by which a function is known again.
            function: waits for nothing on the host; called where no graph has these shapes.
            given: its arguments.
        """
        key = _key(name, given)
        if key not in self._graphs:
            inputs = tuple(t.clone() for t in given)

            def body() -> Tensor:
                return function(*inputs)

            graph, output = capture(body, body, pool=self._pool, stream=self._stream)
            self._graphs[key] = _Graph(graph, inputs, output)
        return self._graphs[key].replay(given)

    def learn(self, model: nn.Module, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """The same with a gradient, for the parameters of `model` alone.

        Its backward comes before the next call, and runs no hooks of parameters. Gradients are
        added to those that parameters have, in the same memory from step to step.
        """
        key = _key(model, given)
        if key not in self._learnable:
            self._learnable[key] = self._capture(model, function, given)
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        replayed: Tensor = _Replayed.apply(anchor, self._learnable[key], *given)  # type: ignore[no-untyped-call]
        return replayed

    def _capture(
        self, model: nn.Module, function: Callable[..., Tensor], given: tuple[Tensor, ...]
    ) -> _Learnable:
        sums = self._sums.setdefault(model, _Sums(model))
        inputs = tuple(t.detach().clone() for t in given)
        options: dict[str, Any] = {"pool": self._pool_with_gradient, "stream": self._stream}

        def forward() -> Tensor:
            return function(*inputs)

        reached: list[nn.Parameter] = []

        def whole() -> None:
            forward().sum().backward()
            reached.extend(p for p, found in sums.drop() if found is not None)

        had = sums.drop()
        try:
            graph, output = capture(forward, whole, **options)
            # not in the warm-up, whose memory they would keep from being given back
            sums.make(reached)
            gradient = torch.empty_like(output)
            # the captured backward adds to these, now and whenever it is replayed
            sums.give()
            backward, _ = capture(
                lambda: output.backward(gradient),
                lambda: None,
                **options,
            )
        finally:
            sums.give(had)
        return _Learnable(_Graph(graph, inputs, output.detach()), backward, gradient, sums)


def _key(name: Hashable, given: tuple[Tensor, ...]) -> Any:
    # the kernels are chosen at the capture, by the settings of that time
    settings = torch.get_deterministic_debug_mode(), torch.backends.cuda.cudnn_sdp_enabled()
    return (name, settings, *((t.shape, t.stride(), t.dtype) for t in given))
