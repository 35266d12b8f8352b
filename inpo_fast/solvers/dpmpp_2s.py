"""DPM-Solver++(2S) (Lu et al. 2022, algorithm 1): exponential integration of the data prediction.

With λ = ln(α/σ), h = λ_j − λ_i and the point s between the nodes i and j, r = (λ_s − λ_i)/h,

    z_s = (σ_s/σ_i) z_i − α_s (e^{−r h} − 1) x̂_i
    D = (1 − 1/(2r)) x̂_i + 1/(2r) x̂(z_s, t_s)
    z_j = (σ_j/σ_i) z_i − α_j (e^{−h} − 1) D.

As α_j e^{−h} = α_i σ_j/σ_i, the step with D = x̂_i is DDIM's, and so is the one to s. The rest of D
adds (α_j − α_i σ_j/σ_i) (x̂_s − x̂_i)/(2r). In u = z/ℓ, with x̂ = u − τ F in both forms of the
coordinate,

    u_s = u_i + (τ_s − τ_i) F_i
    x̂_s − x̂_i = (u_s − u_i) − τ_s F_s + τ_i F_i = τ_s (F_i − F_s)
    (α_j − α_i σ_j/σ_i)/ℓ_j = 1 − τ_j/τ_i

and therefore

    u_j = u_i + (τ_j − τ_i) [(1 − θ) F_i + θ F_s],        θ = τ_s / (2 r τ_i):

a Runge–Kutta step with two stages. Here s is the midpoint in λ, r = 1/2 (`NoiseSchedule.point`).
"""

from __future__ import annotations

import numpy as np

from ..schedule import NoiseSchedule
from .one_step import Step, euler_step, one_step_program
from .program import Direction, Program, Stages


def dpmpp_2s(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """DPM-Solver++(2S), order 2, not reversible.

    Two model calls a step, the second at a time between the nodes; one in a step to or from σ = 0
    or α = 0, where λ is infinite and has no midpoint.
    """
    return one_step_program("dpm++2s", schedule, direction, dpmpp_2s_step, order=2)


def dpmpp_2s_step(schedule: NoiseSchedule, i: int, j: int) -> Step:
    """The step with the midpoint in λ; DDIM's where an end has no λ."""
    tau, log_snr = schedule.tau, schedule.log_snr
    if tau[i] == tau[j] or not np.isfinite(log_snr[[i, j]]).all():
        return euler_step(schedule, i, j)
    node = (i + j) / 2
    middle = schedule.point(node).tau
    theta, h = middle / tau[i], tau[j] - tau[i]
    return Step(Stages((i, node), ((), (middle - tau[i],))), ((1 - theta) * h, theta * h))
