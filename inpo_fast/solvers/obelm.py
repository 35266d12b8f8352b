"""O-BELM (Wang et al., NeurIPS 2024, eq. 18): the two-step reversible solver of least local error.

With h_i = τ_i − τ_{i−1} on the normalised track u = z/ℓ,

    u_{i−1} = a u_{i+1} + (1−a) u_i − (h_i + a h_{i+1}) F_i,        a = h_i² / h_{i+1}²,

whose local error is O(h³): a cancels the second-order term, and with the rounded rational a the
other two coefficients keep the scheme consistent. One model call a step; the first step is DDIM.
"""

from __future__ import annotations

from fractions import Fraction

from ..lattice import MAX_RATIO_TERM, rational
from ..schedule import NoiseSchedule
from .program import Direction, Program, Stages, Update, model_update
from .two_step import two_step_program


def obelm(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """O-BELM; no parameter, order 2. Its inversion grows with (h_N/h_1)², see
    `Program.amplification`.

    Raises:
        ValueError: two neighbouring steps differ so much in length that a is out of range.
    """
    return two_step_program(
        "obelm", schedule, direction, lambda i: obelm_update(schedule, i), order=2, in_u=True
    )


def obelm_update(schedule: NoiseSchedule, i: int) -> Update:
    """u_{i+1} → u_{i−1} given u_i, 1 ≤ i ≤ N−1.

    Raises:
        ValueError: the step below node i is more than 256 times as long as the one above it.
    """
    scale, tau = schedule.scale, schedule.tau
    h, h_next = tau[i] - tau[i - 1], tau[i + 1] - tau[i]
    if h > h_next * MAX_RATIO_TERM**0.5:
        raise ValueError(
            f"timesteps: O-BELM needs a = h_i²/h_(i+1)² of at most {MAX_RATIO_TERM}, got "
            f"{(h / h_next) ** 2:.0f} at timestep {schedule.timesteps[i]:g}, where a step follows "
            f"one that is {h / h_next:.0f} times shorter"
        )
    # a last step of no length would give a = 0 and no inverse; one first-order step keeps the
    # order of the whole
    a = rational((h / h_next) ** 2) if h > 0 else Fraction(1)
    return model_update(
        schedule,
        Stages((i,)),
        track=(i + 1) % 2,
        a=a,
        skip=1 - float(a),
        gains=[-(h + float(a) * h_next)],
        other=scale[i],
        before=scale[i + 1],
        after=scale[i - 1],
    )
