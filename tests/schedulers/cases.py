"""Schedulers, configs and a model that the tests share."""

import torch

from inpo_fast import bdia, edict, obelm
from inpo_fast.schedulers import (
    BDIAInverseScheduler,
    BDIAScheduler,
    EDICTInverseScheduler,
    EDICTScheduler,
    OBELMInverseScheduler,
    OBELMScheduler,
)

PAIRS = {
    "bdia": (BDIAScheduler, BDIAInverseScheduler, bdia),
    "obelm": (OBELMScheduler, OBELMInverseScheduler, obelm),
    "edict": (EDICTScheduler, EDICTInverseScheduler, edict),
}
"""Scheduler, inverse and solver by name."""

FORWARD = [forward for forward, _, _ in PAIRS.values()]
INVERSE = [inverse for _, inverse, _ in PAIRS.values()]
CLASSES = FORWARD + INVERSE

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(z, t):
    """A smooth model that depends on its input and on the time."""
    wide = z if z.dtype == torch.float64 else z.float()
    time = torch.as_tensor(t, dtype=wide.dtype, device=z.device) / 1000
    return (0.5 * torch.tanh(wide.roll(1, -1)) + 0.3 * time * wide).to(z.dtype)


def loop(scheduler, sample, model=model, timesteps=None, between=None):
    """What a pipeline does; `between` changes the latents after each step."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample).prev_sample
        if between is not None:
            sample = between(sample)
    return sample
