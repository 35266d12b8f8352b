"""DDIM and DDIM inversion (Song et al. 2021, eq. 12 with η = 0): the baseline that forgets.

    u_j = u_i + (τ_j − τ_i) F(z_i, t_i),        z = ℓ u

Both directions evaluate the model where they start, so one is not the inverse of the other. On a
rectified flow the same step is the Euler method.
"""

from __future__ import annotations

from ..schedule import NoiseSchedule
from .one_step import euler_step, one_step_program, step_update
from .program import Direction, Program, Update


def ddim_update(schedule: NoiseSchedule, source: int, target: int, *, in_u: bool = False) -> Update:
    """One DDIM step, see `step_update`."""
    return step_update(schedule, euler_step, source, target, in_u=in_u)


def ddim(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """DDIM (noise to data) or DDIM inversion (data to noise); one model call a step, order 1, not
    reversible."""
    return one_step_program("ddim", schedule, direction, euler_step, order=1)
