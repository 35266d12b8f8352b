"""The one-step integrators by name, for the solvers that are built on one."""

from __future__ import annotations

from typing import Literal, get_args

from .dpmpp_2s import dpmpp_2s_step
from .heun import heun_step
from .one_step import Integrator, euler_step

IntegratorName = Literal["ddim", "heun", "dpm++2s"]

_INTEGRATORS: dict[IntegratorName, Integrator] = {
    "ddim": euler_step,
    "heun": heun_step,
    "dpm++2s": dpmpp_2s_step,
}


def integrator_of(name: IntegratorName) -> Integrator:
    """The integrator of that name.

    Raises:
        ValueError: no such integrator.
    """
    if name not in _INTEGRATORS:
        raise ValueError(f"integrator must be one of {get_args(IntegratorName)}, got {name!r}")
    return _INTEGRATORS[name]


def order_of(name: IntegratorName) -> int:
    """Order of convergence of the integrator."""
    return 1 if name == "ddim" else 2
