"""BDIA(γ) (Zhang, Lewis and Kleijn, ECCV 2024): bi-directional integration approximation.

With Δ(i→j | z_i) the increment of a one-step integrator from node i to node j,

    z_{i−1} = γ z_{i+1} + (1−γ) z_i − γ Δ(i→i+1 | z_i) + Δ(i→i−1 | z_i).

For DDIM z_i + Δ(i→j | z_i) = α_j x̂ + σ_j ε̂ = ℓ_j (z_i/ℓ_i + (τ_j − τ_i) F), which gives eq. 15,

    z_{i−1} = γ z_{i+1} − γ (α_{i+1} x̂ + σ_{i+1} ε̂) + (α_{i−1} x̂ + σ_{i−1} ε̂).

The paper also applies the idea to EDM and DPM-Solver++. An integrator of `one_step` has z_i + Δ(i→j
| z_i) = ℓ_j (z_i/ℓ_i + Σ_k w_k F_k), with w_k and F_k for i→i+1 and others for i→i−1. Both start
with the field F_i at z_i, so that they share their first model call; the other calls are their own:

    z_{i−1} = γ z_{i+1} + (ℓ_{i−1} − γ ℓ_{i+1})/ℓ_i z_i
              + (ℓ_{i−1} w⁻_0 − γ ℓ_{i+1} w⁺_0) F_i − γ ℓ_{i+1} w⁺_1 F⁺_1 + ℓ_{i−1} w⁻_1 F⁻_1.

All of these are functions of z_i alone, which makes it one update with one, or three, stages: one
model call a step for DDIM, three for Heun and DPM-Solver++(2S), whose second calls lie at node i±1
and halfway to it. The tracks hold z, so a = γ in every step and γ = 1 is plain addition on the
lattice. The first step is the integrator's own.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

from ..lattice import rational
from ..schedule import NoiseSchedule
from .integrators import IntegratorName, integrator_of
from .one_step import Integrator, euler_step
from .program import Direction, Program, Stages, Update, model_update
from .two_step import two_step_program


def bdia(
    schedule: NoiseSchedule,
    *,
    gamma: float | Fraction = 1,
    integrator: IntegratorName = "ddim",
    direction: Direction = "sample",
) -> Program:
    """BDIA with weight γ in (0, 1] of the backward approximation; γ → 0 is the integrator itself,
    which cannot be inverted.

    γ is rounded to the nearest rational with terms up to 2^16 (0.94 is 47/50 exactly). With DDIM
    the order is 1; γ = 1 reaches 2 where neighbouring steps are nearly equal. With Heun and
    DPM-Solver++(2S) it is 2.

    Args:
        schedule: the grid.
        gamma: γ.
        integrator: `ddim` (one model call a step), `heun` or `dpm++2s` (up to three).
        direction: noise to data or data to noise.

    Raises:
        TypeError: γ is no number.
        ValueError: γ outside (0, 1], or no such integrator.
    """
    if not isinstance(gamma, Real):
        raise TypeError(f"gamma must be a number, got {gamma!r}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    weight, step = rational(gamma), integrator_of(integrator)
    return two_step_program(
        f"bdia(gamma={weight})" if integrator == "ddim" else f"bdia({integrator}, gamma={weight})",
        schedule,
        direction,
        lambda i: bdia_update(schedule, i, weight, step),
        order=1 if integrator == "ddim" else 2,
        in_u=False,
        first=step,
    )


def bdia_update(
    schedule: NoiseSchedule, i: int, gamma: Fraction, integrator: Integrator = euler_step
) -> Update:
    """z_{i+1} → z_{i−1} given z_i, 1 ≤ i ≤ N−1."""
    scale, g = schedule.scale, float(gamma)
    up, down = integrator(schedule, i, i + 1), integrator(schedule, i, i - 1)
    # the first stage is common, the others read its field alone
    inner = [
        *up.stages.inner,
        *((w[0], *[0.0] * len(up.weights[1:]), *w[1:]) for w in down.stages.inner[1:]),
    ]
    return model_update(
        schedule,
        Stages((*up.stages.nodes, *down.stages.nodes[1:]), tuple(inner)),
        track=(i + 1) % 2,
        a=gamma,
        skip=(scale[i - 1] - g * scale[i + 1]) / scale[i],
        gains=(
            scale[i - 1] * down.weights[0] - g * scale[i + 1] * up.weights[0],
            *(-g * scale[i + 1] * weight for weight in up.weights[1:]),
            *(scale[i - 1] * weight for weight in down.weights[1:]),
        ),
    )
