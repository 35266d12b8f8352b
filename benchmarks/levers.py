# SPDX-License-Identifier: Apache-2.0
"""What could make the model call itself faster, tried one by one on the compiled model at batch 2.

Each lever is the call that a Sampler captures with one thing changed. A lever is of use only if the
bits stay: the call must repeat itself, and a second compilation from nothing must give the same.
The fused layers of training are tried without a compiler: what it would do to them, they have done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models
from benchmarks.common import Row, captured, interleaved, median_us
from inpo_fast.determinism import reproducible

Change = Callable[[nn.Module], Any]


def nothing(unet: nn.Module) -> None:
    """As the sampler does it."""


def fused(unet: nn.Module) -> None:
    """Norms and gates as Triton kernels."""
    from inpo_fast.training.layers import fuse

    fuse(unet)


def config(**values: object) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Compile with other settings of Inductor."""
    return lambda: inductor.patch(**values)


def attention(backend: SDPBackend) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Force one kernel of scaled dot product attention."""
    return lambda: sdpa_kernel([backend])


class Lever(NamedTuple):
    """A change of the model, and settings while it is compiled, if it is, and captured."""

    change: Change
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    compiled: bool = True


LEVERS = {
    "fused layers, captured only": Lever(fused, compiled=False),
    "cuDNN attention": Lever(nothing, attention(SDPBackend.CUDNN_ATTENTION)),
    "flash attention": Lever(nothing, attention(SDPBackend.FLASH_ATTENTION)),
    "fused QKV": Lever(lambda unet: unet.fuse_qkv_projections()),
    "contiguous memory": Lever(lambda unet: unet.to(memory_format=torch.contiguous_format)),
    "freezing": Lever(nothing, config(freezing=True)),
    "benchmarking allowed": Lever(nothing, config(deterministic=False)),
    "1x1 convolutions as products": Lever(nothing, config(conv_1x1_as_mm=True)),
    "coordinate descent": Lever(
        nothing,
        config(deterministic=False, coordinate_descent_tuning=True),
    ),
    "max-autotune products": Lever(
        nothing,
        config(
            deterministic=False, max_autotune_gemm=True, max_autotune_gemm_backends="ATEN,TRITON"
        ),
    ),
}


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each model and lever."""
    if device != "cuda":
        raise SystemExit("benchmarks: levers are tried on a GPU: --device cuda")
    for name in ("sd15", "sdxl"):
        if only and name not in only:
            continue
        shipped = prepare(name, Lever(nothing))
        for label, lever in LEVERS.items():
            try:
                replay, same, seconds = prepare(name, lever)
            except Exception as error:
                print(f"     {name}, {label}: {' '.join(str(error).split())[:150]}", flush=True)
                continue
            contenders = {"shipped": shipped[0], "ours": replay}
            times = interleaved(contenders, device=device, rounds=3 if quick else 9, seconds=0.1)
            note = f"bits stay: {same}, made twice in {seconds:.0f} s"
            yield Row(
                case=f"{name}, batch 2, {label} ({note})",
                metric="GPU time of a model call",
                unit="us",
                ours=median_us(times["ours"]),
                rivals={"as shipped": median_us(times["shipped"])},
                ratios={"as shipped": median_us(times["shipped"]) / median_us(times["ours"])},
            )


@torch.no_grad()
def prepare(name: str, lever: Lever) -> tuple[Callable[[], object], bool, float]:
    """Make it twice from nothing; return a captured call, whether its bits stay, and seconds."""
    model = models.denoiser(name, 2, "cuda", torch.bfloat16)
    lever.change(model.unet)
    sample = models.latents(name, 2, "cuda").bfloat16()
    timestep = torch.full((1,), 501, device="cuda").expand(2)
    outputs: list[Tensor] = []
    began = time.perf_counter()
    with reproducible(), lever.settings():
        for _ in range(2):
            torch._dynamo.reset()
            call = torch.compile(model, fullgraph=True, dynamic=False) if lever.compiled else model
            outputs += [call(sample, timestep).clone() for _ in range(2)]
        seconds = time.perf_counter() - began
        replay = captured(lambda: call(sample, timestep))
    return replay, all(torch.equal(outputs[0], other) for other in outputs[1:]), seconds
