"""Every native kernel gives the bits and the layout of the reference."""

import pytest
import torch

from inpo_fast.ops.reference import STATUS_NONFINITE
from inpo_fast.ops.registration import OPS, REFERENCE
from tests.ops import cases, equality
from tests.ops.equality import BF16, F16, F32, status


def assert_same(calls):
    for call in calls:
        equality.assert_same(call, (OPS, "cpu"))


every_layout = pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
every_dtype = pytest.mark.parametrize("dtype", equality.DTYPES, ids=str)


@every_layout
@every_dtype
@pytest.mark.parametrize("inverse", [False, True])
def test_affine(native, inverse, dtype, layout):
    assert_same(equality.affine(dtype, layout, inverse))


@every_layout
@pytest.mark.parametrize("m_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_lattice(native, inverse, m_dtype, layout):
    assert_same(equality.lattice(m_dtype, layout, inverse))


@every_layout
@every_dtype
def test_encode_and_decode(native, dtype, layout):
    assert_same(equality.encode_and_decode(dtype, layout))


@every_layout
@every_dtype
def test_preference_backward(native, dtype, layout):
    assert_same(equality.preference_backward(dtype, layout))


def test_operands_of_different_layouts(native):
    assert_same(equality.different_layouts())


def test_other_numbers_of_dimensions(native):
    assert_same(equality.other_dimensions())


def test_constants_with_strides(native):
    assert_same(equality.strided_constants())


@every_dtype
def test_special_values(native, dtype):
    assert_same(equality.special_values(dtype))


def test_every_16_bit_value(native):
    assert_same(equality.every_16_bit_value())


def test_large_tensors_on_any_number_of_threads(native):
    rng = cases.generator(7)
    shape = (3, 2, 101, 131)  # two threads, off every block size
    m = cases.floats(shape, BF16, rng)
    x, y = (cases.floats(shape, F32, rng) for _ in range(2))
    z, zy = (cases.lattice(shape, rng) for _ in range(2))
    buffer = torch.randint(0, 2**40, shape, generator=rng)
    before = torch.get_num_threads()
    for batch in (None, 3):
        coef, ratio = cases.rows(batch, F32, rng), cases.ratios(batch, rng)
        for name, operands in (
            ("affine_update", [x, y, m, m, coef, status()]),
            ("affine_inverse", [x, y, m, None, coef, status()]),
            ("lattice_update", [z, zy, m, None, coef, 20, status()]),
            ("lattice_scaled_update", [z, buffer, zy, m, m, coef, ratio, 20, status()]),
            ("lattice_scaled_inverse", [z, buffer, zy, m, m, coef, ratio, 20, status()]),
            ("preference_errors", [x, y, m.to(F32)]),
        ):
            expected = REFERENCE[name](*operands)
            results = []
            try:
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    results.append(OPS[name](*operands))
            finally:
                torch.set_num_threads(before)
            assert cases.identical(results[0], results[1])
            # The sums of errors have an order of their own (test_preference.py).
            assert name == "preference_errors" or cases.identical(results[0], expected)


def test_status_is_raised_from_any_thread(native):
    x = torch.zeros(1, 2**18)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for place in (0, 2**17, 2**18 - 1):
        m = torch.zeros_like(x)
        m[0, place] = torch.inf
        word = status()
        OPS["affine_update"](x, x, m, None, coef, word)
        assert word.item() == STATUS_NONFINITE
