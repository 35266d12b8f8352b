"""O-BELM (Wang et al., NeurIPS 2024, eq. 18): the two-step reversible solver of least local error.

With h_i = τ_i − τ_{i−1} on the normalised track u = z/ℓ,

    u_{i−1} = a u_{i+1} + (1−a) u_i − (h_i + a h_{i+1}) F_i,        a = h_i² / h_{i+1}²,

whose local error is O(h³): a cancels the second-order term, and with the rounded rational a the
other two coefficients keep the scheme consistent. One model call a step; the first step is DDIM.
"""

from __future__ import annotations

from fractions import Fraction

from ..schedule import NoiseSchedule
from .program import Direction, Program, Update, model_update, rational
from .two_step import two_step_program


def obelm(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """O-BELM; no parameter, order 2. Its inversion grows with (h_N/h_1)², see
    `Program.amplification`."""
    return two_step_program(
        "obelm", schedule, direction, lambda i: obelm_update(schedule, i), order=2, in_u=True
    )


def obelm_update(schedule: NoiseSchedule, i: int) -> Update:
    """u_{i+1} → u_{i−1} given u_i, 1 ≤ i ≤ N−1."""
    scale = schedule.scale
    after, before = schedule.tau[i + 1] - schedule.tau[i], schedule.tau[i] - schedule.tau[i - 1]
    # a last step of no length would give a = 0 and no inverse; one first-order step keeps the
    # order of the whole
    a = rational((before / after) ** 2) if before > 0 else Fraction(1)
    return model_update(
        schedule,
        i,
        track=(i + 1) % 2,
        a=a,
        skip=1 - float(a),
        gain=-(before + float(a) * after),
        other=scale[i],
        before=scale[i + 1],
        after=scale[i - 1],
    )
