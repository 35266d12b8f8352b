"""A solver as plain data: the list of reversible updates that it runs.

The state is a pair of tracks (x⁰, x¹). Each update changes one track j and looks only at the other,
y = x^{1−j}, at which it evaluates the model in stages (one for most solvers, none for a mixing
layer),

    x^j ← a x^j + b y + Σ_k c_k m_k,        m_k = m(p_k y + Σ_{l<k} q_kl m_l, t_k)

with the inverse x^j ← (x^j − b y − Σ_k c_k m_k) / a,
so the list run backwards with the inverses undoes it, whatever the model m is: y does not change,
and the inverse finds the same m_k. a is an exact rational because the lattice scales integers by
it; a = 0 starts a track, forgetting what it held. b, c, p and q already contain the prediction type
and, through `Program.coefficients`, the guidance scale.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from ..lattice import MAX_RATIO_TERM, buffer_bound
from ..schedule import Array, NoiseSchedule

AMPLIFICATION_LIMIT = 1e4
"""Programs above this warn: an error of the lattice's 1e-6 would end as 1 % of the noise."""


class AmplificationWarning(UserWarning):
    """A program magnifies perturbations so much that its end state may be useless."""


_unwarned: ContextVar[bool] = ContextVar("_unwarned", default=False)


@contextmanager
def unwarned() -> Iterator[None]:
    """Make programs whose amplification is no concern: no `AmplificationWarning`, in this thread.

    `warnings.catch_warnings` would change the filters of all threads.
    """
    token = _unwarned.set(True)
    try:
        yield
    finally:
        _unwarned.reset(token)


Row = tuple[float, float, float]
"""(a, b, c) of one operator call."""


@dataclass(frozen=True)
class Stage:
    """One evaluation of the model in an update, m_k = m(p y + Σ_l q_l m_l, t), added as c m_k.

    Attributes:
        c: multiplier of the guided output m_k in the update.
        node: schedule node at which the model is called; i + 1/2 is the midpoint between the nodes
            i and i + 1 (`NoiseSchedule.point`).
        timestep: time that the model is given, an int where it is an index of a table.
        p: multiplier of the track that the update reads.
        q: multipliers of the outputs of the earlier stages, one for each.
    """

    c: float
    node: float
    timestep: float
    p: float
    q: tuple[float, ...] = ()


@dataclass(frozen=True)
class Update:
    """One reversible affine update of track `track`.

    Attributes:
        track: j, the track that changes.
        a: exact multiplier of x^j; 0 starts the track.
        b: multiplier of the other track.
        c: multiplier c_0 of the guided model output; 0 where there is no model call.
        node: schedule node at which the model is called first, None for no call.
        timestep: time that the model is given then, an int where it is an index of a table.
        model_scale: p_0, the model sees p_0 x^{1−j}.
        later: the stages k = 1, 2, … after this first one.
        recall: (c, q) where a = 0: c x^j is added and the first stage sees p_0 x^{1−j} + q x^j, x^j
            being what the update is about to forget. Solvers that remember an earlier model output
            need it; it is never reversible.
        before, after: z per unit of track j before and after the update.
        inverse: run the inverse of the update instead.
        frozen: (a, b) of the same update on z with the velocity ε̂ − x̂ held fixed; the
            amplification is read from it. None stands for (a, b) themselves.
    """

    track: int
    a: Fraction
    b: float
    c: float = 0.0
    node: float | None = None
    timestep: float = 0.0
    model_scale: float = 1.0
    before: float = 1.0
    after: float = 1.0
    inverse: bool = False
    frozen: tuple[float, float] | None = None
    later: tuple[Stage, ...] = ()
    recall: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.track not in (0, 1):
            raise ValueError(f"track must be 0 or 1, got {self.track}")
        if not 0 <= self.a <= MAX_RATIO_TERM or max(self.a.as_integer_ratio()) > MAX_RATIO_TERM:
            raise ValueError(
                f"a must be a rational with terms up to {MAX_RATIO_TERM}, got {self.a}"
            )
        if self.inverse and self.a == 0:
            raise ValueError("an update with a = 0 forgets its track and has no inverse")
        numbers = (
            *(self.b, self.c, self.timestep, self.model_scale, self.before, self.after),
            *self.frozen_coefficients,
            *(number for s in self.later for number in (s.c, s.node, s.timestep, s.p, *s.q)),
            *(self.recall or ()),
        )
        if not np.isfinite(numbers).all():
            raise ValueError(f"coefficients must be finite, got {numbers}")
        if self.node is None and self.c != 0:
            raise ValueError("an update without a model call must have c = 0")
        if self.node is None and self.later:
            raise ValueError("an update without a model call must have no later stages")
        for k, stage in enumerate(self.later, start=1):
            if len(stage.q) != k:
                raise ValueError(
                    f"stage {k} must have q for each of the {k} stages before it, got {stage.q}"
                )
        if self.recall is not None and (self.a != 0 or self.node is None):
            raise ValueError(f"recall needs a = 0 and a model call, got {self.recall}")
        if self.recall is None and (self.a == 0) != (self.frozen_coefficients[0] == 0):
            raise ValueError(
                f"frozen must scale the track as a does, got {self.frozen} for a = {self.a}"
            )

    @property
    def frozen_coefficients(self) -> tuple[float, float]:
        """`frozen`, or what it stands for."""
        return (float(self.a), self.b) if self.frozen is None else self.frozen

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All evaluations of the model in order; empty for an update without a model call."""
        if self.node is None:
            return ()
        return (Stage(self.c, self.node, self.timestep, self.model_scale), *self.later)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The operator calls that the update consists of, as (a, b, c) with c for one model output.

        First the state's: (a, b, c_0), then (1, 0, c_k) for each later stage, which add to the
        same track one after the other (the inverse takes them away in reverse order). Then those
        that make the later stages' points, stage by stage: (p, 0, q_l) for the first l whose q_l
        is not 0 and (1, 0, q_l) for the others, see `Update.sources`.

        With `recall` there are two more, at the end of the first part (1, c, 0), which reads x^j,
        and at the beginning of the second one (q, p_0, 0), which makes the first point.
        """
        first: list[Row] = [(float(self.a), self.b, self.c)]
        adding = [(1.0, 0.0, stage.c) for stage in self.later]
        if self.recall is not None:
            adding += [(1.0, self.recall[0], 0.0), (self.recall[1], self.model_scale, 0.0)]
        points = [
            (1.0 if position else stage.p, 0.0, stage.q[source])
            for stage, sources in zip(self.later, self.sources, strict=True)
            for position, source in enumerate(sources)
        ]
        return (*first, *adding, *points)

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """For every later stage, the earlier stages whose outputs its point is made of (the first
        where it is made of none)."""
        return tuple(
            tuple(index for index, q in enumerate(stage.q) if q != 0) or (0,)
            for stage in self.later
        )

    @property
    def starts(self) -> bool:
        """Whether the update starts its track (a = 0)."""
        return self.a == 0

    @property
    def scale(self) -> float:
        """z per unit of track j once the update has run."""
        return self.before if self.inverse else self.after

    def inverted(self) -> Update:
        """The update that undoes this one."""
        return replace(self, inverse=not self.inverse)


Direction = Literal["sample", "invert"]
"""Noise to data, or data to noise."""

Ends = tuple[float | None, float | None]
"""For both tracks: s with z = s·track, or None where the track holds nothing."""


@dataclass(frozen=True)
class Program:
    """A solver's updates with what the tracks hold before and after them. Checked when made.

    Attributes:
        name: solver and parameters, e.g. `bdia(gamma=15/16)`.
        updates: run in order.
        start, end: what both tracks hold before the first and after the last update (`Ends`); the
            end follows.
        input, output: the track that carries the sample at the start and at the end.
        order: order of convergence of the sampling direction.

    The inverse of a one-step program has no updates: both tracks already hold what it started from.

    Raises:
        ValueError: where an update needs a track that holds nothing.

    Warns:
        AmplificationWarning: above `AMPLIFICATION_LIMIT`.
    """

    name: str
    updates: tuple[Update, ...]
    start: Ends
    input: int
    output: int
    order: int
    end: Ends = field(init=False)

    def __post_init__(self) -> None:
        if self.input not in (0, 1) or self.output not in (0, 1):
            raise ValueError(f"input and output must be 0 or 1, got {self.input} and {self.output}")
        if self.start[self.input] is None:
            raise ValueError("the input track must hold something")
        held = list(self.start)
        for index, update in enumerate(self.updates):
            if held[1 - update.track] is None:
                raise ValueError(
                    f"update {index} reads track {1 - update.track}, which holds nothing"
                )
            needs_own = not update.starts or update.recall is not None
            if needs_own and held[update.track] is None:
                raise ValueError(
                    f"update {index} changes track {update.track}, which holds nothing"
                )
            held[update.track] = update.scale
        if held[self.output] is None:
            raise ValueError("the output track holds nothing at the end")
        object.__setattr__(self, "end", (held[0], held[1]))
        if self.amplification > AMPLIFICATION_LIMIT and not _unwarned.get():
            warnings.warn(
                f"{self.name} over {self.model_calls} model calls magnifies a perturbation up to "
                f"{self.amplification:.1e} times: its end state may be useless however exact the "
                "algebra is",
                AmplificationWarning,
                stacklevel=3,
            )

    @property
    def model_calls(self) -> int:
        """Number of model evaluations (guidance batched into one)."""
        return sum(len(update.stages) for update in self.updates)

    @property
    def reversible(self) -> bool:
        """Whether the program can be undone: no update forgets a track that held something."""
        return not self._forgets()

    def _forgets(self) -> list[int]:
        live = [scale is not None for scale in self.start]
        forgets = []
        for index, update in enumerate(self.updates):
            if update.starts and live[update.track]:
                forgets.append(index)
            live[update.track] = True
        return forgets

    def inverse(self) -> Program:
        """The program that undoes this one: the list backwards, every update inverted.

        An update that started an empty track is left out: the track held nothing before it, so what
        the inverse leaves there is of no use.

        Raises:
            ValueError: where an update forgets a track that held something (DDIM).
        """
        if forgets := self._forgets():
            raise ValueError(
                f"{self.name} is not reversible: update {forgets[0]} overwrites track "
                f"{self.updates[forgets[0]].track}; use bdia, edict, obelm or mccallum_foster"
            )
        name = self.name.removeprefix("inverse of ")
        return Program(
            name=name if name != self.name else f"inverse of {name}",
            updates=tuple(u.inverted() for u in reversed(self.updates) if not u.starts),
            start=self.end,
            input=self.output,
            output=self.input,
            order=self.order,
        )

    @cached_property
    def amplification(self) -> float:
        """Largest effect on the end state (maximum norm) of a unit change of the state at any
        earlier moment.

        In units of z and with the velocity ε̂ − x̂ held fixed, so it is the solver's own growth and
        not the model's: about γ^−N for the inversion of BDIA, whose parasitic root is −1/γ.
        """
        worst, suffix = 1.0, np.eye(2)
        for update in reversed(self.updates):
            a, b = update.frozen_coefficients
            row = (1 / a, -b / a) if update.inverse else (a, b)
            step = np.eye(2)
            step[update.track, update.track] = row[0]
            step[update.track, 1 - update.track] = row[1]
            with np.errstate(over="ignore", invalid="ignore"):
                suffix = suffix @ step
                norm = float(np.abs(suffix).sum(axis=1).max())
            if not np.isfinite(norm):
                return float("inf")
            worst = max(worst, norm)
        return worst

    @cached_property
    def max_buffer(self) -> int:
        """Largest value that the information buffer of either track can reach, from an empty
        one."""
        worst = 0
        for track in (0, 1):
            ratios: list[Fraction] = []
            for update in self.updates:
                if update.track != track:
                    continue
                if update.starts:
                    worst, ratios = max(worst, buffer_bound(ratios)), []
                else:
                    ratios.append(1 / update.a if update.inverse else update.a)
            worst = max(worst, buffer_bound(ratios))
        return worst

    @property
    def scales(self) -> bool:
        """Whether any update multiplies its track, so that the lattice needs an information
        buffer."""
        return any(update.a not in (0, 1) for update in self.updates)

    def coefficients(self, guidance_scale: float | Sequence[float] | Array = 1.0) -> Array:
        """Rows (a, b, c_1, c_2) of the operator calls, float64: `Update.rows`, update by update.

        With guidance w the two raw model outputs get c_1 = c(1−w) (unconditional) and c_2 = c w
        (conditional): for any affine prediction type this equals guidance on ε. With w = 1 there is
        one output, c_1 = c.

        Args:
            guidance_scale: w, or [B] with one per sample.

        Returns:
            [R, 4], or [R, B, 4] for guidance per sample; R is the number of updates where none has
            later stages.
        """
        w = np.asarray(guidance_scale, dtype=np.float64)
        if w.ndim > 1 or not np.isfinite(w).all():
            raise ValueError(
                f"guidance_scale must be finite numbers, one or [B], got {guidance_scale}"
            )
        abc = np.array([row for update in self.updates for row in update.rows])  # [R, 3]
        abc = abc.reshape(-1, *[1] * w.ndim, 3)  # [R, 3] or [R, 1, 3]
        a, b, c = np.moveaxis(np.broadcast_to(abc, (len(abc), *w.shape, 3)), -1, 0)
        guided = not is_unguided(guidance_scale)
        rows = (a, b, c * (1 - w), c * w) if guided else (a, b, c, 0 * c)
        return np.stack(rows, axis=-1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every number that a run reads; equal programs have equal fingerprints."""
        # json writes a float with the digits that give it back, so 981 and 981.0 differ
        rows = [
            (
                *(u.track, *u.a.as_integer_ratio(), float(u.b), float(u.c), u.inverse),
                *(u.node, u.timestep, float(u.model_scale), float(u.before), float(u.after)),
                *((float(s.c), s.node, s.timestep, float(s.p), *map(float, s.q)) for s in u.later),
                *([list(map(float, u.recall))] if u.recall else []),
            )
            for u in self.updates
        ]
        ends = [None if s is None else float(s) for s in (*self.start, *self.end)]
        data = json.dumps([rows, ends, self.input, self.output])
        return hashlib.sha256(data.encode()).hexdigest()

    def __str__(self) -> str:
        head = (
            f"{self.name}: {self.model_calls} model calls, order {self.order}, "
            f"amplification {self.amplification:.3g}, {'' if self.reversible else 'not '}reversible"
        )
        lines = [head, "  #  track       op            a              b              c  timestep"]
        for index, u in enumerate(self.updates):
            lines.append(
                f"{index:3d}  x{u.track} <- x{1 - u.track}  "
                f"{'inverse' if u.inverse else 'update ':7s} "
                f"{u.a!s:>11s} {u.b:14.8f} {u.c:14.8f}  "
                f"{'' if u.node is None else f'{u.timestep:g}'}"
            )
            lines += [
                f"{f'+ m_{k}':>20s}{'':30s}{stage.c:14.8f}  {stage.timestep:g}"
                for k, stage in enumerate(u.later, start=1)
            ]
            if u.recall is not None:
                lines.append(f"{'+ x':>19s}{u.track}{u.recall[0]:30.8f}")
        return "\n".join(lines)


class Stages(NamedTuple):
    """Where an update takes the field, in the coordinate u: F_k at node n_k of the point
    u + Σ_{l<k} w_kl F_l, u being what the update reads.

    Attributes:
        nodes: n_k, see `Stage.node`.
        inner: w_kl, the k-th with k entries.
    """

    nodes: tuple[float, ...]
    inner: tuple[tuple[float, ...], ...] = ((),)


def model_update(
    schedule: NoiseSchedule,
    stages: Stages,
    track: int,
    a: Fraction,
    skip: float,
    gains: Sequence[float],
    *,
    other: float = 1.0,
    before: float = 1.0,
    after: float = 1.0,
) -> Update:
    """x^j ← a x^j + skip x^{1−j} + Σ_k gain_k F_k with the fields F = field_z z + field_m m folded
    in.

    Args:
        schedule, stages: where the model is called.
        track: j.
        a, skip, gains: coefficients in the unit of the tracks.
        other: z per unit of the track that the model reads, z at the level of the first stage.
        before, after: z per unit of the track that changes, before and after.
    """
    points = [schedule.point(node) for node in stages.nodes]
    count = len(points)
    # z_k and F_k as linear forms of (y, m_0, m_1, …), and their derivatives by z_0 for a velocity
    # v that is held fixed: ε̂ = (z + α v)/(α + σ), the noise form's F
    z, field = np.zeros((count, count + 1)), np.zeros((count, count + 1))
    held_z, held_field = np.ones(count), np.zeros(count)
    z[0, 0] = other
    for k, (point, inner) in enumerate(zip(points, stages.inner, strict=True)):
        if k > 0:
            weights = np.array(inner)
            z[k] = point.scale * (z[0] / points[0].scale + weights @ field[:k])
            held_z[k] = point.scale * (1 / points[0].scale + weights @ held_field[:k])
        field[k] = point.field_z * z[k]
        field[k, 1 + k] += point.field_m
        if not schedule.velocity_form:
            held_field[k] = held_z[k] / (point.alpha + point.sigma)
    b, held = skip, skip / other
    c = [float(gain * point.field_m) for gain, point in zip(gains, points, strict=True)]
    for k, (gain, point) in enumerate(zip(gains, points, strict=True)):
        b += gain * point.field_z * z[k, 0]
        held += gain * held_field[k]
        for earlier in range(k):
            c[earlier] += float(gain * point.field_z * z[k, 1 + earlier])
    first, *later = [
        Stage(
            c=c[k],
            node=node,
            # a time between the nodes is no index of a table
            timestep=(int if schedule.discrete and node == int(node) else float)(point.timestep),
            p=float(z[k, 0] * point.input_scale),
            q=tuple(float(q * point.input_scale) for q in z[k, 1 : 1 + k]),
        )
        for k, (node, point) in enumerate(zip(stages.nodes, points, strict=True))
    ]
    return Update(
        track=track,
        a=a,
        b=float(b),
        c=first.c,
        node=first.node,
        timestep=first.timestep,
        model_scale=first.p,
        before=float(before),
        after=float(after),
        frozen=(float(a * after / before), float(held * after)),
        later=tuple(later),
    )


def is_unguided(guidance_scale: float | Sequence[float] | Array) -> bool:
    """Whether guidance 1 holds for the whole batch, so that one model output is enough."""
    return bool((np.asarray(guidance_scale, dtype=np.float64) == 1).all())


def nodes_of(schedule: NoiseSchedule, direction: Direction) -> list[int]:
    """The nodes in the order in which `direction` visits them.

    Raises:
        ValueError: for an unknown direction.
    """
    rising = list(range(schedule.num_steps + 1))
    match direction:
        case "sample":
            return rising[::-1]
        case "invert":
            return rising
        case _:
            raise ValueError(f"direction must be one of {get_args(Direction)}, got {direction!r}")
