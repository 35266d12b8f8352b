"""Preference training: the pairs, and where the noisy latents come from."""

from .batch import PairBatch
from .cache import CachedPairs, CacheWriter, training_key
from .encoders import Encoders, ModelFiles
from .examine import Report, Rules
from .images import Preprocess
from .latents import NoisyLatents, ddim_inversion, q_sample
from .live import LivePairs
from .loader import PairData
from .order import BatchOrder
from .pairs import DataError, PreferencePair, Ties
from .sources import open_source
from .stored import MemoryPairs, Scaling

__all__ = [
    "BatchOrder",
    "CacheWriter",
    "CachedPairs",
    "DataError",
    "Encoders",
    "LivePairs",
    "MemoryPairs",
    "ModelFiles",
    "NoisyLatents",
    "PairBatch",
    "PairData",
    "PreferencePair",
    "Preprocess",
    "Report",
    "Rules",
    "Scaling",
    "Ties",
    "ddim_inversion",
    "open_source",
    "q_sample",
    "training_key",
]
