"""DDIM and DDIM inversion (Song et al. 2021, eq. 12 with η = 0): the baseline that forgets.

    u_j = u_i + (τ_j − τ_i) F(z_i, t_i),        z = ℓ u

Both directions evaluate the model where they start, so one is not the inverse of the other.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from ..schedule import NoiseSchedule
from .program import Direction, Program, Update, model_update, nodes_of


def ddim_update(schedule: NoiseSchedule, source: int, target: int, *, in_u: bool = False) -> Update:
    """One DDIM step from node `source` to node `target`, as an update that starts the target's
    track.

    Node i lives on track i mod 2. Where the model cannot be called at the source (node 0 of a
    `sample` model), the field is taken at node 1 instead, which is as accurate (first order).

    Args:
        schedule: the grid.
        source, target: neighbouring nodes.
        in_u: tracks hold u = z/ℓ instead of z.
    """
    node = max(source, schedule.first_callable)
    scale, tau = schedule.scale, schedule.tau
    source_scale, target_scale = (1.0, 1.0) if in_u else (scale[source], scale[target])
    return model_update(
        schedule,
        node,
        track=target % 2,
        a=Fraction(0),
        skip=target_scale / source_scale,
        gain=target_scale * (tau[target] - tau[source]),
        # the model reads z at the level of its own timestep
        other=scale[node] / source_scale,
        before=scale[target] / target_scale,
        after=scale[target] / target_scale,
    )


def ddim(schedule: NoiseSchedule, *, direction: Direction = "sample") -> Program:
    """DDIM (noise to data) or DDIM inversion (data to noise); one model call a step, order 1, not
    reversible."""
    nodes = nodes_of(schedule, direction)
    updates = tuple(ddim_update(schedule, i, j) for i, j in pairwise(nodes))
    first, last = nodes[0], nodes[-1]
    return Program(
        name="ddim" if direction == "sample" else "ddim inversion",
        updates=updates,
        start=(1.0, None) if first % 2 == 0 else (None, 1.0),
        input=first % 2,
        output=last % 2,
        order=1,
    )
