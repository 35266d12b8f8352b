# SPDX-License-Identifier: Apache-2.0
"""The fixed-point lattice on which a reversible solver is exact to the bit.

A track x is stored as the int32 tensor ``Z = round(x * 2^K)``, where K is the number of fraction
bits. An update adds a rounded increment to Z, an integer addition that the inverse undoes without
error. A factor n/d in front of Z would lose the remainder, so every scaled element carries a
buffer B >= 0 (int64) that keeps it (Maclaurin, Duvenaud, Adams 2015)::

    B <- B*d + (Z mod d);  Z <- floor(Z/d);  Z <- Z*n + (B mod n);  B <- floor(B/n)

This map is a bijection of pairs (Z, B); its inverse is the same with n and d exchanged.

The functions here work on host numbers, once per program. The operators on tensors are in
``inpo_fast.ops``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

__all__ = [
    "DEFAULT_FRAC_BITS",
    "MAX_FRAC_BITS",
    "MAX_RATIO_TERM",
    "buffer_bound",
    "lattice_range",
    "ratio_row",
    "rational",
]

DEFAULT_FRAC_BITS = 20
"""K: range +-2048, resolution 2^-20 (about 1e-6)."""

MAX_FRAC_BITS = 30
MAX_RATIO_TERM = 2**16
"""Largest n or d of a scale n/d."""


def lattice_range(frac_bits: int = DEFAULT_FRAC_BITS) -> float:
    """Return the bound R = 2^(31-K) of the values that the lattice holds: -R <= x < R."""
    if not 1 <= frac_bits <= MAX_FRAC_BITS:
        raise ValueError(f"frac_bits must be in 1..{MAX_FRAC_BITS}, got {frac_bits}")
    return math.ldexp(1.0, 31 - frac_bits)


def rational(a: float, max_term: int = MAX_RATIO_TERM) -> tuple[int, int]:
    """Return (n, d), the best approximation n/d of a > 0 with n and d in 1..max_term.

    "Best" is by continued fractions, in the larger-is-at-most-``max_term`` sense: for a <= 1 the
    error of n/d, for a > 1 the error of d/n is least. The error is usually near 2^-32 and at
    worst 2^-17 (beside a simple fraction); 0.94 gives 47/50 exactly.

    Raises:
        ValueError: a is not finite and positive, or too small or large for such a fraction.
    """
    if not (math.isfinite(a) and a > 0):
        raise ValueError(f"a must be finite and positive, got {a!r}")
    if a > 1:
        # limit_denominator bounds only the denominator, so the larger term must be below.
        d, n = _best_fraction(1 / Fraction(a), max_term)
    else:
        n, d = _best_fraction(Fraction(a), max_term)
    if n == 0 or d == 0:
        raise ValueError(f"a must be in [1/{max_term}, {max_term}], got {a!r}")
    return n, d


def _best_fraction(value: Fraction, max_term: int) -> tuple[int, int]:
    best = value.limit_denominator(max_term)
    return best.numerator, best.denominator


def ratio_row(n: int, d: int) -> npt.NDArray[np.int64]:
    """Return the row (n, d, mul_n, mul_d), int64 [4], that kernels read to scale by n/d.

    ``mul_v = floor((2^64 - 1) / v)``, its bits reinterpreted as int64. For 0 <= X < 2^63 the
    high half of the product X * mul_v is floor(X/v) or one less, so a division by v is one
    multiplication and one correction.

    Raises:
        TypeError: n or d is not an integer.
        ValueError: n or d is outside 1..2^16.
    """
    for name, value in (("n", n), ("d", d)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 1 <= value <= MAX_RATIO_TERM:
            raise ValueError(f"{name} must be in 1..{MAX_RATIO_TERM}, got {value}")
    multipliers = [(2**64 - 1) // int(n), (2**64 - 1) // int(d)]
    return np.array([int(n), int(d), *multipliers], dtype=np.uint64).view(np.int64)


def buffer_bound(ratios: Iterable[tuple[int, int]], initial: int = 0) -> int:
    """Return the largest value that the buffer can reach while a program runs.

    Args:
        ratios: the scales (n, d) of the updates of one track, in the order in which they run.
            The inverse run passes through the same values, so one direction is enough.
        initial: the largest buffer at the start.

    The bound counts the intermediate value B*d + (Z mod d), which must stay below 2^63 for a
    program to be valid: ``buffer_bound(...) < 2**63``.
    """
    buffer = largest = int(initial)
    for n, d in ratios:
        # B*d + (Z mod d) <= B*d + d - 1, then divided by n.
        combined = buffer * int(d) + int(d) - 1
        largest = max(largest, combined)
        buffer = combined // int(n)
    return max(largest, buffer)
