"""Preference training: where the noisy latents come from."""

from .inversion import SOURCES, Source, ddim_inversion
from .latents import NoisyLatents, q_sample, training_schedule
from .official import official_inversion_path
from .timesteps import Draw, TimestepSampler, even_grid, inversion_depth
from .trajectory import (
    Call,
    Trajectory,
    bdia_inversion_path,
    ddim_inversion_path,
    noising,
    renoise_inversion_path,
)

__all__ = [
    "SOURCES",
    "Call",
    "Draw",
    "NoisyLatents",
    "Source",
    "TimestepSampler",
    "Trajectory",
    "bdia_inversion_path",
    "ddim_inversion",
    "ddim_inversion_path",
    "even_grid",
    "inversion_depth",
    "noising",
    "official_inversion_path",
    "q_sample",
    "renoise_inversion_path",
    "training_schedule",
]
