"""Preference training: the pairs, where the noisy latents come from, and the trainer."""

from .batch import PairBatch
from .cache import CachedPairs, CacheWriter, training_key
from .config import ConfigError, PreferenceConfig
from .encoders import Encoders, ModelFiles
from .examine import Report, Rules
from .images import Preprocess
from .inversion import SOURCES, Source, ddim_inversion
from .latents import NoisyLatents, q_sample, training_schedule
from .live import LivePairs
from .loader import PairData
from .official import official_inversion_path
from .optimization import TrainingError
from .order import BatchOrder
from .pairs import DataError, PreferencePair, Ties
from .sources import open_source
from .stored import MemoryPairs, Scaling
from .timesteps import Draw, TimestepSampler, even_grid, inversion_depth
from .trainer import PreferenceTrainer
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
    "BatchOrder",
    "CacheWriter",
    "CachedPairs",
    "Call",
    "ConfigError",
    "DataError",
    "Draw",
    "Encoders",
    "LivePairs",
    "MemoryPairs",
    "ModelFiles",
    "NoisyLatents",
    "PairBatch",
    "PairData",
    "PreferenceConfig",
    "PreferencePair",
    "PreferenceTrainer",
    "Preprocess",
    "Report",
    "Rules",
    "Scaling",
    "Source",
    "Ties",
    "TimestepSampler",
    "TrainingError",
    "Trajectory",
    "bdia_inversion_path",
    "ddim_inversion",
    "ddim_inversion_path",
    "even_grid",
    "inversion_depth",
    "noising",
    "official_inversion_path",
    "open_source",
    "q_sample",
    "renoise_inversion_path",
    "training_key",
    "training_schedule",
]
