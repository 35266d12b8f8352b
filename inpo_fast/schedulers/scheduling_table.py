"""What the schedulers have of `DDIMScheduler`: its config, its table and its grids of timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from numpy.typing import NDArray
from torch import Tensor

from ..naming import naming
from ..schedule import NoiseSchedule, spaced_timesteps
from ..solvers import Direction

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Betas: TypeAlias = "NDArray[Any] | Sequence[float] | None"


class TableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Base of the schedulers, as far as no solver is concerned: noise levels and timesteps."""

    _compatibles: ClassVar = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    direction: ClassVar[Direction] = "sample"

    # tables on the names that diffusers gives them, so these work as they are
    add_noise = DDIMScheduler.add_noise
    get_velocity = DDIMScheduler.get_velocity

    def _define(self) -> None:
        """Check the config and make the tables; the end of every `__init__`."""
        config = self.config
        name = type(self).__name__
        for option in ("clip_sample", "thresholding"):
            sampling = option == "clip_sample" and self.direction == "sample"
            if getattr(config, option) and not sampling:
                raise ValueError(
                    f"{option} must be False: with it a step is not affine and has no inverse; use "
                    f"{name}.from_config(config, {option}=False)"
                )
        if not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {config.clip_sample_range}")
        self._limit = float(config.clip_sample_range) if config.clip_sample else None
        for option, choices in (
            ("prediction_type", get_args(PredictionType)),
            ("timestep_spacing", get_args(TimestepSpacing)),
        ):
            if getattr(config, option) not in choices:
                raise ValueError(
                    f"{option} must be one of {choices}, got {getattr(config, option)!r}"
                )
        if config.trained_betas is None and config.beta_schedule not in get_args(BetaSchedule):
            raise ValueError(
                f"beta_schedule must be one of {get_args(BetaSchedule)}, got "
                f"{config.beta_schedule!r}; other tables go into trained_betas"
            )
        reference = DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            trained_betas=config.trained_betas,
            set_alpha_to_one=config.set_alpha_to_one,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        )
        self.betas = reference.betas
        self.alphas = reference.alphas
        self.alphas_cumprod = reference.alphas_cumprod
        self.final_alpha_cumprod = reference.final_alpha_cumprod
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        every = torch.arange(config.num_train_timesteps)
        self._timesteps_of(every.flip(0) if self.direction == "sample" else every)

    def _timesteps_of(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps
        # `timesteps` is public: elements are recognised only while it is this tensor
        self._listed = timesteps

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make a scheduler from the config of another one, `pipe.scheduler.config`.

        Raises:
            ValueError: the config of a scheduler that is not variance preserving (flow matching,
                EDM), with `thresholding`, or for an inverse with `clip_sample`.
        """
        if isinstance(config, dict):
            foreign = {"shift", "sigma_data", "use_dynamic_shifting"} & config.keys()
            known = {"beta_start", "beta_end", "beta_schedule", "trained_betas"} & config.keys()
            if (foreign and not known) or config.get("use_flow_sigmas"):
                raise ValueError(
                    f"config must be that of a variance-preserving scheduler with betas, got one "
                    f"of {config.get('_class_name', 'a scheduler')} with "
                    f"{', '.join(sorted(foreign)) or 'use_flow_sigmas'}; for flow matching and EDM "
                    "use inpo_fast.Sampler with a NoiseSchedule"
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # --- The grid ------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the grid and end the run in progress.

        Args:
            num_inference_steps: N; give this or `timesteps`.
            device: where `self.timesteps` goes.
            timesteps: the grid's noise levels as falling timesteps, noisiest first. One list serves
                both directions: the inverse scheduler takes the same one.

        Raises:
            ValueError: neither or both given, more steps than the table has, timesteps that do not
                fall or leave the table.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give exactly one of num_inference_steps and timesteps")
        length = len(self.alphas_cumprod)
        if length != self.config.num_train_timesteps:
            raise ValueError(
                f"trained_betas must have num_train_timesteps = {self.config.num_train_timesteps} "
                f"values, got {length}"
            )
        if num_inference_steps is not None:
            spacing, offset = self.config.timestep_spacing, self.config.steps_offset
            with naming({"num_steps": "num_inference_steps"}):
                grid = spaced_timesteps(length, num_inference_steps, spacing, offset).tolist()
        else:
            assert timesteps is not None
            grid = _falling(timesteps, length)[::-1]
        self._table = self.alphas_cumprod.double().cpu().numpy()
        self._final = float(self.final_alpha_cumprod)
        self._grid: list[int] = grid
        self.num_inference_steps = len(grid)
        self._times = self._call_times(grid)
        self._timesteps_of(torch.tensor(self._times, dtype=torch.long, device=device))
        self._grid_changed()

    def _call_times(self, grid: list[int]) -> list[int]:
        """The timestep of every model call on the rising `grid` of nodes 1 … N."""
        return [t for t in reversed(grid) for _ in range(self.order)]

    def _schedule(self, times: Sequence[int], clean: bool) -> NoiseSchedule:
        """The grid of rising `times`, below which node 0 is added where `clean`."""
        bar = np.array([*([self._final] if clean else []), *self._table[list(times)]])
        with np.errstate(invalid="ignore"):
            alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
        return NoiseSchedule(
            timesteps=np.array([*([0] if clean else []), *times], dtype=np.float64),
            alpha=alpha,
            sigma=sigma,
            kind="vp",
            prediction_type=self.config.prediction_type,
        )

    def _grid_changed(self) -> None:
        """Forget what was made for another grid."""

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Position of a timestep in `timesteps`, the first one where it is repeated.

        Raises:
            ValueError: it is not there.
        """
        times = self._times_now() if schedule_timesteps is None else schedule_timesteps.tolist()
        value = integer(timestep)
        if value not in times:
            raise ValueError(f"timestep must be one of the timesteps {times}, got {value}")
        return times.index(value)

    def _times_now(self) -> list[int]:
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called first: num_inference_steps is None")
        return self._times

    def _element(self, timestep: float | Tensor) -> int | None:
        """The position of a timestep that is an element of `timesteps`, from its place in memory:
        its value may be on a device."""
        listed = self.timesteps
        if not isinstance(timestep, Tensor) or listed is not self._listed or timestep.numel() != 1:
            return None
        alike = (timestep.device, timestep.dtype) == (listed.device, listed.dtype)
        if not alike or _address(timestep) != _address(listed):
            return None
        index = int(timestep.storage_offset()) - int(listed.storage_offset())
        return index if 0 <= index < len(listed) else None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def integer(timestep: float | Tensor) -> int:
    """The value of a timestep; waits for its device."""
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            raise ValueError(
                f"timestep must be one number for the batch, got shape {list(timestep.shape)}"
            )
        timestep = timestep.item()
    value = int(timestep)
    if value != timestep:
        raise ValueError(f"timestep must be an integer of the table, got {timestep}")
    return value


def _falling(timesteps: Sequence[int] | Tensor, length: int) -> list[int]:
    values = timesteps.tolist() if isinstance(timesteps, (Tensor, np.ndarray)) else list(timesteps)
    whole = [integer(t) for t in values]
    falls = all(a > b for a, b in pairwise(whole))
    if not whole or not falls or whole[0] >= length or whole[-1] < 0:
        raise ValueError(f"timesteps must fall strictly within 0 … {length - 1}, got {timesteps!r}")
    return whole
