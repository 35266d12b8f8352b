"""Inversions that call the model themselves: one training sample at the end, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from .. import ops
from ..sampler import Model
from ..schedule import NoiseSchedule
from .latents import NoisyLatents, Timesteps, checked_timesteps
from .official import official_inversion_path
from .timesteps import even_grid
from .trajectory import (
    Generators,
    Trajectory,
    bdia_inversion_path,
    ddim_inversion_path,
    noising,
    renoise_inversion_path,
)


class Source(Protocol):
    """What the entries of `SOURCES` have in common; some have options of their own."""

    def __call__(
        self,
        clean: Tensor,
        grid: Timesteps,
        schedule: NoiseSchedule,
        *,
        train_at: Sequence[int] | None = None,
        generator: Generators = None,
        impl: ops.Impl = "auto",
    ) -> Trajectory: ...


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "q_sample": noising,
        "ddim": ddim_inversion_path,
        "bdia": bdia_inversion_path,
        "renoise": renoise_inversion_path,
        "official": official_inversion_path,
    }
)
"""Where training samples come from, by name; "official" is the published script with its faults."""


def ddim_inversion(
    model: Model,
    clean: Tensor,
    timesteps: Timesteps,
    schedule: NoiseSchedule,
    *,
    num_steps: int,
    eta: float = 0.0,
    generator: Generators = None,
    impl: ops.Impl = "auto",
) -> NoisyLatents:
    """x_t by DDIM inversion of x_0 with the current policy (InPO, Lu et al. 2025).

    Every sample is inverted on its own grid of `num_steps` equal steps from clean data to exactly
    its own t; then τ is what takes x_t back to x_0 in one step.

    Args:
        model: the policy, called on [B, …] float32 samples with [B] timesteps; conditional, no
            guidance.
        clean: [B, …] x_0.
        timesteps: [B] t of each sample, at least `num_steps` − 1.
        schedule: a training schedule.
        num_steps: n, the same for the batch, so that it keeps one shape; see `inversion_depth`.
        eta, generator, impl: see `ddim_inversion_path`.

    Raises:
        ValueError: naming the argument; a grid that would take two steps within one timestep.
    """
    grid = even_grid(checked_timesteps(timesteps, clean, schedule), num_steps)
    path = ddim_inversion_path(clean, grid, schedule, eta=eta, generator=generator, impl=impl)
    return path.run(model)[-1]
