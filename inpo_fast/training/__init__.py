"""Preference training: where the noisy latents come from."""

from .latents import NoisyLatents, ddim_inversion, q_sample

__all__ = ["NoisyLatents", "ddim_inversion", "q_sample"]
