"""BDIA-DDIM as diffusers schedulers; the mathematics is in `inpo_fast.solvers.bdia`.

Pipelines store the path of this module, so it and its class names stay.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

from diffusers.configuration_utils import register_to_config

# diffusers loads a component of another library only if its module has this name
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from ..schedule import NoiseSchedule
from ..solvers import Program, bdia
from .scheduling_inverse import InverseScheduler
from .scheduling_reversible import ReversibleScheduler
from .scheduling_table import Betas, BetaSchedule, PredictionType, TimestepSpacing


class BDIAScheduler(ReversibleScheduler):
    """BDIA-DDIM(γ) (Zhang, Lewis and Kleijn, ECCV 2024), noise to data, one model call a step.

        pipe.scheduler = BDIAScheduler.from_config(pipe.scheduler.config, gamma=1.0)

    The first step of a run is a DDIM step; every other one also uses the latents before the last:
    z_(i−1) = γ z_(i+1) + b z_i + c m_i. See `ReversibleScheduler` for runs and states.

    Args:
        gamma: γ in (0, 1], the weight of the backward approximation; rounded to the nearest
            rational with terms up to 2^16. Near 0 it is DDIM, and its inversion grows as γ^−N.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, set_alpha_to_one,
        steps_offset, prediction_type, timestep_spacing, rescale_betas_zero_snr: those of
            `DDIMScheduler`, except that the offset is reduced where the grid would leave the table.
        clip_sample: clamp x̂ to ±clip_sample_range, for pixels. Latents have no such range, so it is
            off unless a config turns it on. Such a run cannot be inverted.
        thresholding: must be False, it has no inverse.

    Raises:
        ValueError, TypeError: naming the argument.
    """

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
        gamma: float = 1.0,
    ) -> None:
        if not isinstance(gamma, Real):
            raise TypeError(f"gamma must be a number, got {gamma!r}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        if isinstance(gamma, Fraction):
            # as JSON has it; the solver takes the nearest rational, which is the fraction again
            self.register_to_config(gamma=float(gamma))
        self._define()

    def _solver(self, schedule: NoiseSchedule) -> Program:
        return bdia(schedule, gamma=self.config.gamma, direction=self.direction)


class BDIAInverseScheduler(InverseScheduler, BDIAScheduler):
    """The inverse of `BDIAScheduler`, data to noise."""
