"""Noisy latents for preference training: where x_t and its target τ come from.

A *training schedule* has one node for every noise level that the model is trained on: node 0 is
clean data and node t+1 is the level with index t = 0 … T−1. For Stable Diffusion t is the model's
timestep; for a flow model level t has s = (t+1)/T, shifted, and the model's time is what the
schedule says. Whatever the prediction type, with z_t = α_t x_0 + σ_t ε the target is linear in
(z_t, x_0):

    epsilon  τ = (z_t − α_t x_0)/σ_t      v  τ = (α_t z_t − x_0)/σ_t      flow  τ = (z_t − x_0)/σ_t

All tables are float64 on the host, vectorised over batch and steps, and go to the device in one
copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..schedule import Array, NoiseSchedule

Timesteps: TypeAlias = "Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64] | Tensor"
"""Integers on the host: lists, arrays or CPU tensors."""


class NoisyLatents(NamedTuple):
    """A training point of every sample."""

    latents: Tensor
    """[B, …] x_t, float32."""
    target: Tensor
    """[B, …] τ, what a perfect one-step model would return at x_t, float32."""
    timesteps: Tensor
    """[B] the model's time, int64, or float32 where it is not an index of a table (flow models)."""


def training_schedule(scheduler: Any) -> NoiseSchedule:
    """The levels that a diffusers scheduler trains on, with the prediction type of its model.

    Flow-matching schedulers give s = (t+1)/T with their static `shift`; a dynamic shift depends on
    the image size and is left to the caller (`NoiseSchedule.flow`).

    Raises:
        TypeError, ValueError: see `NoiseSchedule.from_diffusers`.
    """
    config = getattr(scheduler, "config", None)
    if config is not None and "FlowMatch" in type(scheduler).__name__:
        total = config.num_train_timesteps
        shift = 1.0 if getattr(config, "use_dynamic_shifting", False) else config.shift
        return NoiseSchedule.flow(total, shift=shift, num_train_timesteps=total)
    table = getattr(scheduler, "alphas_cumprod", ())
    return NoiseSchedule.from_diffusers(scheduler, timesteps=range(len(table) - 1, -1, -1))


def q_sample(
    clean: Tensor,
    noise: Tensor,
    timesteps: Timesteps,
    schedule: NoiseSchedule,
    *,
    impl: ops.Impl = "auto",
) -> NoisyLatents:
    """x_t = α_t x_0 + σ_t ε, as Diffusion-DPO does.

    Args:
        clean: [B, …] x_0.
        noise: [B, …] ε; a pair shares it.
        timesteps: [B] t of each sample.
        schedule: a training schedule.
        impl: backend of the operators.
    """
    if noise.shape != clean.shape:
        raise ValueError(
            f"noise must have the shape of clean, {tuple(clean.shape)}, got {tuple(noise.shape)}"
        )
    nodes = checked_timesteps(timesteps, clean, schedule) + 1  # [B]
    mix, aim, times = upload(
        [
            rows_of(schedule.alpha[nodes], schedule.sigma[nodes]),
            rows_of(*target_of_noise(schedule, nodes)),
            schedule.timesteps[nodes],
        ],
        clean.device,
    )
    clean, noise = clean.float(), noise.float()
    latents = ops.affine_update(clean, noise, mix, impl=impl)
    target = ops.affine_update(noise, clean, aim, impl=impl)
    return NoisyLatents(latents, target, model_times(schedule, times))


def target_of_noise(schedule: NoiseSchedule, nodes: NDArray[np.int64]) -> tuple[Array, Array]:
    """g and h, […], of τ = g ε + h x_0 at the nodes […]."""
    alpha, sigma = schedule.alpha[nodes], schedule.sigma[nodes]
    match schedule.prediction_type:
        case "epsilon":
            return np.ones_like(alpha), np.zeros_like(alpha)
        case "v_prediction":
            return alpha, -sigma
        case "flow":
            return np.ones_like(alpha), -np.ones_like(alpha)
        case kind:
            raise ValueError(
                "the schedule's prediction_type must be epsilon, v_prediction or flow, got "
                f"{kind!r}"
            )


def target_rows(schedule: NoiseSchedule, nodes: NDArray[np.int64]) -> Array:
    """[…, 4] coefficients of τ = p z_t + q x_0 at the nodes […], with ε = (z_t − α x_0)/σ."""
    g, h = target_of_noise(schedule, nodes)
    alpha, sigma = schedule.alpha[nodes], schedule.sigma[nodes]
    return rows_of(g / sigma, h - g * alpha / sigma)


def rows_of(a: Array, b: Array) -> Array:
    """[…, 4] coefficients (a, b, 0, 0) for the operators."""
    zero = np.zeros_like(a)
    return np.stack([a, b, zero, zero], axis=-1)


def model_times(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Times from a float32 table as the model takes them."""
    return times.long() if schedule.discrete else times


def upload(tables: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The tables as float32 on the device, in one copy that the host does not wait for."""
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables]).astype(np.float32))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def checked_timesteps(
    timesteps: Timesteps, clean: Tensor, schedule: NoiseSchedule, *, name: str = "timesteps"
) -> NDArray[np.int64]:
    """[…, B] level indices, one a sample of `clean` in the last dimension."""
    if not isinstance(clean, Tensor) or not clean.is_floating_point():
        raise TypeError(
            f"clean must be a floating tensor, got {getattr(clean, 'dtype', type(clean))}"
        )
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    if isinstance(timesteps, Tensor) and timesteps.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the host, so that nothing waits for the device, got a tensor on "
            f"{timesteps.device}"
        )
    given = np.asarray(timesteps)
    if given.shape[-1:] != clean.shape[:1]:
        raise ValueError(
            f"{name} must have one entry a sample, {clean.shape[0]}, got shape {given.shape}"
        )
    total = schedule.num_steps
    if given.dtype.kind not in "iu" or not ((given >= 0) & (given < total)).all():
        raise ValueError(f"{name} must be integers in 0 … {total - 1}, got {given.tolist()}")
    return given.astype(np.int64)
