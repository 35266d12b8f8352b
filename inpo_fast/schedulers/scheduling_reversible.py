"""What the reversible schedulers share: diffusers' interface over a program of the solvers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from numpy.typing import NDArray
from torch import Tensor

from ..naming import naming
from ..sampler import State
from ..schedule import NoiseSchedule, spaced_timesteps
from ..solvers import Direction, Program
from .run import Plan, Run

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Pair = tuple[Tensor, Tensor]
Betas: TypeAlias = "NDArray[Any] | Sequence[float] | None"


class ReversibleScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Base of the schedulers: `DDIMScheduler`'s interface and config over a reversible program.

    A *run* is one pass over `timesteps`. The latents of its second track live in the scheduler, and
    only for the run:

    * A step whose timestep is the one that follows continues the run. Any other begins a new one,
      which knows nothing of the run before: its first step is a DDIM step (EDICT: both tracks start
      as the same sample). So do the first step after `set_timesteps` and `set_begin_index`. A run
      may begin anywhere, also at a timestep between those of the list: it then runs on the grid of
      that timestep and those that follow.
    * The `sample` of a step is the state of the run, whatever was done to it since the last step
      (a pipeline that blends known latents into it, a callback). What a two-step solver remembers
      of the step before is that step's `sample`.
    * The tracks are float32 for 16-bit samples, and elements that come back as they were returned
      keep that precision (`schedulers.run.Run`).

    A run that ends leaves `state`, both tracks. Handed to the scheduler of the other direction with
    `set_state` it makes the way back exact in exact arithmetic. Without it the other direction
    starts from one latent alone, which is inexact by the error of one DDIM step.

    With `clip_sample` a step clamps x̂ to ±`clip_sample_range` and keeps ε̂, as `DDIMScheduler` does
    with `use_clipped_model_output=False`. With Δ = clamp(x̂) − x̂ its update is evaluated at

        z + α Δ = α clamp(x̂) + σ ε̂  and  m + k Δ,    k = 0 (epsilon), −σ (v_prediction), 1 (sample),

    whose clean estimate is clamp(x̂) and whose noise is the ε̂ of (z, m), so that a DDIM step from
    there is α' clamp(x̂) + σ' ε̂. This z is also what a two-step solver remembers. EDICT clamps the
    x̂ = (x − σ ε̂)/α of the track x that moves, with the ε̂ of the other track, where z is x and the
    ε̂ stays by itself. The result of a two-step solver may leave the range, and where most steps
    clamp, at strong guidance, it depends on N even more than that of DDIM. Many x̂ are clamped to
    one, so such a run has no inverse: it takes and leaves no state, and the inverse schedulers
    refuse `clip_sample`.

    No step waits for the device as long as its timestep is an element of `timesteps` (as in `for t
    in scheduler.timesteps`), a Python number or on the CPU.
    """

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
        self._pending: State | None = None
        self._forget()

    def _forget(self) -> None:
        """End the run and the choice of where the next one begins."""
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None

    def _timesteps_of(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps
        # `timesteps` is public: elements are recognised only while it is this tensor
        self._listed = timesteps

    def _solver(self, schedule: NoiseSchedule) -> Program:
        """The solver's program on a grid."""
        raise NotImplementedError

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
        self._plans: dict[tuple[int | None, int], Plan] = {}
        self.num_inference_steps = len(grid)
        self._times = self._call_times(grid)
        self._timesteps_of(torch.tensor(self._times, dtype=torch.long, device=device))
        self._forget()

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

    def _plan(self, index: int | None, timestep: int) -> Plan:
        """The plan of a run that begins at `index` of the list, or between its timesteps."""
        key = (index, timestep)
        if key not in self._plans:
            self._plans[key] = self._make_plan(index, timestep)
        return self._plans[key]

    def _make_plan(self, index: int | None, timestep: int) -> Plan:
        if index is None:
            remaining = [*(t for t in self._grid if t < timestep), timestep]
        else:
            remaining = self._grid[: len(self._grid) - index // self.order]
        schedule = self._schedule(remaining, clean=True)
        return Plan(schedule, self._solver(schedule), self._limit)

    # --- The run -------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next step of the run, None before the first step and for a
        run that began between the timesteps until it reaches one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` was given."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say that the next step begins a run, as pipelines do before their loop.

        Where it begins is seen from the step's timestep.
        """
        self._forget()
        self._begin_index = begin_index

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Position of a timestep in `timesteps`, the first one where it is repeated.

        Raises:
            ValueError: it is not there.
        """
        times = self._times_now() if schedule_timesteps is None else schedule_timesteps.tolist()
        value = _integer(timestep)
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

    def _locate(self, timestep: float | Tensor) -> tuple[int | None, int, Run | None]:
        """Position (None where unknown) and value of a step's timestep, and the run that it
        continues, None where it begins one."""
        times = self._times_now()
        index = self._element(timestep)
        value = _integer(timestep) if index is None else times[index]
        run = self._run if self._run is not None and self._run.expects(index, value) else None
        if run is None and index is None and value in times:
            index = times.index(value)
        return index, value, run

    def _begin(self, index: int | None, timestep: int, sample: Tensor) -> Run:
        plan = self._plan(index, timestep)
        given = self._pending
        if given is not None:
            self._check_state(given, plan)
            self._check_sample(given, sample)
        # of the calls, those at a timestep that is not in the list come first
        unlisted = self.order if index is None else 0
        first = len(self._times) - (len(plan.times) - unlisted) if index is None else index
        indices = [*[None] * unlisted, *range(first, len(self._times))]
        return Run(plan, sample, given=None if given is None else _pair(given), indices=indices)

    def _check_begin(self, timestep: int, sample: Tensor) -> None:
        if not isinstance(sample, Tensor) or not sample.is_floating_point() or not sample.ndim:
            raise TypeError(
                "sample must be a floating tensor [B, …], got "
                f"{getattr(sample, 'dtype', type(sample).__name__)}"
            )
        if not 0 <= timestep < len(self._table):
            raise ValueError(f"timestep must be within 0 … {len(self._table) - 1}, got {timestep}")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | Pair:
        """One step of the run that `timestep` continues or begins.

        Args:
            model_output: [B, …] raw output of the model at `sample`, guidance applied.
            timestep: an element of `timesteps`, or any other timestep to begin a run there.
            sample: [B, …] what the model saw.
            eta: must be 0, there is no noise in a step that can be undone.
            use_clipped_model_output: must be False with `clip_sample`, else without effect.
            generator: not used.
            variance_noise: must be None.
            return_dict: return a `DDIMSchedulerOutput` instead of a tuple.

        Returns:
            `prev_sample` [B, …], what the model has to see next or the result, and
            `pred_original_sample` [B, …], x̂ from `model_output` at the noise level of `timestep`,
            clamped with `clip_sample`, as `DDIMScheduler` gives it; both in the dtype of `sample`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        if eta != 0:
            raise ValueError(f"eta must be 0: a step with noise has no inverse, got {eta}")
        if variance_noise is not None:
            raise ValueError("variance_noise must be None: a step with noise has no inverse")
        if use_clipped_model_output and self._limit is not None:
            raise ValueError("use_clipped_model_output must be False: clip_sample keeps the noise")
        index, value, run = self._locate(timestep)
        if run is None:
            self._check_begin(value, sample)
        if run is None and index is not None and index % self.order != 0:
            result = self._pass(index, value, model_output, sample)
        else:
            begun = self._begin(index, value, sample) if run is None else run
            result = begun.advance(model_output, sample)
            if run is None:
                # only now: a refused step uses nothing up
                self._pending = None
            self._run, self._step_index = begun, begun.index
        if not return_dict:
            return result
        return DDIMSchedulerOutput(prev_sample=result[0], pred_original_sample=result[1])

    def _pass(self, index: int, timestep: int, output: Tensor, sample: Tensor) -> Pair:
        """A run that begins at a later call of a timestep (order 2): there the sample already is at
        the level that this timestep's calls go to, so it stays as it is."""
        if self._pending is not None:
            raise ValueError(
                "timestep must be the first one of the list to begin from a state, got the second "
                f"{timestep} (set_state(None) takes the state back)"
            )
        clean = self._plan(index, timestep).clean(0, output, sample)
        self._run, self._step_index = None, index + 1
        return sample.clone(), clean

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the model is called on; the sample itself."""
        return sample

    # --- The state -----------------------------------------------------------------------------

    @property
    def state(self) -> State | None:
        """Both tracks of the run, None where there is none.

        It has the form of a `Sampler`'s state, so it can be saved, and a `Sampler` can go on from
        it. The tensors are the run's own.

        Raises:
            ValueError: a run with `clip_sample`.
        """
        if self._run is None:
            return None
        self._refuse_clipped()
        return self._run.state()

    def _refuse_clipped(self) -> None:
        if self._limit is not None:
            raise ValueError(
                "state is for runs that can be undone, and one with clip_sample has no inverse; "
                f"use {type(self).__name__}.from_config(config, clip_sample=False)"
            )

    def set_state(self, state: State | None) -> Tensor | None:
        """Begin the next run from both tracks of a run in the other direction.

        Ends the run in progress. The next one has to begin at the start of `timesteps`, on the grid
        of the run that left the state, and uses the state up; `set_timesteps` leaves it in place. A
        two-step solver takes its first result from the state, so it makes no use of the first model
        output.

        Args:
            state: the `state` that the scheduler of the other direction (or a `Sampler` on floating
                tracks) had when its run had ended; None takes a state back.

        Returns:
            [B, …] what the model has to see first, the `latents` of a pipeline, float32 (or float64
            like the state). Cast to the 16-bit dtype of a pipeline they still stand for the tracks
            in their precision. None for None.

        Raises:
            ValueError: the state of an unfinished run, or of another solver, grid, table or
                prediction type, or a scheduler with `clip_sample`.
        """
        if state is None:
            self._pending = None
            return None
        self._refuse_clipped()
        if not isinstance(state, State):
            raise TypeError(f"state must be an inpo_fast.State, got {type(state).__name__}")
        plan = self._plan(0, self._times_now()[0])
        self._check_state(state, plan)
        self._forget()
        self._pending = state
        pair = _pair(state)
        wide = pair[0].dtype == torch.float64
        sample = pair[0] if wide else pair[0].float()
        return Run(plan, sample, given=pair).shown(sample.dtype)

    def _check_state(self, state: State, plan: Plan) -> None:
        if state.frac_bits is not None:
            raise ValueError(
                "state must have floating tracks, got one on the lattice; run it with a Sampler"
            )
        if state.inverse is None:
            raise ValueError(
                "state must be that of a finished run, got one after "
                f"{state.position} updates; to go part of the way give the inverse scheduler the "
                "timesteps of that part"
            )
        if state.inverse != plan.rest.fingerprint:
            raise ValueError(
                "state must come from the other direction of this solver, on the same timesteps, "
                f"betas and prediction type; it is undone by the program {state.inverse[:12]}, the "
                f"run is {plan.rest.fingerprint[:12]}, {plan.rest.name} in "
                f"{plan.rest.model_calls} model calls (set_state(None) takes the state back)"
            )

    def _check_sample(self, state: State, sample: Tensor) -> None:
        shape = _pair(state)[0].shape
        if sample.shape != shape:
            raise ValueError(
                f"sample must have the shape {list(shape)} of the state that was set, got "
                f"{list(sample.shape)} (set_state(None) takes the state back)"
            )

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pair(state: State) -> Pair:
    first, second = state.tracks
    assert first is not None and second is not None
    return first, second


def _integer(timestep: float | Tensor) -> int:
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
    whole = [_integer(t) for t in values]
    falls = all(a > b for a, b in pairwise(whole))
    if not whole or not falls or whole[0] >= length or whole[-1] < 0:
        raise ValueError(f"timesteps must fall strictly within 0 … {length - 1}, got {timesteps!r}")
    return whole
