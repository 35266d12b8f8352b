"""Calls of every operator, and whether all ways to run them give the same bits.

A call is (name, operands in schema order, indices of the operands that it changes). The operands
are on the CPU; ``assert_same`` brings copies of them, with their strides, to each device.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from inpo_fast.ops.registration import REFERENCE
from tests.ops import cases

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, BF16)

Call = tuple[str, list[Any], tuple[int, ...]]
Way = tuple[dict[str, Callable[..., Any]], str]  # kernels by name, and the device


def assert_same(call: Call, *ways: Way) -> None:
    """Run the call each way and by the reference on the CPU; compare all that it may touch."""
    name, operands, mutated = call
    expected, expected_operands = _run(REFERENCE[name], operands, "cpu")
    for kernels, device in ways:
        got, got_operands = _run(kernels[name], operands, device)
        assert cases.identical(got, expected), name
        for i, before in enumerate(operands):
            if isinstance(before, Tensor):
                assert cases.identical(got_operands[i], expected_operands[i]), (name, i)
                if i not in mutated:
                    assert cases.identical(got_operands[i], before), f"{name}: {i} changed"


def _run(kernel: Callable[..., Any], operands: list[Any], device: str) -> tuple[Any, list[Any]]:
    own = [_on(o, device) if isinstance(o, Tensor) else o for o in operands]
    result = kernel(*own)
    assert result is None or isinstance(result, (Tensor, tuple))
    if isinstance(result, Tensor):
        result = _on(result, "cpu")
    elif result is not None:
        result = tuple(_on(r, "cpu") for r in result)
    return result, [_on(o, "cpu") if isinstance(o, Tensor) else o for o in own]


def _on(t: Tensor, device: str) -> Tensor:
    """Copy all memory behind a tensor: clone() would make a sliced one dense."""
    storage = t.untyped_storage()
    storage = storage.clone() if t.device.type == device else storage.to(device=device)
    copy = torch.empty(0, dtype=t.dtype, device=device)
    return copy.set_(storage, t.storage_offset(), t.shape, t.stride())


def status() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def grid(layout: Callable[[Tensor], Tensor], *choices: tuple[Any, ...]) -> Iterator[tuple]:
    """Shapes times choices; in layouts that only rearrange memory the choices take turns."""
    product = list(itertools.product(*choices))
    if layout is cases.contiguous:
        yield from ((shape, *choice) for shape in cases.SHAPES for choice in product)
        return
    turns = itertools.cycle(product)
    for _ in range(3):
        yield from ((shape, *next(turns)) for shape in cases.SHAPES)


def model_outputs(shape, count, dtype, layout, rng) -> list[Tensor | None]:
    made = [layout(cases.floats(shape, dtype, rng)) for _ in range(count)]
    return [*made, None, None][:2]


def affine(dtype, layout, inverse) -> Iterator[Call]:
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
        yield name, operands, (5,)
        yield name + "_", operands, (0, 5)


def lattice(m_dtype, layout, inverse) -> Iterator[Call]:
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
        yield f"lattice_{suffix}", operands, (6,)
        yield f"lattice_{suffix}_", operands, (0, 6)
        buffer = layout(torch.randint(0, 2**46, shape, generator=rng))
        ratio = cases.ratios(shape[0] if ratio_by_sample else None, rng)
        operands = [z, buffer, y, *made, coef, ratio, frac_bits, status()]
        yield f"lattice_scaled_{suffix}", operands, (8,)
        yield f"lattice_scaled_{suffix}_", operands, (0, 1, 8)


def encode_and_decode(dtype, layout) -> Iterator[Call]:
    rng = cases.generator(2)
    for shape, scale_dtype in itertools.product(cases.SHAPES, (F32, F64)):
        for scale_shape in ((), (1,), shape[:1]):
            scale = cases.floats(scale_shape, scale_dtype, rng)
            x = layout(cases.floats(shape, dtype, rng))
            yield "lattice_encode", [x, scale, 20, status()], (3,)
            for copies in (1, 2):
                z = layout(cases.lattice(shape, rng, bits=31))
                yield "lattice_decode", [z, scale, 20, copies, dtype], ()


def preference_backward(dtype, layout) -> Iterator[Call]:
    rng = cases.generator(3)
    wide = F64 if dtype == F64 else F32
    for shape, with_ref in itertools.product(cases.SHAPES, (False, True)):
        for target_dtype in {dtype, wide}:
            theta, target = (layout(cases.floats(shape, t, rng)) for t in (dtype, target_dtype))
            ref = layout(cases.floats(shape, dtype, rng)) if with_ref else None
            a, b = (cases.floats(shape[:1], wide, rng) for _ in range(2))
            yield "preference_backward", [theta, ref, target, a, b], ()


def different_layouts(stride: int = 1) -> Iterator[Call]:
    """Operands that each lie in memory in another way; every ``stride``-th combination."""
    rng = cases.generator(4)
    shape = (3, 5, 7, 11)
    for names in itertools.islice(itertools.permutations(cases.LAYOUTS, 4), 0, None, stride):
        one, two, three, four = (cases.LAYOUTS[name] for name in names)
        for by_sample in (False, True):
            coef = cases.rows(3 if by_sample else None, F32, rng)
            floats = [cases.floats(shape, F32, rng) for _ in range(3)]
            operands = [one(floats[0]), two(floats[1]), three(floats[2]), None, coef, status()]
            yield "affine_update", operands, (5,)
            yield "affine_inverse_", operands, (0, 5)
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
            yield "lattice_scaled_update", operands, (8,)
            yield "lattice_scaled_inverse_", operands, (0, 1, 8)


def other_dimensions() -> Iterator[Call]:
    rng = cases.generator(5)
    for shape in [(), (5,), (2, 3), (2, 3, 4, 5, 6)]:
        m = cases.floats(shape, BF16, rng)
        for batch in [None, *shape[:1]]:
            coef = cases.rows(batch, F32, rng)
            x, y = (cases.floats(shape, F16, rng) for _ in range(2))
            yield "affine_update", [x, y, m, None, coef, status()], (5,)
            z, y = (cases.lattice(shape, rng) for _ in range(2))
            yield "lattice_update", [z, y, m, None, coef, 20, status()], (6,)
        yield "lattice_decode", [z, torch.ones(()), 20, 1, F32], ()
        if shape:
            yield "lattice_decode", [z, torch.ones(shape[:1]), 20, 2, F32], ()


def strided_constants() -> Iterator[Call]:
    rng = cases.generator(6)
    x, y, m = (cases.floats((4, 3, 5, 5), F32, rng) for _ in range(3))
    coef = cases.floats((4, 4), F32, rng).t()  # [B, 4], not contiguous
    yield "affine_update", [x, y, m, m, coef, None], ()
    yield "affine_update", [x, y, m, m, coef[1], None], ()


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


def special_values(dtype, values=SPECIAL) -> Iterator[Call]:
    for value, m_dtype in itertools.product(values, (F32, F16, BF16)):
        x = torch.tensor([[value, 1.0, -value]], dtype=F64).to(dtype)
        m = torch.tensor([[1.0, value, 0.5]], dtype=F64).to(m_dtype)
        coef = torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=F64 if dtype == F64 else F32)
        yield "affine_update", [x, x, m, m, coef, status()], (5,)
        yield "affine_inverse", [x, x, m, m, coef, status()], (5,)
        z = torch.zeros(1, 3, dtype=torch.int32)
        coef = coef.to(F32)
        yield "lattice_update", [z, z, m, m, coef, 20, status()], (6,)
        buffer = torch.zeros(1, 3, dtype=torch.int64)
        for n, d in ((1, 1), (93, 100), (65536, 1), (1, 65536)):
            ratio = torch.from_numpy(cases.ratio_row(n, d))
            for name in ("lattice_scaled_update", "lattice_scaled_inverse"):
                yield name, [z, buffer, z, m, m, coef, ratio, 20, status()], (8,)
        for scale in (1.0, 1e30, float("nan"), float("inf")):
            yield "lattice_encode", [x, torch.tensor(scale), 20, status()], (3,)


def every_16_bit_value(stride: int = 1) -> Iterator[Call]:
    """All 65536 values in, and the neighbours of all rounding ties out."""
    bits = torch.arange(-(2**15), 2**15, stride, dtype=torch.int32).to(torch.int16)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for dtype in (F16, BF16):
        every = bits.view(dtype).clone()
        zeros = torch.zeros_like(every)
        yield "affine_update", [every, zeros, every, None, coef, status()], (5,)
        between = every.to(F32)
        steps = torch.tensor([0.5, 0.5 - 2**-20, 0.5 + 2**-20, 0.25])
        ulps = every.abs().to(F32) * torch.finfo(dtype).eps
        for step in steps:
            m = between + step * ulps
            yield "affine_update", [zeros, zeros, m, None, coef, status()], (5,)
