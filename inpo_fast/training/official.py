"""Inversion exactly as the official InPO script does it, with its faults, to reproduce its numbers.

JaydenLyh/InPO train.py under diffusers 0.20 with `set_alpha_to_one=False`. For anything but a
comparison use `ddim_inversion_path`. What differs from it:

- the grid is [−99, 1, 101, …, 801] (10 steps) whatever t is; the entries below the t of the *first*
  sample are run for the whole batch, so x_t ends up to 99 timesteps from the t that the model is
  told;
- the first call is at the timestep −99, with the level of ᾱ_0;
- ᾱ is 16-bit in the target and in the noise (1−ᾱ is formed after rounding), float32 in the steps;
- noise with 0.1 of the posterior deviation is added on top of the whole deterministic step;
- the latents are 16-bit before the first step and at the end, float32 in between;
- the target takes ᾱ at the t of the first sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..schedule import NoiseSchedule
from .latents import Timesteps, checked_timesteps
from .trajectory import Call, Calls, Generators, Trajectory, normal

GRID_OFFSET = 1
"""`steps_offset` of Stable Diffusion's scheduler file."""


def official_inversion_path(
    clean: Tensor,
    grid: Timesteps,
    schedule: NoiseSchedule,
    *,
    train_at: Sequence[int] | None = None,
    generator: Generators = None,
    impl: ops.Impl = "auto",
    num_steps: int = 10,
    eta: float = 0.1,
    dtype: torch.dtype = torch.float16,
) -> Trajectory:
    """DDIM inversion of the official script.

    Args:
        clean: [B, …] x_0.
        grid: [n, B]; only its last row, the sampled t, is read.
        schedule: a training schedule of an epsilon model.
        train_at: None; the script trains at the end only.
        generator: of the noise.
        impl: not used: the arithmetic is the script's own, in plain torch.
        num_steps: steps of the whole grid: 10, in SmPO's script 5 for SD1.5.
        eta: factor of the noise, hard-coded to 0.1 in the script.
        dtype: `weight_dtype` of the script: float16, or float32 without mixed precision. Where
            1−ᾱ is 0 in it, as at Stable Diffusion's first timesteps in bfloat16, every latent of
            the script is NaN, and this raises.

    Raises:
        ValueError: naming the argument.
    """
    timesteps = checked_timesteps(grid, clean, schedule, name="grid")
    if timesteps.ndim != 2 or not len(timesteps):
        raise ValueError(f"grid must be [n, B], got shape {timesteps.shape}")
    if schedule.kind != "vp" or schedule.prediction_type != "epsilon":
        raise ValueError(
            "the official script needs a variance-preserving schedule of an epsilon model, got "
            f"{schedule.kind} and {schedule.prediction_type}"
        )
    if train_at is not None:
        raise ValueError(f"the official script trains at the end only, got train_at {train_at}")
    sampled = timesteps[-1]
    total = schedule.num_steps
    stride = total // num_steps
    levels = [k * stride - stride + GRID_OFFSET for k in range(num_steps)]
    levels = [t for t in levels if t < sampled[0]]
    # the square of the float64 root rounds back to the float32 that the scheduler has
    wide = torch.from_numpy(schedule.alpha[1:] ** 2).float()  # [T]
    # 0-d tensors on the host, as scalars of the scheduler's arithmetic: no copy to the device
    narrow = wide.to(dtype)
    least = 1 - schedule.alpha[1 : GRID_OFFSET + 2].max() ** 2
    if least <= torch.finfo(dtype).eps / 4:  # ᾱ rounds to 1
        raise ValueError(
            "dtype must hold 1 − ᾱ, by which the official script divides, at the first timesteps: "
            f"{least:.1e} of this schedule is 0 in {dtype}"
        )

    def level(t: int, table: Tensor) -> Tensor:
        """ᾱ_t, of the untouched table where t is negative."""
        return table[t] if t >= 0 else wide[0]

    def calls() -> Calls:
        start = clean.detach().to(dtype)
        z = start
        for t in levels:
            times = torch.full((len(clean),), t, dtype=torch.int64, device=clean.device)
            output = yield Call(z, times, None, False)
            assert output is not None
            alpha, following = level(t, wide), wide[t + stride]
            data = (z - (1 - alpha) ** 0.5 * output) / alpha**0.5
            z = following**0.5 * data + (1 - following) ** 0.5 * output
            before, after = level(t, narrow), narrow[t + stride]
            variance = (1 - before) / (1 - after) * (1 - after / before)
            noise = normal(z.shape, z.device, generator, dtype)
            z += eta * noise * variance**0.5
        alpha = narrow[sampled[0]]
        target = (z - start * alpha**0.5) / (1 - alpha) ** 0.5
        times = torch.from_numpy(sampled).to(clean.device, non_blocking=True)
        yield Call(z.to(dtype), times, target.float(), True)

    return Trajectory(calls())
