"""What a run reports: metrics summed on the device, throughput, and the share of the peak."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Meter:
    """Means of scalars over a logging interval. Nothing waits for the device until `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count scalars, [] each, on the device."""
        for name, value in values.items():
            value = value.detach().float()
            known = name in self._sums
            self._sums[name] = self._sums[name] + value if known else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last `read`. All processes must call it.

        Args:
            reduce: mean of a tensor over the processes.
        """
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, reduce(means).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return values


class Throughput:
    """Samples a second and the model's FLOPs as a share of the peak, between two looks.

    A look must follow a read of a result, so that the device has done what is counted.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self.samples = 0
        self.flops = 0.0

    def look(self, peak: float | None) -> dict[str, float]:
        """`samples_per_second`, of images, and `mfu`, of this process."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        values = {"samples_per_second": self.samples / seconds}
        if peak is not None and self.flops:
            values["mfu"] = self.flops / seconds / peak
        self.samples, self.flops = 0, 0.0
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still, as for validation and checkpoints."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def count_flops(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs of the matrix products, convolutions and attention of a call and of its backward, by
    torch's own counter, on meta tensors: without memory, and where no compiled graph hides them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = forward()
        called = int(counter.get_total_flops())
        output.sum().backward()
        return called, int(counter.get_total_flops()) - called


def on_meta(module: nn.Module) -> Any:
    """A copy of the structure without data, on the meta device."""
    tensors: Sequence[Tensor] = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this device in large matrix products, the best of a few tries, measured once in a
    process: it takes seconds in float32.

    A card's clock and power limit make nominal figures a poor yardstick. The numbers are random and
    the products follow each other, because both cost power: of ones, or of one product alone, the
    rate is one that no model could have.
    """
    on_gpu = device.type == "cuda"
    side, products, tries = (8192, 20, 4) if on_gpu else (512, 1, 4)
    source = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=source).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(tries):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / products)
    return 2 * side**3 / best
