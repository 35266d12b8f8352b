"""Noisy latents for preference training: where x_t and its target τ come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..sampler import Model
from ..schedule import Array, NoiseSchedule, PredictionType
from ..solvers import ddim


class NoisyLatents(NamedTuple):
    """A training point of every sample."""

    latents: Tensor
    """[B, …] x_t, float32."""
    target: Tensor
    """[B, …] τ, what a perfect one-step model would return at x_t, float32."""


def q_sample(
    clean: Tensor,
    noise: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Array,
    *,
    prediction_type: PredictionType = "epsilon",
) -> NoisyLatents:
    """x_t = α_t x_0 + σ_t ε, as Diffusion-DPO does.

    Args:
        clean: [B, …] x_0.
        noise: [B, …] ε; a pair shares it.
        timesteps: [B] t of each sample.
        alphas_cumprod: [T] float64 table of ᾱ_t.
        prediction_type: `epsilon` (τ = ε) or `v_prediction` (τ = α ε − σ x_0).
    """
    _require(prediction_type)
    if noise.shape != clean.shape:
        raise ValueError(
            f"noise must have the shape of clean, {tuple(clean.shape)}, got {tuple(noise.shape)}"
        )
    checked = _checked(timesteps, clean, alphas_cumprod)
    alpha, sigma = _levels(clean, checked, alphas_cumprod)
    latents = alpha * clean.float() + sigma * noise.float()
    return NoisyLatents(
        latents, _target(clean.float(), noise.float(), alpha, sigma, prediction_type)
    )


@torch.no_grad()
def ddim_inversion(
    model: Model,
    clean: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Array,
    *,
    num_steps: int,
    prediction_type: PredictionType = "epsilon",
    impl: ops.Impl = "auto",
) -> NoisyLatents:
    """x_t by DDIM inversion of x_0 with the current policy (InPO, Lu et al. 2025).

    Every sample is inverted on its own grid of `num_steps` steps from clean data to exactly its own
    t; then τ = (x_t − α_t x_0)/σ_t for `epsilon`, in float32 from float64 tables. The official
    script instead leaves x_t up to 99 timesteps away from the t that it tells the model.

    Args:
        model: the policy, called on [B, …] float32 samples with [B] timesteps; conditional, no
            guidance.
        clean: [B, …] x_0.
        timesteps: [B] t of each sample, at least `num_steps` where more than one step is asked for.
        alphas_cumprod: [T] float64 table of ᾱ_t.
        num_steps: n, the same for the batch, so that it keeps one shape; see `inversion_depth`.
        prediction_type: `epsilon` or `v_prediction`.
        impl: backend of the operators.

    Raises:
        ValueError: naming the argument; a grid that would take two steps within one timestep.
    """
    _require(prediction_type)
    checked = _checked(timesteps, clean, alphas_cumprod)
    alpha, sigma = _levels(clean, checked, alphas_cumprod)
    grids = [_program_rows(t, num_steps, alphas_cumprod, prediction_type) for t in checked]
    device = clean.device
    coef = np.stack([rows for rows, _ in grids], axis=1)  # [n, B, 4]
    times = np.stack([grid for _, grid in grids], axis=1)  # [n, B]
    coef_rows = torch.from_numpy(coef).to(device, torch.float32).unbind()
    time_rows = torch.from_numpy(times).to(device).unbind()
    latents = clean.float()
    for row, time in zip(coef_rows, time_rows, strict=True):
        latents = ops.affine_update(latents, latents, row, model(latents, time), impl=impl)
    noise = (latents - alpha * clean.float()) / sigma
    return NoisyLatents(latents, _target(clean.float(), noise, alpha, sigma, prediction_type))


def inversion_depth(timestep: int, num_train_timesteps: int = 1000, max_steps: int = 10) -> int:
    """n = ⌈t · max_steps / T⌉, at least 1: inversion steps of the paper's grid that reach t."""
    return max(1, math.ceil(timestep * max_steps / num_train_timesteps))


def _program_rows(
    timestep: int, num_steps: int, alphas_cumprod: Array, prediction_type: PredictionType
) -> tuple[Array, Array]:
    """([n, 4] coefficients, [n] int64 model times) of DDIM inversion from clean data to
    `timestep`."""
    if not 1 <= num_steps <= max(1, timestep):
        raise ValueError(
            f"num_steps must be in 1 … {max(1, timestep)} for the timestep {timestep}, so that no "
            f"two steps fall within one timestep, got {num_steps}"
        )
    grid = [round(timestep * k / num_steps) for k in range(num_steps, 0, -1)]
    schedule = NoiseSchedule.from_alphas_cumprod(
        alphas_cumprod, timesteps=grid, prediction_type=prediction_type
    )
    program = ddim(schedule, direction="invert")
    times = np.array([round(update.timestep) for update in program.updates])
    return program.coefficients(), times


def _checked(timesteps: Sequence[int], clean: Tensor, table: Array) -> list[int]:
    given = np.asarray(timesteps)
    if given.shape != clean.shape[:1]:
        raise ValueError(
            f"timesteps must have one entry a sample, {clean.shape[0]}, got shape {given.shape}"
        )
    if given.dtype.kind not in "iu" or not ((given >= 0) & (given < len(table))).all():
        raise ValueError(
            f"timesteps must be integers in 0 … {len(table) - 1}, got {given.tolist()}"
        )
    values: list[int] = given.tolist()
    return values


def _levels(clean: Tensor, timesteps: list[int], table: Array) -> tuple[Tensor, Tensor]:
    """α_t and σ_t, [B, 1, …] float32, rounded once from float64."""
    bar = torch.from_numpy(np.asarray(table, dtype=np.float64)[timesteps])
    shape = (-1, *[1] * (clean.ndim - 1))
    alpha, sigma = bar.sqrt().view(shape), (1 - bar).sqrt().view(shape)
    return alpha.to(clean.device, torch.float32), sigma.to(clean.device, torch.float32)


def _require(kind: PredictionType) -> None:
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon or v_prediction, got {kind!r}")


def _target(
    clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionType
) -> Tensor:
    return noise if kind == "epsilon" else alpha * noise - sigma * clean
