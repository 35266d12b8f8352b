"""The lattice format: ranges, rational scales, multipliers, the buffer bound and the bijection."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inpo_fast.lattice import (
    MAX_RATIO_TERM,
    buffer_bound,
    lattice_range,
    ratio_row,
    rational,
)


def scale(z: int, b: int, n: int, d: int) -> tuple[int, int]:
    """The bijection in Python integers."""
    b = b * d + z % d
    z = z // d
    z = z * n + b % n
    return z, b // n


def test_lattice_range():
    assert lattice_range() == 2048.0
    assert lattice_range(30) == 2.0
    for bits in (0, 31, -1):
        with pytest.raises(ValueError, match=r"frac_bits must be in 1\.\.30"):
            lattice_range(bits)


@pytest.mark.parametrize(
    ("a", "expected"),
    [(1.0, (1, 1)), (0.94, (47, 50)), (0.93, (93, 100)), (15 / 16, (15, 16)), (4 / 3, (4, 3))],
)
def test_rational_finds_simple_fractions(a, expected):
    assert rational(a) == expected


@given(st.floats(1 / MAX_RATIO_TERM, MAX_RATIO_TERM), st.integers(0, 2**32))
def test_rational_is_the_best_fraction(a, seed):
    n, d = rational(a)
    assert 1 <= n <= MAX_RATIO_TERM and 1 <= d <= MAX_RATIO_TERM
    value, low, high = (Fraction(a), n, d) if a <= 1 else (1 / Fraction(a), d, n)
    error = abs(Fraction(low, high) - value)
    assert error <= Fraction(1, MAX_RATIO_TERM)
    for q in np.random.default_rng(seed).integers(1, MAX_RATIO_TERM, 20).tolist():
        assert error <= abs(Fraction(round(value * q), q) - value)


@pytest.mark.parametrize("a", [0.0, -1.0, float("nan"), float("inf"), 1e-9, 1e9])
def test_rational_refuses(a):
    with pytest.raises(ValueError, match="a must be"):
        rational(a)


@pytest.mark.parametrize(
    ("n", "d", "error", "words"),
    [
        (0, 1, ValueError, "n must be in"),
        (1, 2**16 + 1, ValueError, "d must be in"),
        (1.0, 1, TypeError, "n must be an int"),
        (1, True, TypeError, "d must be an int"),
    ],
)
def test_ratio_row_refuses(n, d, error, words):
    with pytest.raises(error, match=words):
        ratio_row(n, d)


def test_multipliers_divide_every_63_bit_number():
    """The multiplier, one correction: for every divisor, at random and at the edges."""
    rng = np.random.default_rng(0)
    for v in range(1, MAX_RATIO_TERM + 1):
        row = ratio_row(v, v)
        multiplier = int(row.view(np.uint64)[2])
        assert row[0] == row[1] == v and row[2] == row[3]
        random = int(rng.integers(0, 2**63, dtype=np.uint64))
        edge = random - random % v  # a multiple
        for x in (random, edge, max(edge - 1, 0), 2**63 - 1, 0, v - 1, v):
            quotient = x * multiplier >> 64
            remainder = x - quotient * v
            if remainder >= v:
                quotient, remainder = quotient + 1, remainder - v
            assert (quotient, remainder) == divmod(x, v)


@given(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**46),
    st.integers(1, 2**16),
    st.integers(1, 2**16),
)
def test_scale_is_undone_by_the_exchanged_scale(z, b, n, d):
    scaled, kept = scale(z, b, n, d)
    assert kept >= 0
    assert scale(scaled, kept, d, n) == (z, b)


def test_scale_is_a_bijection():
    """All pairs of a box go to different pairs, and the box is reached from everywhere."""
    for n, d in ((3, 4), (4, 3), (1, 5), (5, 1), (7, 7)):
        pairs = {(z, b) for z in range(-40, 40) for b in range(40)}
        assert len({scale(z, b, n, d) for z, b in pairs}) == len(pairs)
        assert all(scale(*scale(z, b, d, n), n, d) == (z, b) for z, b in pairs)


def test_scale_from_zero_keeps_no_information_while_it_shrinks_back():
    """From B = 0 the inverse of a shrinking scale leaves B = 0."""
    for z in (-(2**31), -7, 0, 5, 2**31 - 1):
        assert scale(z, 0, 100, 93)[1] == 0


@given(
    st.lists(st.tuples(st.integers(1, 2**16), st.integers(1, 2**16)), max_size=12),
    st.integers(0, 2**20),
    st.integers(-(2**31), 2**31 - 1),
)
def test_buffer_bound_holds(ratios, b, z):
    bound = buffer_bound(ratios, initial=b)
    for n, d in ratios:
        assert b * d + z % d <= bound
        z, b = scale(z, b, n, d)
        assert b <= bound
        z = max(min(z, 2**31 - 1), -(2**31))


def test_buffer_bound_of_a_usual_run():
    # 50 steps at 15/16 lose 50 * log2(16/15) = 4.7 bits, the intermediate value 4 more.
    assert buffer_bound([(15, 16)] * 50) < 2**13
