"""Heun's method of EDM (Karras et al. 2022, algorithm 1, and 2 without churn).

    d_i = (z_i − D(z_i; σ_i)) / σ_i
    z' = z_i + (σ_j − σ_i) d_i
    z_j = z_i + (σ_j − σ_i) (d_i + d'_j)/2,        d'_j = (z' − D(z'; σ_j)) / σ_j,

and z_j = z' where σ_j = 0. With α = 1 this is du/dτ = F in τ = σ, so in u = z/ℓ every schedule has

    u' = u_i + h F_i,        u_j = u_i + h/2 (F_i + F_j(u')),        h = τ_j − τ_i.
"""

from __future__ import annotations

from ..schedule import NoiseSchedule
from .one_step import Step, euler_step, one_step_program
from .program import Direction, Program, Stages


def heun(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """Heun's method, order 2, not reversible; two model calls a step, one for a step to σ = 0."""
    return one_step_program("heun", schedule, direction, heun_step, order=2)


def heun_step(schedule: NoiseSchedule, i: int, j: int) -> Step:
    """Heun's step; Euler's to σ = 0 (as EDM does) and from where the model is undefined."""
    h = schedule.tau[j] - schedule.tau[i]
    if h == 0 or schedule.sigma[j] == 0 or not schedule.callable_at(i):
        return euler_step(schedule, i, j)
    return Step(Stages((i, j), ((), (h,))), (h / 2, h / 2))
