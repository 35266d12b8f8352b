# SPDX-License-Identifier: Apache-2.0
"""The operators: native against eager torch, against torch.compile of the reference, and a copy.

Eager torch and the compiled reference do the same arithmetic (float64 inside), so all three must
agree, and are checked, before anything is timed. ``eager_float32`` is what one would write without
a thought for the bits; it rounds at every operation and is shown for comparison only.

The ratio ``copy`` is the share of the bandwidth of a copy that the operator reaches: bytes that it
must move over its time, by the same of a float32 copy of that many elements, into old memory for
an operator in place and into new memory for one that returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Row, interleaved, keep_freed_memory, median_us, speedup
from inpo_fast import ops
from inpo_fast.lattice import ratio_row
from inpo_fast.ops.registration import REFERENCE

SIZES = {"2^14": (1, 4, 64, 64), "2^24": (4, 4, 1024, 1024)}

EAGER_TARGET = 3.0  # at 2^14
COMPILED_TARGET = 1.0  # at 2^24
COPY_TARGET = 0.8  # at 2^24, for the float32 update


@dataclass
class Case:
    """One operator on one kind of operands."""

    name: str
    label: str
    arguments: list[object]
    bytes_per_element: float
    copy_target: bool = False
    plain: Callable[[], object] | None = None


def cases(shape: tuple[int, ...], device: str) -> Iterator[Case]:
    """Make the operands of every case, one case at a time."""
    rng = torch.Generator(device).manual_seed(0)

    def floats(dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    def track() -> Tensor:
        return torch.randint(
            -(2**21), 2**21, shape, generator=rng, device=device, dtype=torch.int32
        )

    def buffer() -> Tensor:
        return torch.randint(0, 2**5, shape, generator=rng, device=device)

    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    # a < 1 keeps a state that is updated in place again and again where it is.
    coef = torch.tensor([0.9, 0.05, -0.05, 0.02], device=device)  # [4]
    # These scales shrink the buffer, which an operator in place is given again and again.
    grow, shrink = (torch.from_numpy(ratio_row(*t)).to(device) for t in ((16, 15), (15, 16)))  # [4]
    scale = torch.ones(1, device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)

    x, y, m = floats(f32), floats(f32), floats(f32)
    for name in ("affine_update", "affine_update_", "affine_inverse", "affine_inverse_"):
        arguments = [x, y, m, None, coef, status]
        yield Case(
            name, "float32", arguments, 16, "update" in name, lambda: 0.9 * x + 0.05 * y - 0.05 * m
        )
    m1, m2 = floats(bf16), floats(bf16)
    yield Case("affine_update_", "float32, 2 x bfloat16", [x, y, m1, m2, coef, status], 16)
    for dtype, label in ((bf16, "bfloat16"), (f16, "float16")):
        operands = [floats(dtype) for _ in range(3)]
        yield Case("affine_update_", label, [*operands, None, coef, status], 8)
    z, zy = track(), track()
    for suffix in ("update", "update_", "inverse", "inverse_"):
        arguments = [z, zy, m1, None, coef, 20, status]
        yield Case(f"lattice_{suffix}", "bfloat16", arguments, 14)
    yield Case("lattice_update_", "2 x bfloat16", [z, zy, m1, m2, coef, 20, status], 16)
    kept = buffer()
    for suffix in ("update", "update_", "inverse", "inverse_"):
        ratio = grow if "update" in suffix else shrink
        arguments = [z, kept, zy, m1, None, coef, ratio, 20, status]
        yield Case(f"lattice_scaled_{suffix}", "bfloat16", arguments, 30)
    yield Case("lattice_encode", "float32", [x, scale, 20, status], 8)
    yield Case("lattice_decode", "float32", [z, scale, 20, 1, f32], 8)
    yield Case("lattice_decode", "bfloat16, 2 copies", [z, scale, 20, 2, bf16], 8)
    yield Case("preference_errors", "float32", [x, y, m], 12)
    yield Case("preference_errors", "bfloat16", [m1, m2, m], 8)
    weights = torch.ones(shape[0], device=device)
    yield Case("preference_backward", "float32", [x, y, m, weights, weights], 16)
    yield Case("preference_backward", "bfloat16", [m1, m2, m, weights, weights], 10)


def flat(result: object, arguments: list[object]) -> list[Tensor]:
    """Return the tensors of a result, or those that an operator in place has changed."""
    if result is None:
        changed = [a for a in arguments[:2] if isinstance(a, Tensor)]
        return [t.clone() for t in changed]
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,))]


def agree(case: Case, functions: dict[str, Callable[..., object]]) -> None:
    """Raise unless all give the same bits (one rounding apart for sums, whose order is free)."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in case.arguments]
    results = {}
    for name, function in functions.items():
        own = [a.clone() if isinstance(a, Tensor) else a for a in before]
        results[name] = flat(function(*own), own)
    expected = results.pop("eager")
    for name, got in results.items():
        for one, two in zip(got, expected, strict=True):
            if case.name == "preference_errors":
                torch.testing.assert_close(one, two, rtol=2e-7, atol=0)
            elif not torch.equal(one, two):
                raise AssertionError(f"{case.name} ({case.label}): {name} differs from eager")


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield a row for each size and operator."""
    available, reason = ops.backends()["native"]
    if not available:
        raise SystemExit(f"benchmarks: nothing to measure: {reason}")
    keep_freed_memory()
    namespace = torch.ops.inpo_fast
    for size, shape in SIZES.items():
        large = size == "2^24"
        rounds = 3 if quick else 9 if large else 21
        new = torch.randn(shape, device=device)
        copy_into_old = partial(torch.empty_like(new).copy_, new)
        for case in cases(shape, device):
            # Each case is compiled by itself, for its shapes: the best that the compiler can do.
            torch._dynamo.reset()
            reference = REFERENCE[case.name]
            functions = {
                "ours": getattr(namespace, case.name).default,
                "eager": reference,
                "compiled": torch.compile(reference, fullgraph=True, dynamic=False),
            }
            agree(case, functions)
            in_place = case.name.endswith("_")
            contenders = {
                n: partial(function, *case.arguments) for n, function in functions.items()
            }
            contenders["copy"] = copy_into_old if in_place else new.clone
            if case.plain is not None:
                contenders["eager_float32"] = case.plain
            times = interleaved(contenders, device=device, rounds=rounds)
            ratios = {name: speedup(times, name) for name in contenders if name != "ours"}
            ratios["copy"] *= case.bytes_per_element / 8
            target = {"compiled": COMPILED_TARGET} if large else {"eager": EAGER_TARGET}
            if large and case.copy_target:
                target["copy"] = COPY_TARGET
            yield Row(
                case=f"{case.name} ({case.label}) {size}",
                metric="time of a call",
                unit="us",
                ours=median_us(times["ours"]),
                rivals={n: median_us(t) for n, t in times.items() if n != "ours"},
                ratios=ratios,
                target=target,
            )
