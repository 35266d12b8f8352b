"""A program run from outside: the caller evaluates the model and hands in one output at a time.

A diffusers pipeline owns the loop: it shows the model a sample z, and a scheduler's `step` gets the
output together with that z. So a run keeps both tracks of the program between the calls, and after
each call says which sample the model has to see next.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..sampler import State
from ..schedule import NoiseSchedule, Point
from ..solvers import Program
from ..solvers.program import Stages, model_update, unwarned

Rows = tuple[Tensor, ...]


class Plan:
    """A program as a sequence of model calls.

    Attributes:
        schedule, program: what is run.
        limit: what the entries of x̂ are clamped to, None for no clamping.
        times: the timestep of every model call.
    """

    def __init__(
        self, schedule: NoiseSchedule, program: Program, limit: float | None = None
    ) -> None:
        self.schedule = schedule
        self.program = program
        self.limit = limit
        self._nodes = [u.node for u in program.updates if u.node is not None]
        self.times = [int(u.timestep) for u in program.updates if u.node is not None]
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Rows, Rows]] = {}

    def clean(self, call: int, output: Tensor, sample: Tensor) -> Tensor:
        """[B, …] x̂ from the model's output at `sample`, at the noise level of the call's timestep,
        clamped where the plan does; in the dtype of `sample`."""
        clean = self.denoised(call, output, sample.to(track_dtype(sample)))
        return (clean if self.limit is None else self.clamp(clean)).to(sample.dtype)

    def denoised(self, call: int, output: Tensor, z: Tensor) -> Tensor:
        """[B, …] x̂ as it is, for z in the dtype of a track."""
        _, denoising = self.rows(z.device, z.dtype)
        return ops.affine_update(z, z, denoising[call], output)

    def clamp(self, clean: Tensor) -> Tensor:
        """[B, …] x̂ within the limit."""
        assert self.limit is not None
        return clean.clamp(-self.limit, self.limit)

    def level(self, call: int) -> Point:
        """The noise level of a call's timestep."""
        return self.schedule.point(self._nodes[call])

    def rows(self, device: torch.device, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Rows [4] for the operators, one for every update, and one for every model call that gives
        x̂; copied to a device once."""
        key = (device, dtype)
        if key not in self._on_device:
            tables = torch.from_numpy(self.program.coefficients()), self._denoising()
            updates, denoising = (_to_device(t, device, dtype).unbind() for t in tables)
            self._on_device[key] = updates, denoising
        return self._on_device[key]

    def _denoising(self) -> Tensor:
        """[calls, 4] x̂ from (z, m), at the noise level of the call's timestep: on u = z/ℓ, the step
        to τ = 0."""
        updates = []
        for node in self._nodes:
            point = self.schedule.point(node)
            skip, gains = 1 / point.scale, [-point.tau]
            stages = Stages((node,))
            updates.append(model_update(self.schedule, stages, 0, Fraction(0), skip, gains))
        return torch.tensor([(0.0, u.b, u.c, 0.0) for u in updates], dtype=torch.float64)

    @cached_property
    def rest(self) -> Program:
        """The program without its first update, which starts the second track: what undoes the
        other direction from the pair of tracks that it left."""
        first, *others = self.program.updates
        held = list(self.program.start)
        held[first.track] = first.scale
        with unwarned():
            return Program(
                name=self.program.name,
                updates=tuple(others),
                start=(held[0], held[1]),
                input=self.program.input,
                output=self.program.output,
                order=self.program.order,
            )

    @cached_property
    def undone_by(self) -> str | None:
        """Fingerprint of the program that undoes this one, None where there is none."""
        with unwarned():
            return self.program.inverse().fingerprint if self.program.reversible else None


class Run:
    """One pass through a plan.

    The tracks are float32 (float64 for float64 samples), whatever 16-bit dtype the samples have.
    Every call takes the sample that comes with it as the state of the track that it shows, so what
    a pipeline has changed between two calls counts. Elements that come back as they were returned,
    bit for bit, stand for the track itself, which a 16-bit sample only rounds: a run in bfloat16
    does not add the rounding of its samples up.

    Args:
        plan: what to run.
        sample: [B, …] what the first call shows to the model; it gives shape, device and dtype.
        given: both tracks [B, …] as the other direction left them, instead of the update that
            starts the second one.
        indices: position in the scheduler's list of timesteps of every call, None where a call is
            not in it.
    """

    def __init__(
        self,
        plan: Plan,
        sample: Tensor,
        *,
        given: Sequence[Tensor] | None = None,
        indices: Sequence[int | None] = (),
    ) -> None:
        self.plan = plan
        self.indices = indices
        self.done = 0
        self._dtype = track_dtype(sample)
        self._given = given is not None
        self._position = 0
        program = plan.program
        self._held = list(plan.rest.start if given is not None else program.start)
        if given is None:
            scale = self._held[program.input]
            assert scale is not None
            self._tracks = [_to_track(sample, scale, self._dtype)] * 2
        else:
            self._tracks = [track.to(sample.device, self._dtype) for track in given]
        self._shown: Tensor | None = None
        self._settle()
        if given is not None:
            self._shown = self.shown(sample.dtype)

    @property
    def finished(self) -> bool:
        """Whether every call has been made."""
        return self.done == len(self.plan.times)

    @property
    def index(self) -> int | None:
        """Position in the scheduler's list of the next call, or one past the last."""
        if not self.finished:
            return self.indices[self.done]
        last = self.indices[-1]
        return None if last is None else last + 1

    def expects(self, index: int | None, timestep: int) -> bool:
        """Whether the next call is the one at this timestep, and at this position of the list where
        the position is known."""
        if self.finished or self.plan.times[self.done] != timestep:
            return False
        return index is None or self.indices[self.done] == index

    def shown(self, dtype: torch.dtype) -> Tensor:
        """[B, …] the sample that the model has to see next, or the result; never a view of a
        track."""
        return self._sample(self._reading, dtype)

    def _sample(self, j: int, dtype: torch.dtype) -> Tensor:
        track, scale = self._tracks[j], self._held[j]
        assert scale is not None
        if scale != 1:
            return (track.double() * scale).to(dtype)
        return track.to(dtype, copy=True)

    def advance(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Do the updates of one model call.

        Args:
            output: [B, …] raw model output at `sample`.
            sample: [B, …] what the model saw.

        Returns:
            [B, …] what the model has to see next (at the end, the result), and [B, …] x̂.
        """
        self._check(sample)
        rows, _ = self.plan.rows(sample.device, self._dtype)
        self._tracks = [track.to(sample.device) for track in self._tracks]
        self._take(sample)
        clean = self.plan.clean(self.done, output, sample)
        self._update(rows, output if self.plan.limit is None else self._clip(output))
        self.done += 1
        self._settle(rows)
        self._shown = self.shown(sample.dtype)
        # a copy, so that what the caller does to its tensor in place is seen as a change
        return self._shown.clone(), clean

    def state(self) -> State:
        """Both tracks as they are, in the form in which a `Sampler` has them."""
        tracks, held = self._tracks, self._held
        return State(
            tracks=(
                None if held[0] is None else tracks[0],
                None if held[1] is None else tracks[1],
            ),
            buffers=(None, None),
            scales=(held[0], held[1]),
            output=self._reading,
            position=self._position,
            frac_bits=None,
            program=self.plan.program.fingerprint,
            inverse=self.plan.undone_by if self.finished else None,
        )

    def _check(self, sample: Tensor) -> None:
        shape = self._tracks[self._reading].shape
        wide = self._dtype == torch.float64
        if sample.shape != shape or wide != (sample.dtype == torch.float64):
            raise ValueError(
                f"sample must have the shape {list(shape)} of the run in progress, in "
                f"{'float64' if wide else 'up to float32'}, got {list(sample.shape)} "
                f"{sample.dtype}; set_timesteps ends a run"
            )

    def _take(self, sample: Tensor) -> None:
        """Make `sample` the state of the track that it shows."""
        if self._shown is None:
            # the first call of all: the track was made from this sample
            return
        reading = self._reading
        scale = self._held[reading]
        assert scale is not None
        fresh = _to_track(sample, scale, self._dtype)
        if scale == 1 and sample.dtype == self._dtype:
            self._tracks[reading] = fresh
            return
        same = sample == self._shown.to(sample.device, sample.dtype)
        self._tracks[reading] = torch.where(same, self._tracks[reading], fresh)

    def _clip(self, output: Tensor) -> Tensor:
        """Clamp the x̂ that the next update uses: with Δ = clamp(x̂) − x̂ move its track by α Δ in z,
        and return the output m + k Δ with which the field has the same ε̂.

        A two-step solver steps from the track that the model saw; of coupled tracks each takes its
        own step, with the ε̂ that the model saw in the other one.
        """
        plan, j, at = self.plan, self._reading, self.plan.level(self.done)
        shown = self.shown(self._dtype)
        clean = plan.denoised(self.done, output, shown)
        # coupled tracks start as copies of one sample, without a call
        coupled = plan.program.updates[0].node is None
        if coupled:
            j = 1 - j
            clean = clean + (self._sample(j, self._dtype) - shown) / float(at.scale)
        change = plan.clamp(clean) - clean
        scale = self._held[j]
        assert scale is not None
        self._tracks[j] = self._tracks[j] + float(at.alpha / scale) * change
        # F = field_z z + field_m m is ε̂, in the velocity form ε̂ − x̂
        gain = -1.0 if plan.schedule.velocity_form else 0.0
        seen = 0.0 if coupled else at.field_z * at.alpha
        k = float((gain - seen) / at.field_m)
        return output + k * change if k else output

    def _update(self, rows: Rows, output: Tensor | None) -> None:
        update = self.plan.program.updates[self._position]
        row = rows[self._position]
        j, y = update.track, self._tracks[1 - update.track]
        if not (update.starts and self._given):
            # a = 0 forgets the track, so any finite one will do
            x = y if update.starts else self._tracks[j]
            affine = ops.affine_inverse if update.inverse else ops.affine_update
            self._tracks[j] = affine(x, y, row, output)
        self._held[j] = update.scale
        self._position += 1

    def _settle(self, rows: Rows | None = None) -> None:
        """Do the updates without a model call that come next, and find the track that the model has
        to see."""
        updates = self.plan.program.updates
        if rows is None:
            rows, _ = self.plan.rows(self._tracks[0].device, self._dtype)
        while self._position < len(updates) and updates[self._position].node is None:
            self._update(rows, None)
        ended = self._position == len(updates)
        self._reading = self.plan.program.output if ended else 1 - updates[self._position].track


def _to_device(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table on the device; the host does not wait for it."""
    table = table.to(dtype)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def track_dtype(sample: Tensor) -> torch.dtype:
    """float64 for float64 samples, else float32."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _to_track(sample: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """[B, …] z/scale, never the tensor itself."""
    if scale == 1:
        return sample.to(dtype, copy=True)
    return (sample.double() / scale).to(dtype)
