# SPDX-License-Identifier: Apache-2.0
"""Every solver there and back with models of the real architectures, compiled, in bfloat16.

For each: model calls of both directions, whether the bits return on the lattice, the largest error
of the same trip with float32 tracks, the deviation of the noise, and the time of the whole trip.
The weights are random: the noise says what a solver does to it, not how good an edit would be.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.common import Row
from inpo_fast import (
    AmplificationWarning,
    NoiseSchedule,
    Program,
    Sampler,
    bdia,
    ddim,
    edict,
    mccallum_foster,
    obelm,
)
from inpo_fast.ops import StateError
from inpo_fast.schedule import scaled_linear_alphas_cumprod

GUIDANCE = 3.0
STEPS = {"sd15": 50, "sdxl": 20}
SOLVERS: dict[str, Callable[..., Program]] = {
    "ddim": ddim,
    "bdia 1": bdia,
    "bdia 15/16": partial(bdia, gamma=15 / 16),
    "edict 0.93": edict,
    "obelm": obelm,
    "mccallum-foster": mccallum_foster,
    "bdia 1, heun": partial(bdia, integrator="heun"),
}


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of each model and solver."""
    if device != "cuda":
        raise SystemExit("benchmarks: these models need a GPU: --device cuda")
    warnings.simplefilter("ignore", AmplificationWarning)
    for name in STEPS:
        if only and name not in only:
            continue
        model = models.denoiser(name, 2, device, torch.bfloat16)
        steps = 4 if quick else STEPS[name]
        table = scaled_linear_alphas_cumprod()
        schedule = NoiseSchedule.from_alphas_cumprod(table, steps, steps_offset=1)
        for solver, make in SOLVERS.items():
            there = make(schedule, direction="invert")
            back = there.inverse() if there.reversible else make(schedule)
            case = f"{name}, {solver}, {steps} + {steps} steps, guidance {GUIDANCE:g}"
            for metric, unit, value in trip(model, models.latents(name, 1, device), there, back):
                yield Row(case=case, metric=metric, unit=unit, ours=value, rivals={}, ratios={})
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def trip(
    model: Any, z: torch.Tensor, there: Program, back: Program
) -> Iterator[tuple[str, str, float]]:
    """Yield (metric, unit, value) of one solver."""
    yield "model calls", "", there.model_calls + back.model_calls
    yield "amplification of the inversion", "", there.amplification
    options = {"model_dtype": torch.bfloat16, "guidance_scale": GUIDANCE, "compile": True}
    try:
        invert, sample = (Sampler(model, program, **options) for program in (there, back))
        if there.reversible:
            equal = sample.run(invert.run(z)).equal(invert.start(z))
            yield "bits equal", "", float(equal)
        else:
            sample.run(invert.run(z).sample())
        torch.cuda.synchronize()
        began = time.perf_counter()
        noise = invert.run(z)
        sample.run(noise if there.reversible else noise.sample())
        torch.cuda.synchronize()
        yield "time of the round trip", "s", time.perf_counter() - began
        yield "standard deviation of the noise", "", noise.sample().std().item()
    except StateError as error:
        print(f"     {there.name}: {error}", flush=True)
        return
    wide = {**options, "state": "float32"}
    invert, sample = (Sampler(model, program, **wide) for program in (there, back))
    noise = invert.run(z)
    end = sample.run(noise if there.reversible else noise.sample()).sample()
    yield "largest error with float32 tracks", "", (end - z).abs().max().item()
