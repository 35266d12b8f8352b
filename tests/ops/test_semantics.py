"""What the operators compute, against Python's own integers and floats."""

import math
import struct

import pytest
import torch

from inpo_fast import ops
from inpo_fast.lattice import ratio_row
from tests.ops import cases
from tests.test_lattice import scale as scale_integers

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def increment(y, m1, m2, coef):
    _, b, c1, c2 = coef
    return (b * y + c1 * m1) + c2 * m2


def integers(values):
    return torch.tensor([values], dtype=torch.int32)


def zeros(dtype=torch.int32):
    return torch.zeros(1, 1, dtype=dtype)


def word():
    return ops.new_status(1)[0]


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_affine_update_is_one_rounded_float64_expression(impl, dtype):
    rng = cases.generator(0)
    x, y, m1, m2 = (cases.floats((3, 50), dtype, rng) for _ in range(4))
    coef = cases.rows(3, F64 if dtype == F64 else F32, rng)
    result = ops.affine_update(x, y, coef, m1, m2, impl=impl)
    inverse = ops.affine_inverse(x, y, coef, m1, m2, impl=impl)
    expected = torch.empty(3, 50, dtype=F64)
    expected_inverse = torch.empty(3, 50, dtype=F64)
    for i in range(3):
        row = coef[i].tolist()
        for j in range(50):
            delta = increment(y[i, j].item(), m1[i, j].item(), m2[i, j].item(), row)
            expected[i, j] = row[0] * x[i, j].item() + delta
            expected_inverse[i, j] = (x[i, j].item() - delta) / row[0]
    if dtype != F64:
        expected, expected_inverse = expected.to(F32), expected_inverse.to(F32)
    assert torch.equal(result, expected.to(dtype))
    assert torch.equal(inverse, expected_inverse.to(dtype))


@pytest.mark.parametrize("m_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("frac_bits", [1, 20, 30])
def test_lattice_updates_in_python_integers(impl, m_dtype, frac_bits):
    rng = cases.generator(1)
    z, y = (cases.lattice((2, 60), rng, bits=28) for _ in range(2))
    buffer = torch.randint(0, 2**40, (2, 60), generator=rng)
    m1, m2 = (cases.floats((2, 60), m_dtype, rng) / 2**frac_bits for _ in range(2))
    coef, ratio = cases.rows(2, F32, rng), cases.ratios(2, rng)
    options = {"frac_bits": frac_bits, "impl": impl}
    status = ops.new_status(4)
    got = [
        ops.lattice_update(z, y, coef, m1, m2, status=status[0], **options),
        ops.lattice_inverse(z, y, coef, m1, m2, status=status[1], **options),
        *ops.lattice_scaled_update(z, buffer, y, coef, ratio, m1, m2, status=status[2], **options),
        *ops.lattice_scaled_inverse(z, buffer, y, coef, ratio, m1, m2, status=status[3], **options),
    ]
    outside = [False] * 4

    def saturate(value, k):
        outside[k] |= not INT32_MIN <= value <= INT32_MAX
        return min(max(value, INT32_MIN), INT32_MAX)

    for i in range(2):
        row, (n, d, _, _) = coef[i].tolist(), ratio[i].tolist()
        for j in range(60):
            value = float32(float32(y[i, j].item()) * 2.0**-frac_bits)
            delta = increment(value, m1[i, j].item(), m2[i, j].item(), row)
            q = round(delta * 2**frac_bits)  # half to even
            zi, b = z[i, j].item(), buffer[i, j].item()
            scaled, kept = scale_integers(zi, b, n, d)
            back, back_kept = scale_integers(zi - q, b, d, n)
            expected = [
                saturate(zi + q, 0),
                saturate(zi - q, 1),
                saturate(scaled + q, 2),
                kept,
                saturate(back, 3),
                back_kept,
            ]
            assert [t[i, j].item() for t in got] == expected
    assert [bool(s & ops.STATUS_RANGE) for s in status.flatten().tolist()] == outside


@pytest.mark.parametrize("frac_bits", [1, 8, 20, 30])
def test_encode_and_decode_are_exact_where_float32_is(impl, frac_bits):
    """Every lattice point of 24 bits returns; a float returns to half a lattice unit."""
    one = torch.ones(())
    rng = cases.generator(2)
    z = cases.lattice((4, 1000), rng, bits=24)
    status = word()
    for dtype in (F64, F32):
        x = ops.lattice_decode(z, one, dtype, frac_bits=frac_bits, impl=impl)
        assert torch.equal(x.to(F64), z.to(F64) * 2.0**-frac_bits)
        back = ops.lattice_encode(x, one, frac_bits=frac_bits, status=status, impl=impl)
        assert torch.equal(back, z)
    x = cases.floats((4, 1000), F64, rng)
    back = ops.lattice_encode(x, one, frac_bits=20, status=status, impl=impl)
    assert torch.equal(back.to(F64), torch.round(x * 2.0**20))
    assert status.item() == 0


def test_decode_rounds_to_float32_before_the_model_dtype(impl):
    """One lattice value above 2^24: its float32 rounding shows, scaled or not."""
    z = integers([2**30 + 33, -(2**30) - 97, INT32_MAX, INT32_MIN])
    scale = torch.tensor([1.1])
    for copies in (1, 2):
        got = ops.lattice_decode(z, scale, F64, frac_bits=20, copies=copies, impl=impl)
        values = [float32(float32(float(v)) / 2**20 * scale.item()) for v in z[0].tolist()]
        assert got.tolist() == [values] * copies
        half = ops.lattice_decode(z, scale, BF16, frac_bits=20, copies=copies, impl=impl)
        assert torch.equal(half, torch.tensor([values] * copies).to(BF16))


def test_rounding_is_half_to_even(impl):
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25]])
    z = torch.zeros(1, 7, dtype=torch.int32)
    coef = torch.tensor([1.0, 0.0, 0.5, 0.0])
    got = ops.lattice_update(z, z, coef, halves, frac_bits=1, status=word(), impl=impl)
    assert got.tolist() == [[0, 2, 2, 0, -2, -2, 0]]
    one = torch.ones(1)
    got = ops.lattice_encode(halves / 2, one, frac_bits=1, status=word(), impl=impl)
    assert got.tolist() == [[0, 2, 2, 0, -2, -2, 0]]


@pytest.mark.parametrize(
    ("z", "q", "stored", "flag"),
    [
        (INT32_MAX, 0, INT32_MAX, 0),
        (INT32_MIN, 0, INT32_MIN, 0),
        (INT32_MAX - 1, 1, INT32_MAX, 0),
        (INT32_MIN + 1, -1, INT32_MIN, 0),
        (INT32_MAX, 1, INT32_MAX, ops.STATUS_RANGE),
        (INT32_MIN, -1, INT32_MIN, ops.STATUS_RANGE),
        (INT32_MAX, -(2**32) + 1, INT32_MIN, 0),
        (INT32_MIN, 2**32 - 1, INT32_MAX, 0),
        (INT32_MIN, 2**33, INT32_MAX, ops.STATUS_RANGE),
        (0, 2**49, INT32_MAX, ops.STATUS_RANGE),
        (0, -(2.0**52), INT32_MIN, ops.STATUS_RANGE),
        (0, 2.0**63, INT32_MAX, ops.STATUS_RANGE),
        (0, -(2.0**64), INT32_MIN, ops.STATUS_RANGE),
        (0, 2.0**120, INT32_MAX, ops.STATUS_RANGE),
        (5, math.nan, 5, ops.STATUS_NONFINITE),
        (5, math.inf, 5, ops.STATUS_NONFINITE),
        (5, -math.inf, 5, ops.STATUS_NONFINITE),
    ],
)
def test_the_edges_of_int32(impl, z, q, stored, flag):
    """Increments as the sum of a model output and a second one, so that 2^32 - 1 is exact."""
    near = float(2 ** math.floor(math.log2(abs(q)))) if q and math.isfinite(q) else q
    m1 = torch.tensor([[math.copysign(near, q) if q else 0.0]], dtype=F32)
    m2 = torch.tensor([[q - m1.item() if math.isfinite(q) else 0.0]], dtype=F32)
    if math.isfinite(q) and m1.item() + m2.item() != q:
        # q = m1 + m2 needs more than 24 bits in m2: split it the other way round.
        m1, m2 = (
            torch.tensor([[math.copysign(2.0**32, q)]]),
            torch.tensor([[-1.0 if q > 0 else 1.0]]),
        )
        assert m1.item() + m2.item() == q
    half = torch.tensor([1.0, 0.0, 0.5, 0.5])  # frac_bits=1 doubles it
    state, other = integers([z]), zeros()
    status = word()
    got = ops.lattice_update(state, other, half, m1, m2, frac_bits=1, status=status, impl=impl)
    assert (got.item(), status.item()) == (stored, flag)
    status = word()
    got = ops.lattice_inverse(state, other, half, -m1, -m2, frac_bits=1, status=status, impl=impl)
    assert (got.item(), status.item()) == (stored, flag)
    unit = torch.from_numpy(ratio_row(1, 1))
    for name, sign in (("lattice_scaled_update", 1), ("lattice_scaled_inverse", -1)):
        status = word()
        got, buffer = getattr(ops, name)(
            state,
            zeros(torch.int64),
            other,
            half,
            unit,
            sign * m1,
            sign * m2,
            frac_bits=1,
            status=status,
            impl=impl,
        )
        assert (got.item(), buffer.item(), status.item()) == (stored, 0, flag)


@pytest.mark.parametrize(("n", "d"), [(1, 65536), (65536, 1), (65535, 65536), (1, 1), (93, 100)])
@pytest.mark.parametrize("z", [INT32_MIN, INT32_MIN + 1, -1, 0, 1, INT32_MAX])
def test_scale_at_the_edges(impl, n, d, z):
    """With no increment, against Python integers, for buffers up to the largest that is valid."""
    for b in (0, 1, 2**46, (2**63 - d) // d):
        state, buffer = integers([z]), torch.tensor([[b]])
        ratio = torch.from_numpy(ratio_row(n, d))
        coef = torch.tensor([1.0, 0.0, 0.0, 0.0])
        status = word()
        got, kept = ops.lattice_scaled_update(
            state, buffer, zeros(), coef, ratio, status=status, impl=impl
        )
        expected, expected_kept = scale_integers(z, b, n, d)
        assert kept.item() == expected_kept
        fits = INT32_MIN <= expected <= INT32_MAX
        assert status.item() == (0 if fits else ops.STATUS_RANGE)
        assert got.item() == min(max(expected, INT32_MIN), INT32_MAX)
        if fits:
            back, back_kept = ops.lattice_scaled_inverse(
                got, kept, zeros(), coef, ratio, status=status, impl=impl
            )
            assert (back.item(), back_kept.item(), status.item()) == (z, b, 0)


@pytest.mark.parametrize(
    ("n", "d"), [(65536, 1), (65535, 1), (6493, 4), (9, 1), (40503, 5003), (65536, 65535), (1, 9)]
)
def test_what_an_increment_brings_back_from_outside_the_lattice_is_undone(impl, n, d):
    """Z n/d may be up to 2^47, and the update ends inside all the same."""
    rng = cases.generator(3)
    # float32 rounds Z and 1 - n/d by up to 2^-24 of themselves, and their product is up to 2^47
    far = 2**31 - 2**26
    z = torch.randint(-far, far + 1, (1, 65), generator=rng, dtype=torch.int32)
    z[0, :2] = torch.tensor([-far, far])
    buffer = torch.randint(0, 2**30, z.shape, generator=rng)
    ratio = torch.from_numpy(ratio_row(n, d))
    coef = torch.tensor([1.0, 1 - n / d, 0.0, 0.0])
    status = word()
    there = ops.lattice_scaled_update(z, buffer, z, coef, ratio, status=status, impl=impl)
    assert (there[0] - z).abs().max() < 2**26
    back = ops.lattice_scaled_inverse(*there, z, coef, ratio, status=status, impl=impl)
    assert torch.equal(back[0], z) and torch.equal(back[1], buffer) and status.item() == 0


def test_encode_flags(impl):
    one = torch.ones(())
    for value, scale, stored, flag in (
        (2047.9999, 1.0, round(float32(2047.9999) * 2**20), 0),
        (2048.0, 1.0, INT32_MAX, ops.STATUS_RANGE),
        (-2048.0, 1.0, INT32_MIN, 0),
        (-2048.01, 1.0, INT32_MIN, ops.STATUS_RANGE),
        (math.nan, 1.0, 0, ops.STATUS_NONFINITE),
        (-math.inf, 1.0, 0, ops.STATUS_NONFINITE),
        (1.0, math.inf, 0, ops.STATUS_NONFINITE),
    ):
        status = word()
        x = torch.tensor([value], dtype=F32)
        got = ops.lattice_encode(x, one * scale, frac_bits=20, status=status, impl=impl)
        assert (got.item(), status.item()) == (stored, flag)
    status = word()
    huge = torch.tensor([1e308], dtype=F64)
    got = ops.lattice_encode(huge, one, frac_bits=30, status=status, impl=impl)
    assert (got.item(), status.item()) == (INT32_MAX, ops.STATUS_RANGE)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_float_updates_flag_what_is_not_finite(impl, dtype):
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64 if dtype == F64 else F32)
    x = torch.ones(2, 700, dtype=dtype)
    for name in ("affine_update", "affine_inverse", "affine_update_", "affine_inverse_"):
        for value in (math.nan, math.inf, torch.finfo(dtype).max):
            m = torch.zeros(2, 700, dtype=F64 if dtype == F64 else F32)
            m[1, 699] = value
            status = word()
            state = x.clone() if name.endswith("_") else x
            finite = getattr(ops, name)(state, x, coef, m, status=status, impl=impl).isfinite()
            expected = 0 if finite.all() else ops.STATUS_NONFINITE
            assert status.item() == expected
            assert expected or value == torch.finfo(dtype).max
    # Overflow by the rounding to a 16-bit state counts too.
    if dtype == F16:
        status = word()
        ops.affine_update(x, x, coef, torch.full((2, 700), 1e6), status=status, impl=impl)
        assert status.item() == ops.STATUS_NONFINITE


def test_status_names_the_first_update_at_fault(impl):
    status = ops.new_status(5)
    z = torch.zeros(1, 4, dtype=torch.int32)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for i in range(5):
        m = torch.zeros(1, 4)
        if i >= 2:
            m[0, 1] = 1e9
        if i == 4:
            m[0, 2] = math.nan
        ops.lattice_update_(z, z.clone(), coef, m, status=status[i], impl=impl)
    assert status.flatten().tolist() == [0, 0, 1, 1, 3]
    with pytest.raises(ops.LatticeRangeError, match=r"step three: .* left the range") as caught:
        ops.check_status(status, lambda i: f"step {['one', 'two', 'three'][i]}")
    assert caught.value.update == 2
    with pytest.raises(ops.NonFiniteError, match=r"update 0: .* NaN or infinite"):
        ops.check_status(status[4:])
    ops.check_status(status[:2])
    with pytest.raises(ValueError, match="status must hold bits 1 and 2 only, got 8"):
        ops.check_status(torch.tensor([0, 8], dtype=torch.int32))
    # A good update does not clear a bit.
    m = torch.zeros(1, 4)
    ops.lattice_update(z * 0, z, coef, m, status=status[2], impl=impl)
    assert status[2].item() == 1


def test_in_place_returns_its_argument(impl):
    rng = cases.generator(3)
    x, y, m = (cases.floats((2, 3), F32, rng) for _ in range(3))
    coef = cases.rows(None, F32, rng)
    expected = ops.affine_update(x, y, coef, m, impl=impl)
    assert ops.affine_update_(x, y, coef, m, impl=impl) is x
    assert torch.equal(x, expected)
    z, zy = (cases.lattice((2, 3), rng) for _ in range(2))
    buffer, ratio = torch.zeros(2, 3, dtype=torch.int64), cases.ratios(None, rng)
    got = ops.lattice_scaled_inverse_(z, buffer, zy, coef, ratio, m, status=word(), impl=impl)
    assert got[0] is z and got[1] is buffer


def test_x_may_be_its_own_other_track(impl):
    """Whole aliases are read before they are written."""
    x = cases.floats((2, 700), F32, cases.generator(4))
    coef = torch.tensor([2.0, 3.0, 0.5, 0.0])
    expected = ops.affine_update(x, x, coef, x, impl=impl)
    ops.affine_update_(x, x, coef, x, impl=impl)
    assert torch.equal(x, expected)
