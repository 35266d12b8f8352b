"""Solvers as programs: functions from a schedule to a list of reversible updates."""

from __future__ import annotations

from collections.abc import Callable

from .bdia import bdia
from .ddim import ddim
from .dpmpp_2m import dpmpp_2m
from .dpmpp_2s import dpmpp_2s
from .edict import edict
from .heun import heun
from .mccallum_foster import mccallum_foster
from .obelm import obelm
from .program import AmplificationWarning, Direction, Program, Stage, Update

SOLVERS: dict[str, Callable[..., Program]] = {
    "ddim": ddim,
    "bdia": bdia,
    "edict": edict,
    "obelm": obelm,
    "mccallum_foster": mccallum_foster,
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
    "dpmpp_2m",
    "dpmpp_2s",
    "edict",
    "heun",
    "mccallum_foster",
    "obelm",
]
