"""O-BELM as diffusers schedulers; the mathematics is in `inpo_fast.solvers.obelm`.

Pipelines store the path of this module, so it and its class names stay.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

# diffusers loads a component of another library only if its module has this name
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401

from ..schedule import NoiseSchedule
from ..solvers import Program, obelm
from .scheduling_inverse import InverseScheduler
from .scheduling_reversible import ReversibleScheduler
from .scheduling_table import Betas, BetaSchedule, PredictionType, TimestepSpacing


class OBELMScheduler(ReversibleScheduler):
    """O-BELM (Wang et al., NeurIPS 2024), noise to data, one model call a step, order 2.

        pipe.scheduler = OBELMScheduler.from_config(pipe.scheduler.config)

    The first step of a run is a DDIM step. See `ReversibleScheduler` for runs and states, and
    `BDIAScheduler` for the arguments, of which this solver has no own.
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
    ) -> None:
        self._define()

    def _solver(self, schedule: NoiseSchedule) -> Program:
        return obelm(schedule, direction=self.direction)


class OBELMInverseScheduler(InverseScheduler, OBELMScheduler):
    """The inverse of `OBELMScheduler`, data to noise."""
