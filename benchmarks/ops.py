# SPDX-License-Identifier: Apache-2.0
"""The operators: each backend against eager torch, torch.compile of the reference, and a copy.

Eager torch and the compiled reference do the same arithmetic (float64 inside), so all three must
agree, and are checked, before anything is timed. ``eager_float32`` is what one would write without
a thought for the bits; it rounds at every operation and is shown for comparison only.

The ratio ``copy`` is the share of the bandwidth of a copy that the operator reaches: bytes that it
must move over its time, by the same of a float32 copy of that many elements, into old memory for
an operator in place and into new memory for one that returns its result.

On a GPU, calls at 2^14 go through the public functions and are measured from the host, which never
waits for the device between them: what a call costs a Python loop. The rival there is what
diffusers does, guidance and DDIMScheduler.step. The preference loss is judged at 64 pairs of SDXL
latents, in bfloat16 with a float32 target, forward and backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Row, captured, interleaved, keep_freed_memory, median_us, speedup
from inpo_fast import dpo_loss, ops
from inpo_fast.lattice import ratio_row
from inpo_fast.ops.choice import resolve
from inpo_fast.ops.registration import KERNELS, REFERENCE

SMALL = (1, 4, 64, 64)  # 2^14, a latent
LARGE = {"cpu": (4, 4, 1024, 1024), "cuda": (4, 4, 4096, 4096)}  # 2^24 and 2^28
PAIRS = (128, 4, 128, 128)  # 64 pairs of SDXL latents

EAGER_TARGET = 3.0  # at 2^14, on the CPU
COMPILED_TARGET = 1.0  # of a large operator
COPY_TARGET = {"cpu": 0.8, "cuda": 0.97}  # of an update at the large size
CALL_TARGET_US = {"native": 8.0, "triton": 25.0}  # of a call at 2^14 on a GPU
PREFERENCE_TARGET = {"eager": 5.0, "compiled": 1.2}


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
    # These scales hardly move a track or a buffer that is updated in place a thousand times.
    terms = ((2**16 - 1, 2**16), (2**16, 2**16 - 1))
    there, back = (torch.from_numpy(ratio_row(*t)).to(device) for t in terms)  # [4]
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
        ratio = there if "update" in suffix else back
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


def backends(device: str) -> dict[str, dict[str, Callable[..., object]]]:
    """Return the kernels, by name, of each backend that has some for the device."""
    found = {}
    for impl in ("native", "triton"):
        with contextlib.suppress(ValueError):
            found[impl] = KERNELS[resolve(impl, torch.empty(0, device=device).device)]
    if not found:
        raise SystemExit(f"benchmarks: nothing to measure: {ops.backends()}")
    return found


def operator_rows(
    device: str, quick: bool, only: Sequence[str], shape: tuple[int, ...], large: bool
) -> Iterator[Row]:
    """Yield a row for each operator and backend at one size."""
    rounds = 3 if quick else 9 if large else 21
    kernels = backends(device)
    new = torch.randn(shape, device=device)
    copy_into_old = partial(torch.empty_like(new).copy_, new)
    size = f"2^{new.numel().bit_length() - 1}"
    for case in cases(shape, device):
        if only and case.name not in only:
            continue
        # Each case is compiled by itself, for its shapes: the best that the compiler can do.
        torch._dynamo.reset()
        reference = REFERENCE[case.name]
        functions = {
            **{backend: kernel[case.name] for backend, kernel in kernels.items()},
            "eager": reference,
            "compiled": torch.compile(reference, fullgraph=True, dynamic=False),
        }
        agree(case, functions)
        contenders = {n: partial(function, *case.arguments) for n, function in functions.items()}
        contenders["copy"] = copy_into_old if case.name.endswith("_") else new.clone
        if case.plain is not None:
            contenders["eager_float32"] = case.plain
        times = interleaved(contenders, device=device, rounds=rounds)
        for backend in kernels:
            rivals = [name for name in contenders if name not in kernels]
            ratios = {name: speedup(times, name, backend) for name in rivals}
            ratios["copy"] *= case.bytes_per_element / 8
            target = {}
            if large:
                target["compiled"] = COMPILED_TARGET
                if case.copy_target or (device == "cuda" and "affine" in case.name):
                    target["copy"] = COPY_TARGET[device]
                if device == "cuda" and "lattice_" in case.name and "code" not in case.name:
                    target["copy"] = COPY_TARGET[device]
            elif device == "cpu":
                target["eager"] = EAGER_TARGET
            yield Row(
                case=f"{backend} {case.name} ({case.label}) {size}",
                metric="time of a call",
                unit="us",
                ours=median_us(times[backend]),
                rivals={n: median_us(t) for n, t in times.items() if n not in kernels},
                ratios=ratios,
                target=target,
            )


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each size and operator, or for the operators named."""
    if device == "cpu":
        keep_freed_memory()
        yield from operator_rows(device, quick, only, SMALL, large=False)
    else:
        yield from call_rows(device, quick)
        yield from preference_rows(device, quick)
    yield from operator_rows(device, quick, only, LARGE[device], large=True)


# --- On a GPU only ------------------------------------------------------------------------------


def call_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield what one call costs a Python loop at latent size: nothing in it waits for the GPU."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(50, device=device)
    sample = torch.randn(SMALL, device=device)
    both = torch.randn(2, *SMALL[1:], device=device, dtype=torch.bfloat16)
    m1, m2 = both.chunk(2)
    t = scheduler.timesteps[10]

    def diffusers_step() -> Tensor:
        unconditional, conditional = both.chunk(2)
        guided = unconditional + 7.5 * (conditional - unconditional)
        return scheduler.step(guided, t, sample).prev_sample

    z, y = (torch.randint(-(2**20), 2**20, SMALL, device=device, dtype=torch.int32) for _ in "zy")
    coef = torch.tensor([1.0, 0.05, -0.05, 0.02], device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    zero = torch.zeros(4, device=device)
    calls: dict[str, Callable[[], object]] = {}
    for impl in backends(device):
        lattice = partial(ops.lattice_update_, frac_bits=20, status=status, impl=impl)
        assert torch.equal(
            lattice(z.clone(), y, coef, m1, m2),
            REFERENCE["lattice_update"](z, y, m1, m2, coef, 20, status),
        )
        # Increments of zero keep the track where it is.
        calls[impl] = partial(lattice, z, y, zero, m1, m2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    contenders = {**calls, "diffusers": diffusers_step}
    with torch.no_grad():
        times = interleaved(contenders, device=device, rounds=5 if quick else 31, seconds=0.005)
    for impl in calls:
        ours = median_us(times[impl])
        yield Row(
            case=f"{impl} lattice_update_ (2 x bfloat16) 2^14, public call",
            metric="host time of a call, no synchronisation",
            unit="us",
            ours=ours,
            rivals={"diffusers": median_us(times["diffusers"])},
            ratios={
                "diffusers": speedup(times, "diffusers", impl),
                "allowed": CALL_TARGET_US[impl] / ours,
            },
            target={"allowed": 1.0},
        )


def plain_loss(theta: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """The loss of Diffusion-DPO and InPO as their scripts write it, in float32."""
    dims = list(range(1, theta.dim()))
    e_theta = (theta.float() - target).pow(2).mean(dims)
    e_ref = (ref.float() - target).pow(2).mean(dims)
    winner, loser = (e_theta - e_ref).chunk(2)
    return -torch.nn.functional.logsigmoid(-0.5 * 2000 * (winner - loser)).mean()


def preference_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield the preference loss, forward and backward, at 64 pairs of SDXL latents."""
    rng = torch.Generator(device).manual_seed(0)
    target = torch.randn(PAIRS, generator=rng, device=device)
    theta, ref = (
        (target + 0.1 * torch.randn(PAIRS, generator=rng, device=device)).bfloat16()
        for _ in range(2)
    )
    theta.requires_grad_(True)

    def fused(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda theta, ref, target: dpo_loss(theta, ref, target, beta=2000, impl=impl).loss

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(theta, ref, target), theta)[0]

    torch._dynamo.reset()
    compile_ = partial(torch.compile, fullgraph=True, dynamic=False)
    kernels = backends(device)
    functions = {impl: step(compile_(fused(impl))) for impl in kernels}
    functions |= {f"{impl}, eager": step(fused(impl)) for impl in kernels}
    functions |= {"eager": step(plain_loss), "compiled": step(compile_(plain_loss))}
    exact = torch.autograd.grad(plain_loss(theta.double(), ref.double(), target.double()), theta)[
        0
    ].double()
    for name, function in functions.items():
        error = (function().double() - exact).norm() / exact.norm()
        # One rounding to bfloat16 is 2^-9 at most; the scripts' own arithmetic stays below too.
        assert error < 2**-8, f"{name} is wrong by {error:.1e}"
    # Read theta, ref and target, then theta and target, and write the gradient.
    least = theta.numel() * ((2 + 2 + 4) + (2 + 4) + 2)
    new = torch.randn(2**28, device=device)
    parts: dict[str, Callable[[], object]] = {}
    weights = torch.ones(len(theta), device=device)
    for impl, kernel in kernels.items():
        tensors = theta.detach(), ref, target
        parts[f"{impl}, errors alone"] = partial(kernel["preference_errors"], *tensors)
        parts[f"{impl}, backward alone"] = partial(
            kernel["preference_backward"], tensors[0], None, target, weights, weights
        )
    timed = {name: captured(part) for name, part in parts.items()}
    times = interleaved(timed, device=device, rounds=5 if quick else 15)
    for name, samples in times.items():
        yield Row(
            case=f"{name}, 64 pairs of 4x128x128",
            metric="GPU time",
            unit="us",
            ours=median_us(samples),
            rivals={},
            ratios={},
        )
    for kind, contenders in (
        ("GPU time", {name: captured(function) for name, function in functions.items()}),
        ("wall clock", functions),
    ):
        times = interleaved(
            {**contenders, "copy": new.clone}, device=device, rounds=5 if quick else 15
        )
        bandwidth = 2 * new.numel() * new.element_size() / median_us(times["copy"])
        for impl in functions:
            if impl in ("eager", "compiled"):
                continue
            ratios = {name: speedup(times, name, impl) for name in ("eager", "compiled")}
            ratios["copy"] = least / median_us(times[impl]) / bandwidth
            yield Row(
                case=f"{impl} dpo_loss, 64 pairs of 4x128x128, forward and backward, {kind}",
                metric=kind,
                unit="us",
                ours=median_us(times[impl]),
                rivals={name: median_us(times[name]) for name in ("eager", "compiled")},
                ratios=ratios,
                # The host's part is autograd's and the compiler's, not the kernels'.
                target=PREFERENCE_TARGET if impl in kernels and kind == "GPU time" else {},
            )
