"""The lattice format: ranges, rational scales, multipliers, the buffer bound and the bijection."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
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
    small, large = sorted((n, d))
    if n <= d:
        high, digit = divmod(b, small)
        # the remainder that the expansion of some z leaves is digit 0 ...
        shift = -z * small % large
        t = z * small + (digit + (shift if shift < small else 0)) % small
        # ... so that it meets an empty buffer
        return t // large, high * large + t % large
    high, digit = divmod(b, large)
    t = z * large + digit
    shift = (t % small - digit) % large
    return t // small, high * small + (t - (shift if shift < small else 0)) % small


def test_lattice_range():
    assert lattice_range() == 2048.0
    assert lattice_range(30) == 2.0
    for bits in (0, 31, -1):
        with pytest.raises(ValueError, match=r"frac_bits must be in 1\.\.30"):
            lattice_range(bits)


@given(st.fractions(min_value=Fraction(1, 2**16), max_value=2**16) | st.floats(2**-16, 2**16))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_rational_is_the_best(value):
    best, exact = rational(value), Fraction(value)
    n, d = best.as_integer_ratio()
    assert 1 <= n <= MAX_RATIO_TERM and 1 <= d <= MAX_RATIO_TERM
    limit = MAX_RATIO_TERM if exact <= 1 else max(1, int(MAX_RATIO_TERM / exact))
    for q in {1, 2, 3, 7, 100, limit // 3, limit // 2, limit - 1, limit}:
        if 1 <= q <= limit:
            # the nearest fraction with this denominator is no nearer
            near = Fraction(round(exact * q), q)
            assert near == 0 or abs(exact - best) <= abs(exact - near)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.94, "47/50"),
        (0.93, "93/100"),
        (1, "1"),
        (15 / 16, "15/16"),
        (2.5, "5/2"),
        (1e-9, "1/65536"),
    ],
)
def test_rational_of_decimals(value, expected):
    assert str(rational(value)) == expected


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), np.float64(0.94)])
def test_rational_takes_numbers_of_numpy(value):
    best = rational(value)
    assert best == rational(value.item())
    assert all(type(part) is int for part in best.as_integer_ratio())


@pytest.mark.parametrize("value", [0, -1, 2**16 + 1])
def test_rational_refuses(value):
    with pytest.raises(ValueError, match="a must be in"):
        rational(value)


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


@given(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**46),
    st.integers(1, 2**16),
    st.integers(1, 2**16),
)
def test_scale_is_within_a_unit_of_the_product(z, b, n, d):
    scaled, _ = scale(z, b, n, d)
    assert abs(scaled - Fraction(z * n, d)) < 1 + Fraction(n, d)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 2**16), st.integers(1, 2**16))
def test_growing_keeps_an_empty_buffer_empty(z, n, d):
    """An image that grows on its way to noise comes back with nothing to remember."""
    n, d = max(n, d), min(n, d)
    grown, kept = scale(z, 0, n, d)
    assert kept == 0
    assert scale(grown, kept, d, n) == (z, 0)


@given(
    st.lists(st.fractions(Fraction(1, 64), 64, max_denominator=2**10), max_size=12),
    st.integers(-(2**31), 2**31 - 1),
)
def test_buffer_bound_holds(ratios, z):
    bound, b = buffer_bound(ratios), 0
    for ratio in ratios:
        z, b = scale(z, b, *ratio.as_integer_ratio())
        assert b <= bound
        z = max(min(z, 2**31 - 1), -(2**31))


def test_buffer_bound_of_a_usual_run():
    # 50 steps at 15/16 lose 50 * log2(16/15) = 4.7 bits; at worst every one of the 50 digits is 15,
    # a geometric sum: 15 * ((16/15)^50 - 1) / (16/15 - 1)
    assert 2**4.7 <= buffer_bound([Fraction(15, 16)] * 50) < 225 * (16 / 15) ** 50
    assert buffer_bound([Fraction(16, 15)] * 50) == 0
