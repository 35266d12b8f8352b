"""Which programs lead from an image to its noise and back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..schedule import NoiseSchedule
from ..solvers import SOLVERS, Program, ddim
from ..solvers.program import unwarned

Factory = Callable[..., Program]
"""factory(schedule, direction=…, **parameters) → Program, as in `SOLVERS`."""

NULL_TEXT = "null-text"
NULL_TEXT_PARAMETERS = ("num_inner_steps", "learning_rate", "early_stop")


@dataclass(frozen=True)
class Plan:
    """A solver on a schedule.

    Attributes:
        solver: its name.
        parameters: its own arguments.
        factory: makes its programs, parameters included.
        schedule: the nodes that are used, N of the grid's where `strength` is below 1.
        to_noise: the program that inverts.
        to_image: the program that comes back: the inverse of `to_noise`, or for a solver without
            one its sampling program.
    """

    solver: str
    parameters: Mapping[str, Any]
    factory: Factory
    schedule: NoiseSchedule
    to_noise: Program
    to_image: Program

    @property
    def reversible(self) -> bool:
        """Whether the way back undoes the way there."""
        return self.to_noise.reversible

    def stopped(self, updates: int) -> Plan:
        """The plan of a run that was interrupted after `updates` updates: the start of a program
        is a program, with an inverse of its own."""
        to_noise = _quietly(
            replace,
            self.to_noise,
            updates=self.to_noise.updates[:updates],
            output=self.to_noise.updates[updates - 1].track,
        )
        calls = [
            sum(update.node is not None for update in program.updates)
            for program in (to_noise, self.to_noise)
        ]
        schedule = self.schedule.cleanest(math.ceil(self.schedule.num_steps * calls[0] / calls[1]))
        if self.reversible:
            to_image = _quietly(to_noise.inverse)
        else:
            to_image = _quietly(self.factory, schedule, direction="sample")
        return replace(self, schedule=schedule, to_noise=to_noise, to_image=to_image)


def make_plan(
    solver: str | Factory, schedule: NoiseSchedule, parameters: Mapping[str, Any]
) -> Plan:
    """The plan of a solver by name or by factory.

    Raises:
        ValueError: an unknown name, or parameters that the solver refuses.

    Warns:
        AmplificationWarning: the inversion magnifies perturbations beyond use.
    """
    name, factory = resolve(solver)
    if name != NULL_TEXT:
        factory = partial(factory, **parameters)
    to_noise = factory(schedule, direction="invert")
    if not isinstance(to_noise, Program):
        raise TypeError(f"solver must return a Program, got {type(to_noise).__name__}")
    if to_noise.reversible:
        to_image = _quietly(to_noise.inverse)
    else:
        to_image = _quietly(factory, schedule, direction="sample")
    return Plan(name, dict(parameters), factory, schedule, to_noise, to_image)


def resolve(solver: str | Factory) -> tuple[str, Factory]:
    """(name, factory)"""
    if solver == NULL_TEXT:
        return NULL_TEXT, ddim
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {[*SOLVERS, NULL_TEXT]}, got {solver!r}")
        return solver, SOLVERS[solver]
    if not callable(solver):
        raise TypeError(f"solver must be a name or a function, got {type(solver).__name__}")
    return getattr(solver, "__name__", type(solver).__name__), solver


def parameter_names(solver: str | Factory) -> set[str]:
    """The solver's own arguments."""
    if solver == NULL_TEXT:
        return set(NULL_TEXT_PARAMETERS)
    signature = inspect.signature(resolve(solver)[1])
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in kinds]
    return set(names[1:]) - {"direction"}


def _quietly(function: Callable[..., Program], *args: Any, **options: Any) -> Program:
    """The amplification of the way back is no concern: it starts from the exact end state."""
    with unwarned():
        return function(*args, **options)
