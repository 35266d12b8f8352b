"""Part 1: image latents to noise and back, with every solver in floating point and on the lattice.

DDIM goes to noise with its inversion program and back with its sampling program, which are not
inverses of each other. Every other solver goes back with the inverse of the program it came by.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..ops import LatticeRangeError, NonFiniteError
from ..sampler import Sampler, State, StateKind
from ..schedule import NoiseSchedule
from ..shipped import scenes
from .pipeline import Denoiser, Pipeline, cast
from .solvers import SOLVERS, RoundTrip, round_trip

STATES: tuple[StateKind, ...] = ("float32", "lattice")


class Setting(NamedTuple):
    """What rows vary besides solver and state."""

    steps: int = 50
    guidance: float = 3.0
    model_dtype: torch.dtype = torch.float32


FULL = (
    Setting(guidance=1.0),
    Setting(guidance=7.5),
    Setting(model_dtype=torch.bfloat16),
    Setting(model_dtype=torch.float16),
    Setting(steps=10),
    Setting(steps=20),
    Setting(steps=100),
)
"""What `--full` adds to the default setting."""


@dataclass(frozen=True)
class RoundTripRow:
    """One solver, state and setting over the whole batch of scenes.

    Attributes:
        model_calls: calls of the UNet in both directions together; with guidance one call sees the
            batch twice over.
        bits_equal: whether the latents that came back have the bits of those that left.
        max_abs_error: largest difference between them, None if they did not come back.
        noise_mean, noise_std: mean and standard deviation of all noise latents; N(0, 1) has 0, 1.
        amplification: how much the way to noise may magnify a perturbation.
        seconds: both directions.
        error: what stopped the run, or None.
    """

    solver: str
    state: str
    model_dtype: str
    guidance: float
    steps: int
    model_calls: int
    bits_equal: bool
    max_abs_error: float | None
    noise_mean: float | None
    noise_std: float | None
    amplification: float
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class RoundTripResult:
    """The rows, and what no inversion can be better than.

    Attributes:
        vae_floor: root mean squared pixel error of the autoencoder alone, images in [-1, 1].
    """

    rows: list[RoundTripRow]
    vae_floor: float


def run(
    pipeline: Pipeline, *, count: int, settings: Sequence[Setting], seed: int
) -> RoundTripResult:
    """Invert `count` held-out scenes and come back, once per solver, state and setting."""
    chosen = scenes.held_out_scenes(count, seed)
    images = scenes.render(chosen, generator=torch.Generator().manual_seed(seed))
    latents = pipeline.encode(images)
    error = pipeline.decode(latents) - images
    prompts = [scenes.prompt(scene) for scene in chosen]
    rows = []
    with tqdm(total=len(settings) * len(SOLVERS) * len(STATES), desc="1/3 round trip") as bar:
        for setting in settings:
            model = pipeline.denoiser(prompts, cast(pipeline.unet, setting.model_dtype))
            schedule = pipeline.schedule(setting.steps)
            for solver in SOLVERS:
                for state in STATES:
                    bar.set_postfix_str(f"{solver}, {state}")
                    rows.append(_row(solver, state, setting, model, schedule, latents))
                    bar.update()
    return RoundTripResult(rows, float(error.square().mean().sqrt()))


class _Journey(NamedTuple):
    start: State
    noise: State
    end: State


def _travel(
    ways: RoundTrip, state: StateKind, setting: Setting, model: Denoiser, latents: Tensor
) -> _Journey:
    there, back = (
        Sampler(
            model,
            program,
            guidance_scale=setting.guidance,
            state=state,
            model_dtype=setting.model_dtype,
        )
        for program in (ways.to_noise, ways.to_image)
    )
    start = there.start(latents)
    noise = there.run(start)
    return _Journey(start, noise, back.run(noise if ways.exact else noise.sample()))


def _row(
    solver: str,
    state: StateKind,
    setting: Setting,
    model: Denoiser,
    schedule: NoiseSchedule,
    latents: Tensor,
) -> RoundTripRow:
    ways = round_trip(solver, schedule)
    model.calls, began = 0, time.perf_counter()
    journey, error = None, None
    try:
        journey = _travel(ways, state, setting, model, latents)
    except (LatticeRangeError, NonFiniteError) as stopped:
        error = str(stopped)
    # the sampler has read its status from the device, so the work is done
    seconds = time.perf_counter() - began
    return RoundTripRow(
        solver=solver,
        state=state,
        model_dtype=str(setting.model_dtype).removeprefix("torch."),
        guidance=setting.guidance,
        steps=setting.steps,
        model_calls=model.calls,
        **_measure(journey, ways.exact),
        amplification=ways.to_noise.amplification,
        seconds=seconds,
        error=error,
    )


class _Measured(TypedDict):
    bits_equal: bool
    max_abs_error: float | None
    noise_mean: float | None
    noise_std: float | None


def _measure(journey: _Journey | None, exact: bool) -> _Measured:
    if journey is None:
        return _Measured(bits_equal=False, max_abs_error=None, noise_mean=None, noise_std=None)
    start, end, noise = journey.start.sample(), journey.end.sample(), journey.noise.sample()
    same = journey.start.equal(journey.end) if exact else torch.equal(start, end)
    return _Measured(
        bits_equal=same,
        max_abs_error=float((end - start).abs().max()),
        noise_mean=float(noise.mean()),
        noise_std=float(noise.std()),
    )
