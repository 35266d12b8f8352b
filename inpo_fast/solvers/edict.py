"""EDICT(p) (Wallace, Gokul and Naik, CVPR 2023, eq. 13-15): two coupled tracks and a mixing layer.

On the normalised tracks u = x/ℓ and v = y/ℓ one denoising step is

    u ← u + h F(v);   v ← v + h F(u);   u ← p u + (1−p) v;   v ← p v + (1−p) u

with h = τ_{i−1} − τ_i,

so only the mixing layers scale. The second call sees the track that has already moved to node i−1,
at the timestep of node i, as in the paper, and which track moves first alternates from step to
step. Two model calls a step.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

from ..lattice import rational
from ..schedule import NoiseSchedule
from .coupled import coupled_program
from .program import Direction, Program, Stages, Update, model_update, nodes_of


def edict(
    schedule: NoiseSchedule,
    *,
    p: float | Fraction = Fraction(93, 100),
    direction: Direction = "sample",
) -> Program:
    """EDICT with mixing weight p in (1/2, 1]; the inversion grows with p^−2N, at p = 1 the tracks
    drift apart.

    Raises:
        TypeError: p is no number.
        ValueError: p outside (1/2, 1].
    """
    if not isinstance(p, Real):
        raise TypeError(f"p must be a number, got {p!r}")
    if not 0.5 < p <= 1:
        raise ValueError(f"p must be in (1/2, 1], got {p}")
    weight = rational(p)
    nodes = nodes_of(schedule, "sample")
    updates = [update for i in nodes[:-1] for update in edict_updates(schedule, i, weight)]
    return coupled_program(f"edict(p={weight})", schedule, direction, updates, order=1)


def edict_updates(schedule: NoiseSchedule, i: int, p: Fraction) -> list[Update]:
    """Both tracks from node i to node i−1, 1 ≤ i ≤ N: two updates with a model call, two mixing
    layers."""
    step = schedule.tau[i - 1] - schedule.tau[i]
    first = (schedule.num_steps - i) % 2
    moves = [
        model_update(
            schedule,
            Stages((i,)),
            track=track,
            a=Fraction(1),
            skip=0.0,
            gains=[float(step)],
            other=schedule.scale[level],
            before=schedule.scale[i],
            after=schedule.scale[i - 1],
        )
        for track, level in ((first, i), (1 - first, i - 1))
    ]
    if p == 1:
        return moves
    mix = (float(p), 1 - float(p))
    scale = float(schedule.scale[i - 1])
    mixing = [
        Update(track=track, a=p, b=mix[1], before=scale, after=scale, frozen=mix)
        for track in (0, 1)
    ]
    return [*moves, *mixing]
