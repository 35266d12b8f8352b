"""Checks of arguments that several families share; each names the argument and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def one_or_each(name: str, value: Any, count: int) -> float | tuple[float, ...]:
    """One finite number, or `count` of them.

    Raises:
        ValueError: anything else.
    """
    single = not isinstance(value, Iterable)
    values = [value] if single else list(value)
    numbers = all(isinstance(w, Real) and not isinstance(w, bool) for w in values)
    if not numbers or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite numbers, one or {count}, got {value!r}")
    if single:
        return float(values[0])
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, got a list of {len(values)}")
    return tuple(float(w) for w in values)


def require_integer(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no integer within low … high.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be within {low} … {high}, got {value}")


def require_pair(name: str, value: Any) -> None:
    """Refuse what is not two integers, rows first.

    Raises:
        ValueError: naming the argument.
    """
    items = list(value) if isinstance(value, (list, tuple)) else []
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in items)
    if len(items) != 2 or not whole:
        raise ValueError(f"{name} must be two integers, height first, got {value!r}")
