"""Every native kernel gives the bits and the layout of the reference."""

import itertools

import pytest
import torch

from inpo_fast.ops.reference import STATUS_NONFINITE
from inpo_fast.ops.registration import OPS, REFERENCE
from tests.ops import cases

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def status():
    return torch.zeros(1, dtype=torch.int32)


def assert_same(name, operands, mutated=()):
    """Run both on clones; compare results, mutated operands and everything else untouched."""
    runs = []
    for kernel in (OPS[name], REFERENCE[name]):
        # clone() makes a sliced tensor dense, so the views are rebuilt on cloned memory.
        own = [_clone_view(o) if isinstance(o, torch.Tensor) else o for o in operands]
        result = kernel(*own)
        runs.append((result, own))
    (got, got_operands), (expected, expected_operands) = runs
    if not isinstance(expected, (torch.Tensor, tuple)):
        assert got is None and expected is None
    else:
        assert cases.identical(got, expected)
    for i, (before, one, two) in enumerate(
        zip(operands, got_operands, expected_operands, strict=True)
    ):
        if not isinstance(before, torch.Tensor):
            continue
        assert cases.identical(one, two), f"operand {i}"
        if i not in mutated:
            assert cases.identical(one, before), f"operand {i} changed"


def _clone_view(t):
    storage = t.untyped_storage().clone()
    copy = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())
    return copy


def grid(layout, *choices):
    """Shapes times choices; in layouts that only rearrange memory the choices take turns."""
    product = list(itertools.product(*choices))
    if layout is cases.contiguous:
        yield from ((shape, *choice) for shape in cases.SHAPES for choice in product)
        return
    turns = itertools.cycle(product)
    for _ in range(3):
        yield from ((shape, *next(turns)) for shape in cases.SHAPES)


def model_outputs(shape, count, dtype, layout, rng):
    made = [layout(cases.floats(shape, dtype, rng)) for _ in range(count)]
    return [*made, None, None][:2]


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_affine(native, inverse, dtype, layout):
    name = "affine_inverse" if inverse else "affine_update"
    rng = cases.generator(0)
    coef_dtype = F64 if dtype == F64 else F32
    m_dtypes = (F32, F16, BF16, F64) if dtype == F64 else (F32, F16, BF16)
    for shape, m_dtype, by_sample, outputs in grid(layout, m_dtypes, (False, True), (0, 1, 2)):
        operands = [
            layout(cases.floats(shape, dtype, rng)),
            layout(cases.floats(shape, dtype, rng)),
            *model_outputs(shape, outputs, m_dtype, layout, rng),
            cases.rows(shape[0] if by_sample else None, coef_dtype, rng),
            None if by_sample and outputs == 1 else status(),
        ]
        assert_same(name, operands, mutated=[5])
        assert_same(name + "_", operands, mutated=[0, 5])


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("m_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_lattice(native, inverse, m_dtype, layout):
    suffix = "inverse" if inverse else "update"
    rng = cases.generator(1)
    bits = itertools.cycle((1, 20, 30))
    for shape, by_sample, ratio_by_sample, outputs in grid(
        layout, (False, True), (False, True), (0, 1, 2)
    ):
        frac_bits = next(bits)
        z, y = (layout(cases.lattice(shape, rng)) for _ in range(2))
        made = model_outputs(shape, outputs, m_dtype, layout, rng)
        coef = cases.rows(shape[0] if by_sample else None, F32, rng)
        operands = [z, y, *made, coef, frac_bits, status()]
        assert_same(f"lattice_{suffix}", operands, mutated=[6])
        assert_same(f"lattice_{suffix}_", operands, mutated=[0, 6])
        buffer = layout(torch.randint(0, 2**46, shape, generator=rng))
        ratio = cases.ratios(shape[0] if ratio_by_sample else None, rng)
        operands = [z, buffer, y, *made, coef, ratio, frac_bits, status()]
        assert_same(f"lattice_scaled_{suffix}", operands, mutated=[8])
        assert_same(f"lattice_scaled_{suffix}_", operands, mutated=[0, 1, 8])


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_encode_and_decode(native, dtype, layout):
    rng = cases.generator(2)
    for shape, scale_dtype in itertools.product(cases.SHAPES, (F32, F64)):
        for scale_shape in ((), (1,), shape[:1]):
            scale = cases.floats(scale_shape, scale_dtype, rng)
            x = layout(cases.floats(shape, dtype, rng))
            assert_same("lattice_encode", [x, scale, 20, status()], mutated=[3])
            for copies in (1, 2):
                z = layout(cases.lattice(shape, rng, bits=31))
                assert_same("lattice_decode", [z, scale, 20, copies, dtype])


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_preference_backward(native, dtype, layout):
    rng = cases.generator(3)
    wide = F64 if dtype == F64 else F32
    for shape, with_ref in itertools.product(cases.SHAPES, (False, True)):
        for target_dtype in {dtype, wide}:
            theta, target = (layout(cases.floats(shape, t, rng)) for t in (dtype, target_dtype))
            ref = layout(cases.floats(shape, dtype, rng)) if with_ref else None
            a, b = (cases.floats(shape[:1], wide, rng) for _ in range(2))
            assert_same("preference_backward", [theta, ref, target, a, b])


def test_operands_of_different_layouts(native):
    rng = cases.generator(4)
    shape = (3, 5, 7, 11)
    for names in itertools.permutations(cases.LAYOUTS, 4):
        one, two, three, four = (cases.LAYOUTS[name] for name in names)
        for by_sample in (False, True):
            coef = cases.rows(3 if by_sample else None, F32, rng)
            floats = [cases.floats(shape, F32, rng) for _ in range(3)]
            operands = [one(floats[0]), two(floats[1]), three(floats[2]), None, coef, status()]
            assert_same("affine_update", operands, mutated=[5])
            assert_same("affine_inverse_", operands, mutated=[0, 5])
            operands = [
                one(cases.lattice(shape, rng)),
                two(torch.randint(0, 2**40, shape, generator=rng)),
                three(cases.lattice(shape, rng)),
                four(floats[2]),
                None,
                coef,
                cases.ratios(3 if by_sample else None, rng),
                20,
                status(),
            ]
            assert_same("lattice_scaled_update", operands, mutated=[8])
            assert_same("lattice_scaled_inverse_", operands, mutated=[0, 1, 8])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4, 5, 6)])
def test_other_numbers_of_dimensions(native, shape):
    rng = cases.generator(5)
    m = cases.floats(shape, BF16, rng)
    for batch in [None, *shape[:1]]:
        coef = cases.rows(batch, F32, rng)
        x, y = (cases.floats(shape, F16, rng) for _ in range(2))
        assert_same("affine_update", [x, y, m, None, coef, status()], mutated=[5])
        z, y = (cases.lattice(shape, rng) for _ in range(2))
        assert_same("lattice_update", [z, y, m, None, coef, 20, status()], mutated=[6])
    assert_same("lattice_decode", [z, torch.ones(()), 20, 1, F32])
    if shape:
        assert_same("lattice_decode", [z, torch.ones(shape[:1]), 20, 2, F32])


def test_constants_with_strides(native):
    rng = cases.generator(6)
    x, y, m = (cases.floats((4, 3, 5, 5), F32, rng) for _ in range(3))
    coef = cases.floats((4, 4), F32, rng).t()  # [B, 4], not contiguous
    assert_same("affine_update", [x, y, m, m, coef, None])
    assert_same("affine_update", [x, y, m, m, coef[1], None])


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    65504.0,  # the largest float16
    65519.99,
    65520.0,  # rounds to infinity in float16
    2.0**-24,  # the smallest float16
    2.0**-25,
    1.5 * 2.0**-25,
    2.0**-14,
    2.0**-14 - 2.0**-25,
    2.0**-149,  # the smallest float32
    2.0**-126 - 2.0**-149,
    3.4028234e38,
    -3.4028234e38,
]


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_special_values(native, dtype):
    for value, m_dtype in itertools.product(SPECIAL, (F32, F16, BF16)):
        x = torch.tensor([[value, 1.0, -value]], dtype=F64).to(dtype)
        m = torch.tensor([[1.0, value, 0.5]], dtype=F64).to(m_dtype)
        coef = torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=F64 if dtype == F64 else F32)
        assert_same("affine_update", [x, x, m, m, coef, status()], mutated=[5])
        assert_same("affine_inverse", [x, x, m, m, coef, status()], mutated=[5])
        z = torch.zeros(1, 3, dtype=torch.int32)
        coef = coef.to(F32)
        assert_same("lattice_update", [z, z, m, m, coef, 20, status()], mutated=[6])
        buffer = torch.zeros(1, 3, dtype=torch.int64)
        for n, d in ((1, 1), (93, 100), (65536, 1), (1, 65536)):
            ratio = torch.from_numpy(cases.ratio_row(n, d))
            for name in ("lattice_scaled_update", "lattice_scaled_inverse"):
                operands = [z, buffer, z, m, m, coef, ratio, 20, status()]
                assert_same(name, operands, mutated=[8])
        for scale in (1.0, 1e30, float("nan"), float("inf")):
            scale = torch.tensor(scale)
            assert_same("lattice_encode", [x, scale, 20, status()], mutated=[3])


def test_every_16_bit_value(native):
    """All 65536 values in, and the neighbours of all rounding ties out."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for dtype in (F16, BF16):
        every = bits.view(dtype).clone()
        zeros = torch.zeros_like(every)
        assert_same("affine_update", [every, zeros, every, None, coef, status()], mutated=[5])
        between = every.to(F32)
        steps = torch.tensor([0.5, 0.5 - 2**-20, 0.5 + 2**-20, 0.25])
        ulps = (between.nextafter(torch.tensor(float("inf"))) - between).abs() * 0 + (
            every.abs().to(F32) * torch.finfo(dtype).eps
        )
        for step in steps:
            m = between + step * ulps
            assert_same("affine_update", [zeros, zeros, m, None, coef, status()], mutated=[5])


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
