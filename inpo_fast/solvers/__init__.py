"""Solvers as programs: functions from a schedule to a list of reversible updates."""

from __future__ import annotations

from collections.abc import Callable

from .bdia import bdia
from .ddim import ddim
from .edict import edict
from .obelm import obelm
from .program import AmplificationWarning, Direction, Program, Stage, Update

SOLVERS: dict[str, Callable[..., Program]] = {
    "ddim": ddim,
    "bdia": bdia,
    "edict": edict,
    "obelm": obelm,
}
"""Solver functions by name; each takes a schedule, its own parameters and `direction`."""

__all__ = [
    "SOLVERS",
    "AmplificationWarning",
    "Direction",
    "Program",
    "Stage",
    "Update",
    "bdia",
    "ddim",
    "edict",
    "obelm",
]
