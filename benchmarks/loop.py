# SPDX-License-Identifier: Apache-2.0
"""The compiled loop: a round trip of 50 + 50 steps of BDIA at guidance 7.5, exact to the bit.

The models have their real architectures with random weights, in bfloat16. Before anything is timed
the round trip must have returned the bits it began with. Rivals, in the same run:

* ``model alone``: as many calls of the same compiled and captured model, with nothing around them.
* ``diffusers``: DDIMInverseScheduler and DDIMScheduler with the eager model in float16.
* ``float64``: the precision of the official EDICT and BDIA code, two separate passes a step. It is
  timed on a few steps and scaled to the number of calls.

The same with fused layers and projections waits for no compiler, and has diffusers for a rival
only.

All times are of whole jobs, synchronised. Memory is the peak of each, weights included.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.common import Row, captured
from inpo_fast import NoiseSchedule, Program, Sampler, State, bdia
from inpo_fast.schedule import scaled_linear_alphas_cumprod

STEPS = 50
GUIDANCE = 7.5
TARGETS = {"model alone": 1 / 1.02, "diffusers": 3.5, "float64": 40.0}
CASES = (("sd15", 1), ("sd15", 8), ("sdxl", 1))


class Timed(NamedTuple):
    """Seconds of a job and its peak memory in GiB."""

    seconds: float
    memory: float


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield rows for each model and batch, or for those named like "sd15, batch 1" or, of what
    needs no compiler, "sd15, batch 1, fused layers"."""
    if device != "cuda":
        raise SystemExit("benchmarks: the loop is measured on a GPU: --device cuda")
    steps = 4 if quick else STEPS
    for name, batch in CASES:
        case = f"{name}, batch {batch}"
        if not only or f"{case}, fused layers" in only:
            yield from fused_rows(name, batch, steps)
            release()
        if not only or case in only:
            yield from case_rows(name, batch, steps)
            torch._dynamo.reset()
            release()


def fused_rows(name: str, batch: int, steps: int) -> Iterator[Row]:
    """Yield the rows of a model with fused layers and projections, which nothing compiles."""
    from inpo_fast import fuse_layers

    label = f"{name}, batch {batch}, {steps} + {steps} steps, fused layers and QKV, no compiler"
    model = models.denoiser(name, 2 * batch, "cuda", torch.bfloat16)
    z = models.latents(name, batch, "cuda")
    rival = timed(diffusers_round_trip(model, z, steps), 1)
    release()
    fuse_layers(model.unet)
    model.unet.fuse_qkv_projections()
    invert, sample, first = ready(label, model, z, steps, compile="graph")
    ours = timed(lambda: sample.run(invert.run(z)), 3 if name == "sdxl" else 5)
    yield row(f"{label}, against diffusers", ours, {"diffusers": rival})
    yield Row(
        case=f"{label}, first round trip with the loading of kernels",
        metric="wall clock",
        unit="s",
        ours=first,
        rivals={},
        ratios={},
    )


def case_rows(name: str, batch: int, steps: int) -> Iterator[Row]:
    """Yield the rows of one model and batch."""
    label = f"{name}, batch {batch}, {steps} + {steps} steps"
    model = models.denoiser(name, 2 * batch, "cuda", torch.bfloat16)
    z = models.latents(name, batch, "cuda")
    calls = sum(program.model_calls for program in programs(steps))
    invert, sample, first = ready(label, model, z, steps, compile=True)
    repeats = 3 if name == "sdxl" else 5
    ours = timed(lambda: sample.run(invert.run(z)), repeats)
    alone = timed(model_alone(invert, model, z, calls), repeats)
    yield row(f"{label}, {calls} model calls", ours, {"model alone": alone})
    flops = models.TERAFLOPS[name] * 2 * batch * calls
    yield Row(
        case=f"{label}, rate of the whole job",
        metric="model arithmetic over time",
        unit="TFLOP/s",
        ours=flops / ours.seconds,
        rivals={},
        ratios={},
    )
    del invert, sample
    release()

    rival = timed(diffusers_round_trip(model, z, steps), 1)
    yield row(f"{label}, against diffusers", ours, {"diffusers": rival})
    release()
    few = 2 if name == "sdxl" else 4
    yield row(f"{label}, against float64", ours, {"float64": float64(model, z, few, calls)})
    release()

    # What a user waits for before the first result: the whole model, or its repeated blocks only.
    torch._dynamo.reset()
    model.unet.compile_repeated_blocks(fullgraph=True)
    invert, sample, blocks = ready(f"{label}, blocks", model, z, steps, compile="graph")
    slower = timed(lambda: sample.run(invert.run(z)), repeats)
    yield row(f"{label}, repeated blocks only", slower, {"whole model": ours}, judged=False)
    yield Row(
        case=f"{label}, first round trip with compilation",
        metric="wall clock",
        unit="s",
        ours=blocks,
        rivals={"whole model": first},
        ratios={"whole model": first / blocks},
    )


def programs(steps: int) -> tuple[Program, Program]:
    """BDIA from data to noise and back on Stable Diffusion's table."""
    schedule = NoiseSchedule.from_alphas_cumprod(
        scaled_linear_alphas_cumprod(), steps, steps_offset=1
    )
    there = bdia(schedule, direction="invert")
    return there, there.inverse()


def bound(model: Any, program: Program, **options: Any) -> Sampler:
    """A sampler of this benchmark's settings."""
    options = {"model_dtype": torch.bfloat16, "guidance_scale": GUIDANCE, **options}
    return Sampler(model, program, **options)


def ready(
    label: str, model: Any, z: Tensor, steps: int, **options: Any
) -> tuple[Sampler, Sampler, float]:
    """Samplers there and back that have brought back the bits, and the seconds until they had."""
    began = time.perf_counter()
    invert, sample = (bound(model, program, **options) for program in programs(steps))
    exact = sample.run(invert.run(z)).equal(invert.start(z))
    seconds = time.perf_counter() - began
    if not exact:
        raise AssertionError(f"{label}: the bits did not return")
    return invert, sample, seconds


def model_alone(sampler: Sampler, model: Any, z: Tensor, calls: int) -> Callable[[], None]:
    """The sampler's compiled model, captured by itself and replayed."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    sample = torch.cat([z, z]).bfloat16()
    timestep = torch.full((1,), 501, device=z.device).expand(len(sample))
    with torch.no_grad():
        replay = captured(lambda: compiled(sample, timestep))

    def run() -> None:
        for _ in range(calls):
            replay()

    return run


@torch.no_grad()
def diffusers_round_trip(model: models.Denoiser, z: Tensor, steps: int) -> Callable[[], Tensor]:
    """DDIM inversion and DDIM as a diffusers user runs them: eager, float16, guidance batched."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
    schedulers = (DDIMInverseScheduler(**options), DDIMScheduler(**options))
    half = model.to(torch.float16, copy.deepcopy(model.unet).to(torch.float16))

    @torch.no_grad()
    def run() -> Tensor:
        latents = z.half()
        for scheduler in schedulers:
            scheduler.set_timesteps(steps, device=z.device)
            for t in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
                unconditional, conditional = half(both, t).chunk(2)
                guided = unconditional + GUIDANCE * (conditional - unconditional)
                latents = scheduler.step(guided, t, latents).prev_sample
        return latents

    return run


def float64(model: models.Denoiser, z: Tensor, steps: int, calls: int) -> Timed:
    """Time the round trip in float64, two passes a step, scaled to `calls` model calls."""
    wide = model.to(torch.float64, copy.deepcopy(model.unet).to(torch.float64))
    half = len(wide.text) // 2
    passes = (wide.rows(slice(0, half)), wide.rows(slice(half, None)))

    def separate(sample: Tensor, timestep: Tensor) -> Tensor:
        parts = zip(passes, sample.chunk(2), timestep.chunk(2), strict=True)
        return torch.cat([one(part, t) for one, part, t in parts])

    there, back = programs(steps)
    options = {"state": "float64", "model_dtype": torch.float64}
    invert, sample = (bound(separate, program, **options) for program in (there, back))
    ends: list[State] = []
    once = timed(lambda: ends.append(sample.run(invert.run(z))), 1, warm=False)
    error = (ends[0].sample() - z).abs().max().item()
    if error == 0:
        raise AssertionError("float64 returned the bits: the claim against it would be wrong")
    print(f"     float64 returns within {error:.1e} over {steps} + {steps} steps", flush=True)
    return Timed(once.seconds * calls / (there.model_calls + back.model_calls), once.memory)


def timed(job: Callable[[], object], repeats: int, *, warm: bool = True) -> Timed:
    """Median wall-clock time of a job, after one that is not counted, and its peak memory."""
    if warm:
        job()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        job()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Timed(statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30)


def row(case: str, ours: Timed, rivals: dict[str, Timed], *, judged: bool = True) -> Row:
    """A row of whole jobs, with the memory of each in its name."""
    memory = ", ".join(f"{name} {t.memory:.1f}" for name, t in {"ours": ours, **rivals}.items())
    return Row(
        case=f"{case} (GiB: {memory})",
        metric="wall clock of the whole job",
        unit="s",
        ours=ours.seconds,
        rivals={name: t.seconds for name, t in rivals.items()},
        ratios={name: t.seconds / ours.seconds for name, t in rivals.items()},
        target={name: TARGETS[name] for name in rivals} if judged else {},
    )


def release() -> None:
    """Give memory back, so that the peak of what comes next is its own."""
    gc.collect()
    torch.cuda.empty_cache()
