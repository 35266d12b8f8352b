# SPDX-License-Identifier: Apache-2.0
"""The status words that operators write on the device, and the errors they become on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "STATUS_NONFINITE",
    "STATUS_RANGE",
    "LatticeRangeError",
    "NonFiniteError",
    "StateError",
    "check_status",
    "new_status",
]

STATUS_RANGE = 1
"""A lattice value left int32; it was stored saturated."""

STATUS_NONFINITE = 2
"""NaN or infinity: in the increment of a lattice update, or in the result of a float update."""


class StateError(ArithmeticError):
    """A state went bad during a run. ``update`` is the index of the first update at fault."""

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message)
        self.update = update


class LatticeRangeError(StateError):
    """A value left the range of the lattice."""


class NonFiniteError(StateError):
    """A model output or a state is NaN or infinite."""


def new_status(num_updates: int, device: torch.device | str | None = None) -> Tensor:
    """Return zeros, int32 [num_updates, 1]: one status word for each update of a run.

    Row i, int32 [1], is the ``status`` argument of update i. Operators OR their bits into it and
    never clear it, so the whole run is judged by one read at its end (``check_status``).
    """
    return torch.zeros(num_updates, 1, dtype=torch.int32, device=device)


def check_status(status: Tensor, describe: Callable[[int], str] | None = None) -> None:
    """Read the status words of a run, once, and raise if an update went wrong.

    Args:
        status: int32, one word for each update in order, any shape.
        describe: gives the words for update i, such as "step 12, t=341". By default the index.

    Raises:
        NonFiniteError: the first update at fault met NaN or infinity.
        LatticeRangeError: the first update at fault left the lattice range.
    """
    words: list[int] = status.flatten().tolist()  # [num_updates]
    for update, word in enumerate(words):
        if word == 0:
            continue
        where = f"update {update}" if describe is None else describe(update)
        # A NaN is the cause when both bits are set: it was replaced by 0, and nothing else is.
        if word & STATUS_NONFINITE:
            raise NonFiniteError(
                f"{where}: the model output or the state is NaN or infinite", update
            )
        if word & STATUS_RANGE:
            raise LatticeRangeError(
                f"{where}: the state left the range of the lattice; use fewer frac_bits, a"
                " smaller input, or a solver with less amplification",
                update,
            )
        raise ValueError(f"status must hold bits 1 and 2 only, got {word} for {where}")
