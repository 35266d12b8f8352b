# SPDX-License-Identifier: Apache-2.0
"""The shipped model: how well edits by each solver succeed, and how good its samples are.

``edits``: 200 held-out scenes are inverted and decoded under the prompt of a scene in which one
attribute differs. The reader says from the pixels whether the attribute changed, and which of the
others stayed. ``sampling``: from the same noise, each solver at 10, 20 and 50 model calls against a
reference of 1,000 steps of DDIM: attributes right, and how far the latents end from the reference.
Intervals are of 95 %: Wilson's for the edits, and normal for means over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Row
from inpo_fast import (
    NoiseSchedule,
    Program,
    Sampler,
    bdia,
    ddim,
    dpmpp_2m,
    edict,
    mccallum_foster,
    obelm,
)
from inpo_fast.demo.edit import Edit, choose_edits, measure
from inpo_fast.demo.pipeline import Pipeline, load
from inpo_fast.evaluation.statistics import wilson
from inpo_fast.ops import StateError
from inpo_fast.shipped import model_path, reader, scenes
from inpo_fast.solvers.program import unwarned

EDITS, EDIT_STEPS, GUIDANCES = 200, 25, (1.0, 3.0, 5.0)
PROMPTS, CALLS, REFERENCE_STEPS, GUIDANCE = 64, (10, 20, 50), 1000, 3.0
CHUNK = 50

Make = Callable[..., Program]
EDITORS: dict[str, Make] = {
    "ddim": ddim,
    "bdia 0.9": partial(bdia, gamma=0.9),
    "bdia 0.94": partial(bdia, gamma=0.94),
    "bdia 1": bdia,
    "edict 0.93": edict,
    "obelm": obelm,
    "mccallum-foster": mccallum_foster,
}
SAMPLERS: dict[str, Make] = {
    "ddim": ddim,
    "bdia 0.5": partial(bdia, gamma=0.5),
    "bdia 0.9": partial(bdia, gamma=0.9),
    "bdia 1": bdia,
    "obelm": obelm,
    "edict 0.93": edict,
    "dpm-solver++(2M)": dpmpp_2m,
}


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of "edits" and of "sampling"."""
    pipeline = load(model_path(), device)
    if not only or "edits" in only:
        yield from edit_rows(pipeline, 8 if quick else EDITS)
    if not only or "sampling" in only:
        yield from sampling_rows(
            pipeline, 4 if quick else PROMPTS, 50 if quick else REFERENCE_STEPS
        )


def edit_rows(pipeline: Pipeline, count: int) -> Iterator[Row]:
    """Yield success and preservation of every solver and guidance."""
    edits = choose_edits(count, seed=0)
    sources = [edit.source for edit in edits]
    images = scenes.render(sources, generator=torch.Generator().manual_seed(0))
    latents = pipeline.encode(images)
    schedule = pipeline.schedule(EDIT_STEPS)
    batches = [edits[i : i + CHUNK] for i in range(0, count, CHUNK)]
    for guidance in GUIDANCES:
        for name, make in EDITORS.items():
            case = f"edits, {name}, guidance {guidance:g}, {count} edits of {EDIT_STEPS} steps"
            try:
                parts = zip(batches, latents.split(CHUNK), strict=True)
                end = torch.cat(
                    [edited(pipeline, part, z, make, schedule, guidance) for part, z in parts]
                )
            except StateError as error:
                print(f"     {case}: {error}", flush=True)
                continue
            success, kept = measure(edits, pipeline.decode(end))
            low, high = wilson(float(success.sum()), count)
            yield percent(case, "edits that succeeded", success, (low, high))
            yield percent(case, "other attributes kept", kept, spread(kept))


def edited(
    pipeline: Pipeline,
    edits: Sequence[Edit],
    latents: Tensor,
    make: Make,
    schedule: NoiseSchedule,
    guidance: float,
) -> Tensor:
    """Latents [B, 4, h, w] inverted under their own prompts and decoded under the edits'."""
    before = pipeline.denoiser([scenes.prompt(edit.source) for edit in edits])
    after = pipeline.denoiser([edit.prompt for edit in edits])
    with unwarned():
        there = make(schedule, direction="invert")
        back = there.inverse() if there.reversible else make(schedule)
        state = "lattice" if there.reversible else "float32"
        invert, sample = (
            Sampler(model, program, guidance_scale=guidance, state=state)
            for model, program in ((before, there), (after, back))
        )
    noise = invert.run(latents)
    return sample.run(noise if there.reversible else noise.sample()).sample()


def sampling_rows(pipeline: Pipeline, count: int, reference_steps: int) -> Iterator[Row]:
    """Yield quality and distance of every solver and number of model calls."""
    chosen = scenes.held_out_scenes(count, 1)
    model = pipeline.denoiser([scenes.prompt(scene) for scene in chosen])
    noise = pipeline.noise(count, 1)

    def draw(make: Make, calls: int) -> tuple[Tensor, int]:
        # EDICT calls the model twice a step.
        steps = calls // 2 if make is edict else calls
        with unwarned():
            program = make(pipeline.schedule(steps))
            sampler = Sampler(model, program, guidance_scale=GUIDANCE, state="float32")
        return sampler.run(noise).sample(), program.model_calls

    reference, _ = draw(ddim, reference_steps)
    right = reader.score(pipeline.decode(reference), chosen)
    case = f"sampling, reference: ddim, {reference_steps} steps, {count} prompts"
    yield percent(case, "attributes right", right, spread(right))
    for calls in CALLS:
        for name, make in SAMPLERS.items():
            case = f"sampling, {name}, {calls} model calls, guidance {GUIDANCE:g}"
            try:
                end, made = draw(make, calls)
            except (StateError, ValueError) as error:
                print(f"     {case}: {error}", flush=True)
                continue
            assert made == calls, (name, made)
            right = reader.score(pipeline.decode(end), chosen)
            yield percent(case, "attributes right", right, spread(right))
            distance = (end - reference).flatten(1).square().mean(1).sqrt()
            low, high = spread(distance)
            yield Row(
                case=f"{case}, 95 % interval {low:.4f} to {high:.4f}",
                metric="distance of the latents from the reference, root mean square",
                unit="",
                ours=float(distance.mean()),
                rivals={},
                ratios={},
            )


def spread(values: Tensor) -> tuple[float, float]:
    """The interval of the mean of independent values [B]."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return mean - half, mean + half


def percent(case: str, metric: str, values: Tensor, interval: tuple[float, float]) -> Row:
    """A row of a fraction."""
    low, high = (100 * end for end in interval)
    return Row(
        case=f"{case}, {metric}, 95 % interval {low:.1f} to {high:.1f}",
        metric=metric,
        unit="%",
        ours=100 * float(values.mean()),
        rivals={},
        ratios={},
    )
