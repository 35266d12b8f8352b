"""From the config to pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cache import CachedPairs, is_cache, training_key
from .config import ConfigError, PreferenceConfig
from .encoders import Encoders, ModelFiles
from .examine import Catalogue, Rules
from .families import check_sizes
from .live import LivePairs
from .loader import PairData
from .models import Model
from .pairs import DataError, Ties
from .sources import open_source


def open_pairs(
    config: PreferenceConfig, model: Model, given: Any, accelerator: Any, dtype: torch.dtype
) -> PairData:
    """The pairs that the config names, or those given.

    A cache is read as it is, after its key has been compared with the model's files and the config;
    anything else is decoded and encoded while training.

    Args:
        given: `PairData`, or what `sources.open_source` takes; None for the config's.
        accelerator: of the run; its main process looks through the images, for all.
        dtype: of the encoders.

    Raises:
        ConfigError, DataError: no data set is named, labels of given pairs that the objective would
            take as sure, or see `LivePairs` and `CachedPairs`.
    """
    if isinstance(given, PairData):
        if not given.sure:
            config.check_soft_labels("dataset with labels other than 1")
        return given
    source = config.dataset_name if given is None else given
    if source is None:
        raise ConfigError(
            "dataset_name must name a data set, a file, a folder or a cache, got none"
        )
    try:
        check_sizes(model.pipeline, model.preprocess.buckets)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rules = Rules(model.preprocess, Ties(config.ties, config.seed))

    def files() -> ModelFiles:
        return ModelFiles.find(
            config.pretrained_model_name_or_path,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
        )

    if isinstance(source, (str, Path)) and is_cache(source):
        if config.dataset_split_name is not None:
            raise ConfigError(
                f"dataset_split_name must not be given with a cache, which has no splits, got "
                f"{config.dataset_split_name}"
            )
        if not config.pretrained_model_name_or_path:
            raise ConfigError(
                "pretrained_model_name_or_path must name the model with whose files the cache was "
                "made, also where a loaded pipeline is given, got none"
            )
        return CachedPairs(source, training_key(files(), rules))
    if model.loaded is None:
        encoders = Encoders.load(files(), dtype=dtype, device=accelerator.device)
    else:
        encoders = Encoders(model.loaded).to(accelerator.device)
    opened = open_source(
        source, split=config.dataset_split_name, max_samples=config.max_train_samples
    )

    def look() -> Catalogue:
        return Catalogue.of(opened, rules, num_workers=config.dataloader_num_workers)

    return LivePairs(opened, rules, encoders, catalogue=_once(accelerator, look))


def _once(accelerator: Any, make: Callable[[], Catalogue]) -> Catalogue:
    """What the main process makes, on all of them; what it raises too."""
    from accelerate.utils import broadcast_object_list

    made: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            made[0] = make()
        except DataError as error:
            made[0] = error
    broadcast_object_list(made)
    if isinstance(made[0], DataError):
        raise made[0]
    catalogue: Catalogue = made[0]
    return catalogue
