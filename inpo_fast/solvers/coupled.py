"""What the solvers with two coupled tracks share: both hold the sample at the same node."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..schedule import NoiseSchedule
from .program import Direction, Program, Update, nodes_of


def coupled_program(
    name: str,
    schedule: NoiseSchedule,
    direction: Direction,
    updates: Sequence[Update],
    *,
    order: int,
) -> Program:
    """Program that starts both tracks as the same sample.

    Args:
        name: solver and parameters.
        schedule: the grid, N steps.
        direction: `sample` runs the updates, `invert` their inverses backwards.
        updates: from node N to node 0; the tracks hold u = z/ℓ at both ends.
        order: order of convergence.
    """
    scale = float(schedule.scale[nodes_of(schedule, direction)[0]])
    start = Update(track=1, a=Fraction(0), b=1.0, before=scale, after=scale, frozen=(0.0, 1.0))
    sampling = direction == "sample"
    body = updates if sampling else [update.inverted() for update in reversed(updates)]
    return Program(
        name=name if sampling else f"{name} inversion",
        updates=(start, *body),
        start=(scale, None),
        input=0,
        output=0,
        order=order,
    )
