"""What the two-step solvers share: z_{i−1} from z_{i+1} and z_i, each node i on track i mod 2."""

from __future__ import annotations

from collections.abc import Callable

from ..schedule import NoiseSchedule
from .one_step import Integrator, euler_step, step_update
from .program import Direction, Program, Update, nodes_of


def two_step_program(
    name: str,
    schedule: NoiseSchedule,
    direction: Direction,
    step: Callable[[int], Update],
    *,
    order: int,
    in_u: bool,
    first: Integrator = euler_step,
) -> Program:
    """Program of a two-step solver started by one step of a one-step integrator.

    Args:
        name: solver and parameters.
        schedule: the grid, N steps.
        direction: `sample` runs z_N → z_0, `invert` z_0 → z_N with the inverted updates.
        step: node i (1 … N−1) to the update that takes z_{i+1} to z_{i−1} given z_i.
        order: order of convergence.
        in_u: tracks hold u = z/ℓ instead of z.
        first: the integrator of the first step.
    """
    nodes = nodes_of(schedule, direction)
    start = step_update(schedule, first, nodes[0], nodes[1], in_u=in_u)
    body = [step(i) for i in nodes[1:-1]]
    if direction == "invert":
        body = [update.inverted() for update in body]

    scale = float(schedule.scale[nodes[0]]) if in_u else 1.0
    return Program(
        name=name if direction == "sample" else f"{name} inversion",
        updates=(start, *body),
        start=(scale, None) if nodes[0] % 2 == 0 else (None, scale),
        input=nodes[0] % 2,
        output=nodes[-1] % 2,
        order=order,
    )
