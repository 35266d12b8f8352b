"""Preference training: the pairs, and where the noisy latents come from."""

from .batch import PairBatch
from .latents import NoisyLatents, ddim_inversion, q_sample
from .loader import PairData
from .order import BatchOrder
from .stored import MemoryPairs, Scaling

__all__ = [
    "BatchOrder",
    "MemoryPairs",
    "NoisyLatents",
    "PairBatch",
    "PairData",
    "Scaling",
    "ddim_inversion",
    "q_sample",
]
