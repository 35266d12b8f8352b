"""From the config to pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import ConfigError, PreferenceConfig
from .loader import PairData
from .models import Model


def open_pairs(
    config: PreferenceConfig, model: Model, given: Any, device: torch.device, dtype: torch.dtype
) -> PairData:
    """The pairs that the config names, or those given.

    A cache is read as it is, after its key has been compared with the model's files and the config;
    anything else is decoded and encoded while training.

    Args:
        given: `PairData`, or what `sources.open_source` takes; None for the config's.
        device: of the encoders.
        dtype: of the encoders.

    Raises:
        ConfigError, DataError: no data set is named, or see `LivePairs` and `CachedPairs`.
    """
    if isinstance(given, PairData):
        return given
    from .cache import CachedPairs, is_cache, training_key
    from .encoders import Encoders, ModelFiles
    from .examine import Rules
    from .images import Preprocess
    from .live import LivePairs
    from .pairs import Ties
    from .sources import open_source

    source = config.dataset_name if given is None else given
    if source is None:
        raise ConfigError(
            "dataset_name must name a data set, a file, a folder or a cache, got none"
        )
    try:
        preprocess = Preprocess.of_flags(
            resolution=config.resolution or model.resolution,
            aspect_ratio_buckets=config.aspect_ratio_buckets,
            random_crop=config.random_crop,
            no_hflip=config.no_hflip,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rules = Rules(preprocess, Ties(config.ties, config.seed))

    def files() -> ModelFiles:
        return ModelFiles.find(
            config.pretrained_model_name_or_path,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
        )

    if isinstance(source, (str, Path)) and is_cache(source):
        return CachedPairs(source, training_key(files(), rules))
    if model.loaded is None:
        encoders = Encoders.load(files(), dtype=dtype, device=device)
    else:
        encoders = Encoders(model.loaded)
    return LivePairs(
        open_source(source, split=config.dataset_split_name),
        rules,
        encoders,
        num_workers=config.dataloader_num_workers,
    )
