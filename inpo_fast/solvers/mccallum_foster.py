"""The reversible method of McCallum and Foster (arXiv 2410.11648) for any one-step integrator.

Two tracks y and w, Ψ_h(t, ·) the increment of the integrator; from t to t + h

    y ← ζ y + (1−ζ) w + Ψ_h(t, w);        w ← w − Ψ_{−h}(t + h, y).

The coupling ζ < 1 pulls the tracks together. They hold u = z/ℓ, in which the ODE has no linear part
and Ψ is Σ_k w_k F_k from node i to node i−1 in the first update, from i−1 back to i in the second
(`one_step`). So a = ζ, and 1 in the second update: only the first scales. Both updates call the
model as often as the integrator does: two calls a step for DDIM, four for the others.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

from ..lattice import rational
from ..schedule import NoiseSchedule
from .coupled import coupled_program
from .integrators import IntegratorName, integrator_of, order_of
from .one_step import Integrator, Step
from .program import Direction, Program, Update, model_update, nodes_of


def mccallum_foster(
    schedule: NoiseSchedule,
    *,
    zeta: float | Fraction = Fraction(999, 1000),
    integrator: IntegratorName = "ddim",
    direction: Direction = "sample",
) -> Program:
    """The reversible method with coupling ζ in (0, 1]; the order is the integrator's, 1 for DDIM
    and 2 for the others.

    ζ is rounded to the nearest rational with terms up to 2^16. The difference of the two tracks
    grows where the ODE contracts: in sampling it is magnified by (α_N + σ_N)/α_N² for a fixed
    velocity and ζ = 1, against which ζ < 1 works slowly (`Program.amplification`).

    Args:
        schedule: the grid.
        zeta: ζ.
        integrator: `ddim` (two model calls a step), `heun` or `dpm++2s` (up to four).
        direction: noise to data or data to noise.

    Raises:
        TypeError: ζ is no number.
        ValueError: ζ outside (0, 1], or no such integrator.
    """
    if not isinstance(zeta, Real):
        raise TypeError(f"zeta must be a number, got {zeta!r}")
    if not 0 < zeta <= 1:
        raise ValueError(f"zeta must be in (0, 1], got {zeta}")
    weight, step = rational(zeta), integrator_of(integrator)
    updates = [
        update
        for i in nodes_of(schedule, "sample")[:-1]
        for update in mccallum_foster_updates(schedule, i, weight, step)
    ]
    name = f"mccallum-foster({integrator}, zeta={weight})"
    return coupled_program(name, schedule, direction, updates, order=order_of(integrator))


def mccallum_foster_updates(
    schedule: NoiseSchedule, i: int, zeta: Fraction, integrator: Integrator
) -> list[Update]:
    """Both tracks from node i to node i−1, 1 ≤ i ≤ N."""

    def update(track: int, a: Fraction, step: Step, sign: float) -> Update:
        return model_update(
            schedule,
            step.stages,
            track=track,
            a=a,
            skip=1 - float(a),
            gains=[sign * weight for weight in step.weights],
            other=schedule.point(step.stages.nodes[0]).scale,
            before=schedule.scale[i],
            after=schedule.scale[i - 1],
        )

    return [
        update(0, zeta, integrator(schedule, i, i - 1), 1.0),
        update(1, Fraction(1), integrator(schedule, i - 1, i), -1.0),
    ]
