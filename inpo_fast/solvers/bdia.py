"""BDIA-DDIM(γ) (Zhang, Lewis and Kleijn, ECCV 2024): bi-directional integration approximation.

With Δ(i→j | z_i) the DDIM increment from node i to node j, eq. 15 of the paper reads

    z_{i−1} = γ z_{i+1} + (1−γ) z_i − γ Δ(i→i+1 | z_i) + Δ(i→i−1 | z_i)
            = γ z_{i+1} − γ (α_{i+1} x̂ + σ_{i+1} ε̂) + (α_{i−1} x̂ + σ_{i−1} ε̂),

where α_j x̂ + σ_j ε̂ = ℓ_j (z_i/ℓ_i + (τ_j − τ_i) F). The tracks hold z, so a = γ in every step and
γ = 1 is plain addition on the lattice. One model call a step; the first step is DDIM.
"""

from __future__ import annotations

from fractions import Fraction

from ..lattice import rational
from ..schedule import NoiseSchedule
from .program import Direction, Program, Update, model_update
from .two_step import two_step_program


def bdia(
    schedule: NoiseSchedule, *, gamma: float | Fraction = 1, direction: Direction = "sample"
) -> Program:
    """BDIA-DDIM with weight γ in (0, 1] of the backward approximation; γ → 0 is DDIM, which cannot
    be inverted.

    γ is rounded to the nearest rational with terms up to 2^16 (0.94 is 47/50 exactly). The order is
    1; γ = 1 reaches 2 where neighbouring steps are nearly equal.

    Raises:
        ValueError: γ outside (0, 1].
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    weight = rational(gamma)
    return two_step_program(
        f"bdia(gamma={weight})",
        schedule,
        direction,
        lambda i: bdia_update(schedule, i, weight),
        order=1,
        in_u=False,
    )


def bdia_update(schedule: NoiseSchedule, i: int, gamma: Fraction) -> Update:
    """z_{i+1} → z_{i−1} given z_i, 1 ≤ i ≤ N−1."""
    scale, tau, g = schedule.scale, schedule.tau, float(gamma)
    skip = (scale[i - 1] - g * scale[i + 1]) / scale[i]
    gain = scale[i - 1] * (tau[i - 1] - tau[i]) - g * scale[i + 1] * (tau[i + 1] - tau[i])
    return model_update(schedule, i, track=(i + 1) % 2, a=gamma, skip=skip, gain=gain)
