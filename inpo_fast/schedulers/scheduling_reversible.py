"""What the reversible schedulers share: diffusers' interface over a program of the solvers."""

from __future__ import annotations

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ..sampler import State
from ..schedule import NoiseSchedule
from ..solvers import Program
from .run import Plan, Run
from .scheduling_table import TableScheduler, integer

Pair = tuple[Tensor, Tensor]


class ReversibleScheduler(TableScheduler):
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

    def _define(self) -> None:
        super()._define()
        self._pending: State | None = None
        self._grid_changed()

    def _grid_changed(self) -> None:
        self._plans: dict[tuple[int | None, int], Plan] = {}
        self._forget()

    def _forget(self) -> None:
        """End the run and the choice of where the next one begins."""
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None

    def _solver(self, schedule: NoiseSchedule) -> Program:
        """The solver's program on a grid."""
        raise NotImplementedError

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

    def _locate(self, timestep: float | Tensor) -> tuple[int | None, int, Run | None]:
        """Position (None where unknown) and value of a step's timestep, and the run that it
        continues, None where it begins one."""
        times = self._times_now()
        index = self._element(timestep)
        value = integer(timestep) if index is None else times[index]
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


def _pair(state: State) -> Pair:
    first, second = state.tracks
    assert first is not None and second is not None
    return first, second
