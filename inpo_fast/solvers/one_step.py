"""One-step integrators as data, and the programs that run them as they are.

In u = z/ℓ the probability-flow ODE is du/dτ = F, so a one-step method is an explicit Runge–Kutta
step from node i to node j, in either direction,

    u_j = u_i + Σ_k w_k F_k,        F_k = F(u_i + Σ_{l<k} w_kl F_l at node n_k),

and its increment is Δ(i→j | u_i) = Σ_k w_k F_k. BDIA and the McCallum–Foster method make reversible
solvers of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from ..schedule import NoiseSchedule
from .program import Direction, Program, Stages, Update, model_update, nodes_of


class Step(NamedTuple):
    """The increment of one step, Σ_k w_k F_k, in the coordinate u."""

    stages: Stages
    weights: tuple[float, ...]


Integrator: TypeAlias = Callable[[NoiseSchedule, int, int], Step]
"""integrator(schedule, i, j): the step from node i to its neighbour j."""


def euler_step(schedule: NoiseSchedule, i: int, j: int) -> Step:
    """u_j = u_i + (τ_j − τ_i) F_i.

    Where the model cannot be called at node i (node 0 of a `sample` model), the field is taken at
    node 1 instead, which is as accurate (first order).
    """
    node = max(i, schedule.first_callable)
    return Step(Stages((node,)), (schedule.tau[j] - schedule.tau[i],))


def step_update(
    schedule: NoiseSchedule,
    integrator: Integrator,
    source: int,
    target: int,
    *,
    in_u: bool = False,
) -> Update:
    """One step from node `source` to node `target`, as an update that starts the target's track.

    Node i lives on track i mod 2.

    Args:
        schedule: the grid.
        integrator: see `Integrator`.
        source, target: neighbouring nodes.
        in_u: tracks hold u = z/ℓ instead of z.
    """
    step, scale = integrator(schedule, source, target), schedule.scale
    source_scale, target_scale = (1.0, 1.0) if in_u else (scale[source], scale[target])
    return model_update(
        schedule,
        step.stages,
        track=target % 2,
        a=Fraction(0),
        skip=target_scale / source_scale,
        gains=[target_scale * weight for weight in step.weights],
        # the model reads z at the level of its own timestep
        other=schedule.point(step.stages.nodes[0]).scale / source_scale,
        before=scale[target] / target_scale,
        after=scale[target] / target_scale,
    )


def one_step_program(
    name: str, schedule: NoiseSchedule, direction: Direction, integrator: Integrator, *, order: int
) -> Program:
    """The integrator from the first node to the last; every step forgets, so there is no inverse.

    Args:
        name: solver and parameters.
        schedule: the grid, N steps.
        direction: noise to data or data to noise.
        integrator: see `Integrator`.
        order: order of convergence.
    """
    nodes = nodes_of(schedule, direction)
    updates = tuple(step_update(schedule, integrator, i, j) for i, j in pairwise(nodes))
    first, last = nodes[0], nodes[-1]
    return Program(
        name=name if direction == "sample" else f"{name} inversion",
        updates=updates,
        start=(1.0, None) if first % 2 == 0 else (None, 1.0),
        input=first % 2,
        output=last % 2,
        order=order,
    )
