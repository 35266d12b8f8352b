# SPDX-License-Identifier: Apache-2.0
"""Attention, forward and backward, at the shapes of a training step: what its determinism costs.

The trainer repeats its bits. cuDNN, torch's first choice on Hopper, does not: its backward adds in
the order in which blocks finish. torch's own way out is FlashAttention, and the trainer's is the
backward of `inpo_fast.layers.attention_kernels`, after cuDNN's forward. Before it is timed, a
backward must repeat its bits and be as near to float64 as FlashAttention's. Rows named "tiles" try
how the kernels are cut up.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Row, captured, interleaved, median_us
from inpo_fast.determinism import deterministic_gradients
from inpo_fast.layers import attention_kernels as kernels
from inpo_fast.layers.attention import DeterministicAttention, output_and_logs


class Shape(NamedTuple):
    """Of query and key, and how often a call of the model has it."""

    samples: int
    queries: int
    keys: int
    heads: int
    width: int
    times: int


SHAPES: Mapping[str, Shape] = {
    "sd15, 64x64": Shape(32, 4096, 4096, 8, 40, 5),
    "sd15, 32x32": Shape(32, 1024, 1024, 8, 80, 5),
    "sd15, 64x64, text": Shape(32, 4096, 77, 8, 40, 5),
    "sdxl, 64x64": Shape(16, 4096, 4096, 10, 64, 10),
    "sdxl, 32x32": Shape(16, 1024, 1024, 20, 64, 60),
    "sdxl, 32x32, text": Shape(16, 1024, 77, 20, 64, 60),
}
"""Micro-batches of 16 and 8 pairs."""
QUICK = {"quick": Shape(1, 70, 70, 2, 40, 1), "quick, text": Shape(1, 40, 7, 2, 64, 1)}

TILES: Mapping[int, tuple[tuple[str, ...], ...]] = {
    64: (
        ("64 64 4 3", "64 64 4 2", "64 64 8 3", "128 64 8 2", "128 64 4 2", "64 128 8 2"),
        ("128 64 8 3", "128 64 8 2", "128 64 4 3", "64 64 4 2", "64 64 4 4", "64 128 4 2"),
    ),
    128: (
        ("32 64 4 2", "32 64 4 3", "64 64 4 2", "32 128 8 3"),
        ("64 32 4 3", "64 32 4 2", "128 32 8 3", "64 64 4 2", "128 64 8 3"),
    ),
}
"""Of the kernel that owns keys, and of the one that owns queries, by the padded width of a head:
queries, keys, warps and stages."""


def stock(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    """torch's attention of [N, L, H, W], by one of its kernels."""
    with sdpa_kernel([backend]):
        y = functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value))
        )
    return y.transpose(1, 2)


class Case:
    """Tensors of a shape, and what is computed with them."""

    def __init__(self, shape: Shape, device: str) -> None:
        samples, queries, keys, heads, width, _ = shape
        rng = torch.Generator(device).manual_seed(0)

        def normal(tokens: int) -> Tensor:
            drawn = torch.randn(
                (samples, tokens, heads, width), device=device, generator=rng, dtype=torch.float32
            )
            # the interpreter truncates to bfloat16
            return drawn.to(torch.bfloat16 if device.startswith("cuda") else torch.float16)

        self.given = tuple(normal(n).requires_grad_() for n in (queries, keys, keys))
        self.dy = normal(queries)

    def gradients(self, attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*self.given), self.given, self.dy)

    def error(self, gradients: Sequence[Tensor]) -> float:
        """The largest error of the first sample's first head, relative to the largest number."""
        given = [x[:1, :, :1].detach().double().requires_grad_() for x in self.given]
        query, key, value = (x.transpose(1, 2) for x in given)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        y = (scores.softmax(-1) @ value).transpose(1, 2)
        exact = torch.autograd.grad(y, given, self.dy[:1, :, :1].double())
        return max(
            float((found[:1, :, :1] - truth).abs().max() / truth.abs().max())
            for found, truth in zip(gradients, exact, strict=True)
        )


def contenders(case: Case, cuda: bool) -> dict[str, Callable[[], Any]]:
    """Forward and backward, each by name. The deterministic ones must be called as such."""

    def torchs(backend: SDPBackend) -> Callable[[], Any]:
        return lambda: case.gradients(lambda *given: stock(*given, backend))

    found = {
        "ours": lambda: case.gradients(DeterministicAttention.apply),
        "flash": torchs(SDPBackend.FLASH_ATTENTION),
    }
    if cuda:
        found["cuDNN, bits not repeated"] = torchs(SDPBackend.CUDNN_ATTENTION)
    return found


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield a row for every shape, and one for every way to cut up a kernel."""
    cuda = device.startswith("cuda")
    if not (cuda or quick):
        raise SystemExit("benchmarks: attention is timed on a GPU: --device cuda")
    shapes = {name: shape for name, shape in (QUICK if quick else SHAPES).items()}
    chosen = [name for name in shapes if not only or name in only or name.split(",")[0] in only]
    rounds = 2 if quick else 9
    prepare = captured if cuda else (lambda function: function)
    for name in chosen:
        case, plan = Case(shapes[name], device), kernels.plan_of(shapes[name].width)
        assert plan is not None
        runs: dict[str, Callable[[], Any]] = {}
        errors: dict[str, float] = {}
        for label, run in contenders(case, cuda).items():
            free = "not repeated" in label
            try:
                with contextlib.nullcontext() if free else deterministic_gradients():
                    first, second = run(), run()
                    runs[label] = prepare(run)
            except RuntimeError as error:
                if label == "ours":
                    raise
                # a kernel that is not there for this GPU, or this torch, does not stop the others
                print(f"     {name}, {label}: {' '.join(str(error).split())[:150]}", flush=True)
                continue
            if not (free or all(map(torch.equal, first, second))):
                raise SystemExit(f"benchmarks: {name}: {label} does not repeat its bits")
            errors[label] = case.error(first)
        # one rounding more or less of P and dS
        if errors["ours"] > 2 * errors.get("flash", float("inf")):
            raise SystemExit(f"benchmarks: {name}: errors {errors}")
        times = interleaved(runs, device=device, rounds=rounds, seconds=0.1)
        found = {label: median_us(samples) for label, samples in times.items()}
        ours = found.pop("ours")
        yield Row(
            case=f"{name}, forward and backward (error {errors['ours']:.1e})",
            metric="GPU time" if cuda else "time",
            unit="us",
            ours=ours,
            rivals=found,
            ratios={label: other / ours for label, other in found.items()},
            values={"times in a model call": shapes[name].times}
            | {f"error of {label}": error for label, error in errors.items()},
        )
        yield from tiles(name, case, plan, device, rounds, prepare)


def tiles(
    name: str,
    case: Case,
    plan: kernels.Plan,
    device: str,
    rounds: int,
    prepare: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> Iterator[Row]:
    """Yield rows of the backward alone with one kernel cut up in another way."""
    query, key, value = (x.detach() for x in case.given)
    given = (query, key, value, *output_and_logs(query, key, value), case.dy)
    dim = max(64, kernels.triton.next_power_of_2(query.shape[-1]))
    shipped = kernels.backward(*given, plan=plan)
    for kernel, choices in zip(plan._fields, TILES[dim], strict=True):
        runs: dict[str, Callable[[], Any]] = {}
        for choice in choices:
            tile = kernels.Tile(*map(int, choice.split()))
            run = functools.partial(kernels.backward, *given, plan=plan._replace(**{kernel: tile}))
            # other sums, rounded alike
            for found, expected in zip(run(), shipped, strict=True):
                torch.testing.assert_close(
                    found, expected, rtol=2**-5, atol=2**-6 * float(expected.abs().max())
                )
            runs[choice] = prepare(run)
        times = interleaved(runs, device=device, rounds=rounds, seconds=0.05)
        measured = {label: median_us(samples) for label, samples in times.items()}
        mine = measured.pop(" ".join(map(str, getattr(plan, kernel))))
        best = min(measured, key=lambda label: measured[label])
        yield Row(
            case=f"{name}, tiles {kernel} (best other {best})",
            metric="backward alone",
            unit="us",
            ours=mine,
            rivals=measured,
            ratios={"best other": measured[best] / mine},
        )
