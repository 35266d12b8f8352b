"""Inversions driven from outside: they say which model call comes next and take its output.

A trainer owns the model, so a trajectory does not call it:

    for call in trajectory:
        if call.target is None:             # a step of the inversion only
            with torch.no_grad():
                output = policy(call.latents, call.timesteps)
        else:                               # a training sample, whose forward is also that step
            output = policy(call.latents, call.timesteps)
            loss(output, reference(call.latents, call.timesteps), call.target).backward()
        trajectory.give(output)

One path visits several noise levels. Where it trains at more than one of them (`train_at`), the
forward of the training is the very call that the inversion needs there, so the path costs almost
nothing. The trajectory reads the detached output when it is given, not later, so a compiled model
may reuse the memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..lattice import rational
from ..sampler import Model
from ..schedule import Array, NoiseSchedule
from .latents import (
    NoisyLatents,
    Timesteps,
    checked_timesteps,
    model_times,
    q_sample,
    target_rows,
    upload,
)


class Call(NamedTuple):
    """One call of the policy."""

    latents: Tensor
    """[B, …] float32."""
    timesteps: Tensor
    """[B] the model's time."""
    target: Tensor | None
    """[B, …] τ where this call is a training sample, else None."""
    last: bool
    """Whether the trajectory ends here: it does not need the output."""


Calls: TypeAlias = "Generator[Call, Tensor | None, None]"
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"
"""Of noise: one, or one for every pair (see `normal`); None takes torch's own."""


class Trajectory:
    """Iterate over the calls and `give` the output of each before the next.

    Raises:
        RuntimeError: at the next call, where an output that the inversion needs was not given.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._current: Call | None = next(calls)

    def __iter__(self) -> Iterator[Call]:
        while (call := self._current) is not None:
            yield call
            if self._current is call:
                if not call.last:
                    raise RuntimeError("give the output of a call before asking for the next one")
                self._calls.close()
                self._current = None

    def give(self, output: Tensor) -> None:
        """Take the policy's output at the current call, [B, …]; only its detached value is used."""
        try:
            self._current = self._calls.send(output.detach())
        except StopIteration:
            self._current = None

    @torch.no_grad()
    def run(self, model: Model) -> list[NoisyLatents]:
        """Drive the inversion with `model` and return its training samples; no call at the end."""
        points = []
        for call in self:
            if call.target is not None:
                points.append(NoisyLatents(call.latents, call.target, call.timesteps))
            if not call.last:
                self.give(model(call.latents, call.timesteps))
        return points


def noising(
    clean: Tensor,
    grid: Timesteps,
    schedule: NoiseSchedule,
    *,
    train_at: Sequence[int] | None = None,
    generator: Generators = None,
    impl: ops.Impl = "auto",
    shared: bool = True,
) -> Trajectory:
    """q(x_t|x_0), no inversion: every level of `train_at` with noise of its own.

    Args:
        clean, grid, schedule, train_at, impl: see `ddim_inversion_path`.
        generator: of the noise.
        shared: winners, the first half of the batch, and losers share their noise
            (Diffusion-DPO); else every sample has its own (SFT, KTO).

    Raises:
        ValueError: naming the argument.
    """
    path = _Path(clean, grid, schedule, train_at, impl)
    if shared and len(clean) % 2:
        raise ValueError(f"clean must be [2P, …] for shared noise, got {tuple(clean.shape)}")

    def calls() -> Calls:
        for node in path.train_at:
            shape = (len(clean) // 2 if shared else len(clean), *clean.shape[1:])
            noise = normal(shape, clean.device, generator)
            noise = torch.cat([noise, noise]) if shared else noise
            point = q_sample(clean, noise, path.timesteps[node - 1], schedule, impl=impl)
            last = node == path.train_at[-1]
            yield Call(point.latents, point.timesteps, point.target, last)

    return Trajectory(calls())


def ddim_inversion_path(
    clean: Tensor,
    grid: Timesteps,
    schedule: NoiseSchedule,
    *,
    train_at: Sequence[int] | None = None,
    generator: Generators = None,
    impl: ops.Impl = "auto",
    eta: float = 0.0,
) -> Trajectory:
    """DDIM inversion by the current policy (InPO, Lu et al. 2025); the grid ends at t exactly.

        z_{k+1} = α_{k+1} x̂_k + √(σ_{k+1}² − s²) ε̂_k + s ξ,
        s² = η² (σ_k²/σ_{k+1}²) (σ_{k+1}² − (α_{k+1} σ_k/α_k)²)

    With η > 0 the direction term shrinks as in η-DDIM (Song et al. 2021, eq. 12), so the level of
    noise stays that of t; the official script adds the noise on top.

    Args:
        clean: [B, …] x_0, as node 0.
        grid: [n, B] level indices t of nodes 1 … n, rising, each sample with its own.
        schedule: a training schedule.
        train_at: nodes in 1 … n that are training samples; (n,), the paper, by default. Steps after
            the last are not run.
        generator: of the noise ξ.
        impl: backend of the operators.
        eta: η in [0, 1].

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    path = _Path(clean, grid, schedule, train_at, impl)
    rows, deviation = ddim_rows(schedule, path.nodes, eta)
    coef, noise_scale = path.upload(rows, deviation)

    def calls() -> Calls:
        z = path.clean
        for k in range(path.last):
            output = yield path.call(k, z)
            z = path.update(z, coef[k], output)
            if eta:
                z.addcmul_(path.column(noise_scale[k]), normal(z.shape, z.device, generator))
        yield path.call(path.last, z)

    return Trajectory(calls())


def bdia_inversion_path(
    clean: Tensor,
    grid: Timesteps,
    schedule: NoiseSchedule,
    *,
    train_at: Sequence[int] | None = None,
    generator: Generators = None,
    impl: ops.Impl = "auto",
    gamma: float = 1.0,
) -> Trajectory:
    """BDIA inversion (Zhang, Lewis and Kleijn 2024, eq. 15, solved for z_{k+1}), one call a step.

    The first step is DDIM. γ in (0, 1] magnifies a perturbation up to γ^−n. Other arguments as in
    `ddim_inversion_path`; there is no noise, so the generator is not read.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    path = _Path(clean, grid, schedule, train_at, impl)
    first, _ = ddim_rows(schedule, path.nodes[:2], 0.0)
    rows = bdia_rows(schedule, path.nodes, float(rational(gamma)))
    coef, coef_first = path.upload(rows, first)

    def calls() -> Calls:
        before, z = path.clean, path.clean
        for k in range(path.last):
            output = yield path.call(k, z)
            if k == 0:
                before, z = z, path.update(z, coef_first[0], output)
            else:
                following = ops.affine_inverse(before, z, coef[k - 1], output, impl=impl)
                before, z = z, following
        yield path.call(path.last, z)

    return Trajectory(calls())


def renoise_inversion_path(
    clean: Tensor,
    grid: Timesteps,
    schedule: NoiseSchedule,
    *,
    train_at: Sequence[int] | None = None,
    generator: Generators = None,
    impl: ops.Impl = "auto",
    eta: float = 0.0,
) -> Trajectory:
    """ReNoise as in SmPO (Lu et al. 2025; Garibi et al. 2024 with one iteration): two calls a step.

    A DDIM step gives a provisional z'_{k+1}; the model is called on it at the *same* timestep t_k,
    and the step is repeated from z_k with the mean of both outputs. Arguments as in
    `ddim_inversion_path`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    path = _Path(clean, grid, schedule, train_at, impl)
    rows, deviation = ddim_rows(schedule, path.nodes, eta)
    plain, _ = ddim_rows(schedule, path.nodes, 0.0)
    half, rest = rows.copy(), np.zeros_like(rows)
    half[..., 2] /= 2
    rest[..., 0], rest[..., 2] = 1, half[..., 2]
    coef, coef_half, coef_rest, noise_scale = path.upload(plain, half, rest, deviation)

    def calls() -> Calls:
        z = path.clean
        for k in range(path.last):
            output = yield path.call(k, z)
            provisional = path.update(z, coef[k], output)
            # the first output is read here, before the second call may overwrite it
            z = path.update(z, coef_half[k], output)
            output = yield Call(provisional, path.times[k], None, False)
            z = path.update(z, coef_rest[k], output)
            if eta:
                z.addcmul_(path.column(noise_scale[k]), normal(z.shape, z.device, generator))
        yield path.call(path.last, z)

    return Trajectory(calls())


class _Path:
    """What the inversions share: the checked grid with its tables on the device."""

    def __init__(
        self,
        clean: Tensor,
        grid: Timesteps,
        schedule: NoiseSchedule,
        train_at: Sequence[int] | None,
        impl: ops.Impl,
    ) -> None:
        self.timesteps = checked_timesteps(grid, clean, schedule, name="grid")  # [n, B]
        if self.timesteps.ndim != 2 or not len(self.timesteps):
            raise ValueError(
                f"grid must be [n, B] with n ≥ 1 steps, got shape {self.timesteps.shape}"
            )
        if (np.diff(self.timesteps, axis=0) <= 0).any():
            raise ValueError("grid must rise from node to node for every sample")
        steps = len(self.timesteps)
        nodes = [steps] if train_at is None else sorted(train_at)
        if not nodes or len(set(nodes)) < len(nodes) or not 1 <= nodes[0] <= nodes[-1] <= steps:
            raise ValueError(f"train_at must be different nodes in 1 … {steps}, got {train_at}")
        self.train_at = nodes
        self.last = nodes[-1]
        self.schedule, self.impl = schedule, impl
        self.clean = clean.detach().float()
        clean_node = np.zeros_like(self.timesteps[:1])
        self.nodes = np.concatenate([clean_node, self.timesteps[: self.last] + 1])  # [last+1, B]
        self._target_rows = target_rows(schedule, self.nodes[1:])  # [last, B, 4]

    def upload(self, *tables: Array) -> list[Tensor]:
        """The tables on the device, and beside them the times, [last+1, B], and targets."""
        *given, times, self.targets = upload(
            [*tables, self.schedule.timesteps[self.nodes], self._target_rows], self.clean.device
        )
        self.times = model_times(self.schedule, times)
        return given

    def call(self, node: int, z: Tensor) -> Call:
        """The call at a node, [B, …]."""
        target = None
        if node in self.train_at:
            target = ops.affine_update(z, self.clean, self.targets[node - 1], impl=self.impl)
        return Call(z, self.times[node], target, node == self.last)

    def update(self, z: Tensor, coef: Tensor, output: Tensor | None) -> Tensor:
        """a z + b z + c m, [B, …]; a is 0 where the step starts from z."""
        return ops.affine_update(z, z, coef, output, impl=self.impl)

    def column(self, values: Tensor) -> Tensor:
        """[B] as [B, 1, …]."""
        return values.view(-1, *[1] * (self.clean.ndim - 1))


def ddim_rows(schedule: NoiseSchedule, nodes: NDArray[np.int64], eta: float) -> tuple[Array, Array]:
    """Coefficients (0, b, c, 0), [n, B, 4], and s, [n, B], of the steps between nodes [n+1, B]."""
    i, j = nodes[:-1], nodes[1:]
    alpha, sigma, scale = schedule.alpha, schedule.sigma, schedule.scale
    # for a variance-preserving schedule the bracket is 1 − ᾱ_j/ᾱ_i
    posterior = sigma[i] / sigma[j] * np.sqrt(sigma[j] ** 2 - (alpha[j] / alpha[i] * sigma[i]) ** 2)
    deviation = eta * posterior
    kept = np.sqrt(sigma[j] ** 2 - deviation**2)
    # α_j x̂ + kept ε̂ with x̂ and ε̂ read from z and the field of the schedule's coordinate
    skip = (alpha[j] + (kept if schedule.velocity_form else 0)) / scale[i]
    gain = (kept * alpha[i] - alpha[j] * sigma[i]) / scale[i]
    return _rows(schedule, i, np.zeros_like(skip), skip, gain), deviation


def bdia_rows(schedule: NoiseSchedule, nodes: NDArray[np.int64], gamma: float) -> Array:
    """Coefficients (γ, b, c, 0), [n−1, B, 4], of z_{i−1} = γ z_{i+1} + b z_i + c m_i at the inner
    nodes."""
    h, i, j = nodes[:-2], nodes[1:-1], nodes[2:]
    scale, tau = schedule.scale, schedule.tau
    skip = (scale[h] - gamma * scale[j]) / scale[i]
    gain = scale[h] * (tau[h] - tau[i]) - gamma * scale[j] * (tau[j] - tau[i])
    return _rows(schedule, i, np.full_like(skip, gamma), skip, gain)


def _rows(
    schedule: NoiseSchedule, at: NDArray[np.int64], a: Array, skip: Array, gain: Array
) -> Array:
    b, c = skip + gain * schedule.field_z[at], gain * schedule.field_m[at]
    return np.stack([a, b, c, np.zeros_like(a)], axis=-1)


def normal(
    shape: Sequence[int],
    device: torch.device,
    generator: Generators,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers [B, …] on `device`, drawn where the generator lives.

    Of G generators, number g makes samples g, g + G, …: with one for every pair the noise of a pair
    does not depend on what else the batch holds.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        drawn = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    else:
        count = len(generator)
        if count == 0 or shape[0] % count:
            raise ValueError(f"generator must be one for each of {shape[0]} samples, got {count}")
        rows = [
            torch.randn(tuple(shape[1:]), generator=own, device=own.device, dtype=dtype)
            for _ in range(shape[0] // count)
            for own in generator
        ]
        drawn = torch.stack(rows)
    if drawn.device.type == "cpu" and device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
