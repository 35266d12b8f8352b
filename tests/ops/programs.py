"""Random lattice programs that must return to their starting bits.

A program is a list of updates of two tracks. It is run with one of the two directions of the
operators and then backwards with the other, with a model that is evaluated on the decoded other
track. Bounds are followed on the host, so that no program leaves the range of the lattice.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inpo_fast import ops
from inpo_fast.lattice import lattice_range, ratio_row
from inpo_fast.ops.choice import resolve
from tests.ops import cases

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = (0, 1, 2, 3, 5, 8, 17)

# Which backend runs there and which back, on the CPU. The native one is faster, so it runs more
# often.
RUNS = (
    ("native", "native"),
    ("native", "native"),
    ("native", "reference"),
    ("reference", "native"),
    ("reference", "reference"),
)


def runs_on(device: str) -> Sequence[tuple[str, str]]:
    """Return the pairs of backends, there and back, that can run on the device."""
    usable = []
    for name in ("native", "triton", "reference"):
        with contextlib.suppress(ValueError):
            usable.append(resolve(name, torch.device(device)))
    if device == "cpu":
        return [pair for pair in RUNS if set(pair) <= set(usable)]
    return list(itertools.product(usable, usable))


@dataclass(frozen=True)
class Spec:
    """Everything that determines a program and how it is run."""

    seed: int
    shape: tuple[int, ...]
    layout: str
    dtype: str
    guidance: bool
    by_sample: bool
    scaled: bool
    updates: int
    frac_bits: int
    inverse_first: bool
    in_place: bool
    there: str
    back: str


@dataclass
class Step:
    """One update: track j changes."""

    j: int
    coef: Tensor  # [4] or [B, 4]
    ratio: Tensor | None  # [4] or [B, 4]
    outputs: int


def random_spec(rng: np.random.Generator, runs: Sequence[tuple[str, str]] = RUNS) -> Spec:
    """Draw a spec; Hypothesis draws the same fields in test_programs.py."""
    dims = int(rng.integers(1, 5))
    there, back = runs[int(rng.integers(len(runs)))]
    return Spec(
        seed=int(rng.integers(2**31)),
        shape=tuple(int(rng.choice(SIZES)) for _ in range(dims)),
        layout=str(rng.choice(list(cases.LAYOUTS))) if dims == 4 else "contiguous",
        dtype=str(rng.choice(list(DTYPES))),
        guidance=bool(rng.integers(2)),
        by_sample=bool(rng.integers(2)),
        scaled=bool(rng.integers(2)),
        updates=int(2 ** rng.uniform(0, math.log2(200))),
        frac_bits=int(rng.integers(8, 29)),
        inverse_first=bool(rng.integers(2)),
        in_place=bool(rng.integers(2)),
        there=there,
        back=back,
    )


def build(spec: Spec, rng: np.random.Generator) -> list[Step]:
    """Draw updates whose states stay inside the lattice in the direction of the first run."""
    limit = 0.9 * lattice_range(spec.frac_bits)
    bound = [limit / 4, limit / 4]  # of |x| on each track
    kept = [2**20, 2**20]  # bound of the buffers
    samples = spec.shape[0] if spec.by_sample else 1
    steps = []
    for _ in range(spec.updates):
        j = int(rng.integers(2))
        # The direction that runs first multiplies by n/d or by d/n.
        pairs, growth = [], []
        for _ in range(max(samples, 1)):
            n, d = (int(2 ** rng.uniform(0, 16)) for _ in range(2))
            if rng.integers(2):
                d = max(1, min(2**16, round(n * rng.uniform(0.8, 1.25))))
            times, over = (d, n) if spec.inverse_first else (n, d)
            fits = times / over * bound[j] < 0.6 * limit and kept[j] * over // times < 2**45
            if not (spec.scaled and fits):
                n = d = times = over = 1
            pairs.append((n, d))
            growth.append(times / over)
        worst = max(growth)
        room = limit - max(worst, 1.0) * bound[j]
        share = rng.dirichlet([1.0, 1.0, 1.0]) * min(room, limit * rng.uniform(0, 1)) / 2
        signs = rng.choice([-1.0, 1.0], size=(samples, 3))
        table = np.ones((samples, 4), dtype=np.float32)
        # |model output| <= 1 and |y| <= its bound. The inverse scales the increment too.
        table[:, 1:] = signs * share / max(worst, 1.0) / [max(bound[1 - j], 1e-3), 1.0, 1.0]
        bound[j] = worst * bound[j] + share.sum() + 2.0**-spec.frac_bits * 4 * max(worst, 1)
        kept[j] = max((kept[j] + 1) * (1 / min(growth)) + 1, 1)
        coef = torch.from_numpy(table)
        ratio = None
        if spec.scaled:
            ratio = torch.stack([torch.from_numpy(ratio_row(n, d)) for n, d in pairs])
            ratio = ratio[:samples]
        outputs = int(rng.choice([0, 1, 2] if spec.guidance else [0, 1]))
        steps.append(
            Step(
                j,
                coef if spec.by_sample else coef[0],
                ratio if spec.by_sample or ratio is None else ratio[0],
                outputs,
            )
        )
    return steps


def model(x: Tensor, weights: Tensor) -> Tensor:
    """A fixed nonlinear map into [-1, 1], [B, ...] to [B, ...], that mixes elements."""
    mixed = x * weights[0] + weights[1]
    if x.numel() > 0:
        mixed = mixed + x.roll(1, dims=-1) * weights[2] + x.flip(0) * weights[3]
    return torch.tanh(mixed)


class Runner:
    """Runs the steps of a program in either direction on one backend."""

    def __init__(self, spec: Spec, steps: list[Step], weights: Tensor) -> None:
        self.spec, self.steps, self.weights = spec, steps, weights
        # Brings the range of the lattice to +-4, where tanh is not linear and float16 not infinite.
        self.scale = torch.tensor(4 / lattice_range(spec.frac_bits), device=weights.device)

    def outputs(self, step: Step, y: Tensor, impl: str) -> tuple[Tensor | None, Tensor | None]:
        if step.outputs == 0:
            return None, None
        x = ops.lattice_decode(
            y,
            self.scale,
            DTYPES[self.spec.dtype],
            frac_bits=self.spec.frac_bits,
            copies=step.outputs,
            impl=impl,
        )  # [outputs * B, ...]
        if step.outputs == 1:
            return model(x, self.weights[0]), None
        one, two = x.chunk(2) if len(x) else (x, x)
        return model(one, self.weights[0]), model(two, self.weights[1])

    def apply(
        self, step: Step, state: list[Tensor], impl: str, inverse: bool, status: Tensor
    ) -> list[Tensor]:
        """State is (Z0, Z1, B0, B1)."""
        state = list(state)
        j = step.j
        m1, m2 = self.outputs(step, state[1 - j], impl)
        options = {"frac_bits": self.spec.frac_bits, "status": status, "impl": impl}
        name = "lattice" + ("_scaled" if step.ratio is not None else "")
        name += ("_inverse" if inverse else "_update") + ("_" if self.spec.in_place else "")
        function = getattr(ops, name)
        if step.ratio is None:
            state[j] = function(state[j], state[1 - j], step.coef, m1, m2, **options)
        else:
            state[j], state[2 + j] = function(
                state[j], state[2 + j], state[1 - j], step.coef, step.ratio, m1, m2, **options
            )
        return state


def start(spec: Spec, rng: np.random.Generator) -> list[Tensor]:
    """Draw tracks over a quarter of the range, and buffers below 2^20."""
    quarter = int(2**31 * 0.9 / 4)
    layout = cases.LAYOUTS[spec.layout]
    tracks = [
        torch.from_numpy(rng.integers(-quarter, quarter, spec.shape, dtype=np.int32))
        for _ in range(2)
    ]
    high = 2**20 if spec.scaled and rng.integers(2) else 1
    buffers = [torch.from_numpy(rng.integers(0, high, spec.shape)) for _ in range(2)]
    return [layout(t) if t.dim() == 4 else t for t in (*tracks, *buffers)]


def _on_device(step: Step, device: str) -> Step:
    ratio = None if step.ratio is None else step.ratio.to(device)
    return Step(step.j, step.coef.to(device), ratio, step.outputs)


def _assert_equal(one: list[Tensor], two: list[Tensor], words: str) -> None:
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second), words


def check(spec: Spec, device: str = "cpu") -> None:
    """Run a program there and back and assert that the bits return.

    Where the way there and the way back have different backends, the way there is also run on
    both, and the states must be the same: each of them on the CPU, and the last one on a GPU, where
    a look at every one would take most of the time.
    """
    rng = np.random.default_rng(spec.seed)
    steps = [_on_device(step, device) for step in build(spec, rng)]
    begin = [t.to(device) for t in start(spec, rng)]
    weights = torch.from_numpy(rng.normal(size=(2, 4))).to(device, DTYPES[spec.dtype])
    runner = Runner(spec, steps, weights)
    status = ops.new_status(4, device)
    state = [t.clone() for t in begin]
    shadow = [t.clone() for t in begin]
    for step in steps:
        state = runner.apply(step, state, spec.there, spec.inverse_first, status[0])
        if spec.there != spec.back:
            shadow = runner.apply(step, shadow, spec.back, spec.inverse_first, status[1])
            if device == "cpu":
                _assert_equal(state, shadow, "backends differ on the way there")
    if spec.there != spec.back:
        _assert_equal(state, shadow, "backends differ on the way there")
    assert status.sum() == 0, f"left the lattice: {status.flatten().tolist()}"
    assert all(bool((b >= 0).all()) for b in state[2:])
    for step in reversed(steps):
        state = runner.apply(step, state, spec.back, not spec.inverse_first, status[2])
    _assert_equal(state, begin, "the bits did not return")
    # The way back sees the same increments, and its states are states of the way there.
    assert status.sum() == 0
