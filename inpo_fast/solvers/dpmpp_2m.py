"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): data prediction, remembering the one before.

With λ = ln(α/σ), h_i = λ_{i−1} − λ_i, ρ_i = h_i / (2 h_{i+1}) and K_i = α_{i−1} − α_i σ_{i−1}/σ_i
(which is −α_{i−1} (e^{−h_i} − 1)),

    z_{i−1} = (σ_{i−1}/σ_i) z_i + K_i [(1 + ρ_i) x̂_i − ρ_i x̂_{i+1}].

This cannot be a reversible program with one model call a step: the two tracks would have to hold
z_i and x̂_{i+1} and to turn into z_{i−1} and x̂_i, where x̂_i is an arbitrary function of z_i and
x̂_{i+1} is gone. So the second track holds the last data prediction and every step overwrites it.
The first track holds what is left of z once its share of that prediction is taken out, in units
of σ,

    x⁰ = (z_i − κ_i x̂_{i+1}) / σ_i,        κ_i = ρ_i K_i σ_i / σ_{i−1},

so that x̂_{i+1} is not needed any more once z_i = σ_i x⁰ + κ_i x¹ has gone through the model:

    x¹ ← x̂(σ_i x⁰ + κ_i x¹),        x⁰ ← x⁰ + [K_i (1 + ρ_i) − κ_{i−1}] / σ_{i−1} x¹.

The first step, the last one where σ_0 = 0, and the one after α = 0 have ρ = 0: they are DDIM's.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..schedule import Array, NoiseSchedule
from .program import Direction, Program, Update


def dpmpp_2m(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """DPM-Solver++(2M), order 2, one model call a step; for sampling only, not reversible.

    The order is that on grids whose steps all get short in λ (EDM's; any that ends at σ > 0). Where
    σ falls to 0 in even steps, the last ones do not, and the observed order is about 1.5.

    Raises:
        ValueError: direction other than `sample`; σ = 0 above node 0.
    """
    if direction != "sample":
        raise ValueError(
            f"direction must be 'sample', got {direction!r}: dpm++2m is not reversible and does "
            "not invert; use bdia, edict, obelm or mccallum_foster"
        )
    if schedule.sigma[1] == 0:
        raise ValueError("dpm++2m needs sigma > 0 at every node but 0")
    remembered = _remembered(schedule)
    nodes = range(schedule.num_steps, 0, -1)
    updates = [update for i in nodes for update in _updates(schedule, i, remembered)]
    return Program(
        name="dpm++2m",
        updates=tuple(updates),
        start=(float(schedule.sigma[-1]), None),
        input=0,
        output=0,
        order=2,
    )


def _remembered(schedule: NoiseSchedule) -> Array:
    """[N+1] ρ_i, 0 for the steps that look at one prediction alone."""
    log_snr, count = schedule.log_snr, schedule.num_steps
    rho = np.zeros(count + 1)
    for i in range(1, count):
        if np.isfinite(log_snr[i - 1 : i + 2]).all():
            rho[i] = (log_snr[i - 1] - log_snr[i]) / (2 * (log_snr[i] - log_snr[i + 1]))
    return rho


def _updates(schedule: NoiseSchedule, i: int, rho: Array) -> list[Update]:
    """The data prediction at node i and the step to node i−1."""
    alpha, sigma = schedule.alpha, schedule.sigma

    def weight(k: int) -> float:
        return float(alpha[k - 1] - alpha[k] * sigma[k - 1] / sigma[k])

    def share(k: int) -> float:
        return float(rho[k] * weight(k) * sigma[k] / sigma[k - 1]) if rho[k] else 0.0

    # x̂ = u − τ F
    point = schedule.point(i)
    of_z = 1 / point.scale - point.tau * point.field_z
    held, kappa = 1 / (point.alpha + point.sigma), share(i)
    first = i == schedule.num_steps
    predict = Update(
        track=1,
        a=Fraction(0),
        b=float(of_z * sigma[i]),
        c=float(-point.tau * point.field_m),
        node=i,
        timestep=(int if schedule.discrete else float)(point.timestep),
        model_scale=float(point.input_scale * sigma[i]),
        frozen=(float(kappa * held), float(held)),
        recall=None if first else (float(of_z * kappa), float(point.input_scale * kappa)),
    )
    clean = sigma[i - 1] == 0
    gain = weight(i) * (1 + rho[i]) - share(i - 1)
    after = 1.0 if clean else float(sigma[i - 1])
    step = Update(
        track=0,
        a=Fraction(0 if clean else 1),
        b=float(gain / after),
        before=float(sigma[i]),
        after=after,
        frozen=(0.0 if clean else float(after / sigma[i]), float(gain)),
    )
    return [predict, step]
