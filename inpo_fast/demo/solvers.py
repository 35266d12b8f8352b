"""The solvers that the demo compares, by the names of its tables."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from ..schedule import NoiseSchedule
from ..solvers import Program, bdia, ddim, edict, obelm
from ..solvers.program import unwarned

SOLVERS: dict[str, Callable[..., Program]] = {
    "ddim": ddim,
    "edict 0.93": partial(edict, p=Fraction(93, 100)),
    "bdia 15/16": partial(bdia, gamma=Fraction(15, 16)),
    "bdia 1": partial(bdia, gamma=1),
    "obelm": obelm,
}
"""Name to solver; each takes a schedule and `direction`."""


class RoundTrip(NamedTuple):
    """A program from image to noise and the one that leads back."""

    to_noise: Program
    to_image: Program
    exact: bool
    """Whether the way back is the inverse of the way there. DDIM has no inverse: it comes back by
    sampling."""


def round_trip(solver: str, schedule: NoiseSchedule) -> RoundTrip:
    """Both directions of `solver`. Reports print the amplification, so its warning is silenced."""
    with unwarned():
        to_noise = SOLVERS[solver](schedule, direction="invert")
        if not to_noise.reversible:
            return RoundTrip(to_noise, SOLVERS[solver](schedule, direction="sample"), False)
        return RoundTrip(to_noise, to_noise.inverse(), True)
