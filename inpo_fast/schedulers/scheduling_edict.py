"""EDICT as diffusers schedulers; the mathematics is in `inpo_fast.solvers.edict`.

Pipelines store the path of this module, so it and its class names stay.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

import torch
from diffusers.configuration_utils import register_to_config

# diffusers loads a component of another library only if its module has this name
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from torch import Tensor

from ..schedule import NoiseSchedule
from ..solvers import Program, edict
from .run import Plan
from .scheduling_inverse import InverseScheduler
from .scheduling_reversible import ReversibleScheduler
from .scheduling_table import Betas, BetaSchedule, PredictionType, TimestepSpacing


class EDICTScheduler(ReversibleScheduler):
    """EDICT(p) (Wallace, Gokul and Naik, CVPR 2023), noise to data, two model calls a step.

        pipe.scheduler = EDICTScheduler.from_config(pipe.scheduler.config, mixing_coeff=0.93)

    As in diffusers' second-order schedulers every timestep stands in `timesteps` twice and `order`
    is 2. The model looks at one track to move the other: `prev_sample` of the first call of a pair
    is the track that has just moved, one noise level further, and that of the second is, after both
    mixing layers, the track that the next pair looks at first (the tracks take turns). The last one
    is the first track, the result. See `ReversibleScheduler` for runs and states.

    A run may begin at the second call of a pair, as SDXL's `denoising_start` does with schedulers
    of order 2. There the latents are one level further already: that step returns them unchanged.

    Args:
        mixing_coeff: p in (1/2, 1]; its inversion grows as p^−2N, at 1 the tracks drift apart.

    The other arguments are those of `BDIAScheduler`.
    """

    order = 2

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: Betas = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        rescale_betas_zero_snr: bool = False,
        mixing_coeff: float = 0.93,
    ) -> None:
        if not isinstance(mixing_coeff, Real):
            raise TypeError(f"mixing_coeff must be a number, got {mixing_coeff!r}")
        if not 0.5 < mixing_coeff <= 1:
            raise ValueError(f"mixing_coeff must be in (1/2, 1], got {mixing_coeff}")
        if isinstance(mixing_coeff, Fraction):
            # as JSON has it; the solver takes the nearest rational, which is the fraction again
            self.register_to_config(mixing_coeff=float(mixing_coeff))
        self._define()

    def _solver(self, schedule: NoiseSchedule) -> Program:
        return edict(schedule, p=self.config.mixing_coeff, direction=self.direction)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`DDIMScheduler.add_noise`, but at the level of the latents between the calls of a pair.

        An inpainting pipeline blends known latents, noised to the level of the next timestep in the
        list, into what a step returned. After the first call of a pair that timestep is the old
        one, and the latents are at the level after it. As in diffusers' other schedulers of order 2
        this needs the begin index that pipelines set.
        """
        run = self._run
        between = run is not None and not run.finished and run.done % 2 == 1
        if between and self._begin_index is not None:
            assert run is not None
            reached = [t for t in self._grid if t < run.plan.times[run.done]]
            if not reached and self._final == 1:
                return original_samples
            timesteps = torch.full_like(timesteps, reached[-1] if reached else 0)
        noisy: Tensor = super().add_noise(original_samples, noise, timesteps)
        return noisy


class EDICTInverseScheduler(InverseScheduler, EDICTScheduler):
    """The inverse of `EDICTScheduler`, data to noise.

    Its two calls of a pair have the timestep of the level that they go to, as those of the way
    down have that of the level that they leave.
    """

    # known latents are blended in on the way down only
    add_noise = ReversibleScheduler.add_noise

    def _call_times(self, grid: list[int]) -> list[int]:
        return [t for t in grid for _ in range(self.order)]

    def _make_plan(self, index: int | None, timestep: int) -> Plan:
        ahead = [timestep, *(t for t in self._grid if t > timestep)]
        behind = [t for t in self._grid if t < timestep][-1:]
        schedule = self._schedule([*behind, *ahead], clean=not behind)
        return Plan(schedule, self._solver(schedule))
