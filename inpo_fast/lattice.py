# SPDX-License-Identifier: Apache-2.0
"""The fixed-point lattice on which a reversible solver is exact to the bit.

A track x is stored as the int32 tensor ``Z = round(x * 2^K)``, where K is the number of fraction
bits. An update adds a rounded increment to Z, an integer addition that the inverse undoes without
error. A factor n/d in front of Z would lose the remainder, so every scaled element carries a
buffer B >= 0 (int64) that keeps it (after Maclaurin, Duvenaud, Adams 2015). For p/q <= 1, with
floor division and T = Z*p + b,

    (h, b) = (B div p, (B mod p + s) mod p);  Z <- T div q;  B <- h*q + T mod q

is a bijection on pairs (Z, B) for any shift s that depends on Z*p alone; its inverse scales by q/p.
Both stay within one unit and one times the factor of the exact product, for any p and q. The shift
is s = -Z*p mod q where that is below p and else 0. With it a factor q/p >= 1 keeps B = 0 at 0: the
image of an expansion is met again by the contraction with nothing to remember.

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
    "MAX_BUFFER",
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

MAX_BUFFER = 2**46
"""Largest buffer: times a term it stays below 2^63."""


def lattice_range(frac_bits: int = DEFAULT_FRAC_BITS) -> float:
    """Return the bound R = 2^(31-K) of the values that the lattice holds: -R <= x < R."""
    if type(frac_bits) is not int:
        raise TypeError(f"frac_bits must be an int, got {frac_bits!r}")
    if not 1 <= frac_bits <= MAX_FRAC_BITS:
        raise ValueError(f"frac_bits must be in 1..{MAX_FRAC_BITS}, got {frac_bits}")
    return math.ldexp(1.0, 31 - frac_bits)


def rational(value: float | Fraction) -> Fraction:
    """Return the best rational n/d to `value` with n and d in 1..2^16 (continued fractions).

    The value may be a number of NumPy, too. The error is usually near 2^-32 and at worst 2^-17
    (beside a simple fraction); 0.94 gives 47/50 exactly. A value too small for such a fraction
    gives 1/2^16, which can still be inverted.

    Raises:
        ValueError: `value` is not in (0, 2^16].
    """
    if not 0 < value <= MAX_RATIO_TERM:
        raise ValueError(f"a must be in (0, {MAX_RATIO_TERM}], got {float(value)}")
    exact = Fraction(value.item() if isinstance(value, np.generic) else value)
    limit = MAX_RATIO_TERM if exact <= 1 else max(1, int(MAX_RATIO_TERM / exact))
    best = exact.limit_denominator(limit)
    return best if best else Fraction(1, MAX_RATIO_TERM)


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


def buffer_bound(ratios: Iterable[Fraction]) -> int:
    """Return the largest value that an empty buffer can reach while a track is scaled.

    Args:
        ratios: the factors n/d of the updates of one track, in the order in which they run. The
            inverse run passes through the same values, so one direction is enough.
    """
    bound = largest = 0
    for ratio in ratios:
        n, d = ratio.as_integer_ratio()
        # a digit base n becomes a digit base d; growing leaves an empty buffer empty
        bound = 0 if n >= d and bound == 0 else bound // n * d + d - 1
        largest = max(largest, bound)
    return largest
