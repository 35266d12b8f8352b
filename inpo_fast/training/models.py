"""From the config, or a loaded pipeline, to the parts that a training needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..losses import OBJECTIVES
from ..schedule import NoiseSchedule
from .batch import PairBatch
from .config import ConfigError, PreferenceConfig
from .families import FAMILIES, Family, own_resolution, schedule_of
from .images import Preprocess


@dataclass
class Model:
    """A pipeline's denoiser with what is needed to train it.

    Attributes:
        denoiser: that is trained.
        schedule: its noise levels.
        pipeline: class of the pipeline, a key of `FAMILIES`.
        preprocess: from images to those of a batch, at the sizes that the schedule is for.
        loaded: the pipeline, where the caller gave one.
        reference: the denoiser to compare with; None where that is the one that is trained, as it
            is at the start.
    """

    denoiser: Any
    schedule: NoiseSchedule
    pipeline: str
    preprocess: Preprocess
    loaded: Any = None
    reference: Any = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline]

    @property
    def latent_channels(self) -> int:
        """Of the latents, before FLUX packs 2 × 2 of them into one token."""
        channels: int = self.denoiser.config.in_channels
        return channels // 4 if self.pipeline == "FluxPipeline" else channels

    def check(self, batch: PairBatch) -> None:
        """Refuse pairs that were encoded for another family, by their shapes and names.

        Raises:
            ConfigError: naming what the denoiser takes and what came.
        """
        family = self.family
        _, channels, *sides = batch.latents.shape
        wrong = []
        if channels != self.latent_channels:
            wrong.append(f"latents of {self.latent_channels} channels, got {channels}")
        if any(side % family.patch for side in sides):
            wrong.append(f"latents whose sides are multiples of {family.patch}, got {sides}")
        if missing := family.outputs.keys() - batch.text.keys():
            wrong.append(f"the text's {', '.join(sorted(missing))}, got {', '.join(batch.text)}")
        if family.time_ids and batch.time_ids is None:
            wrong.append("time_ids, got none")
        if wrong:
            raise ConfigError(
                f"the denoiser of a {self.pipeline} takes {', and '.join(wrong)}: the pairs were "
                "encoded for another model family"
            )


_COPIES = ("to_qkv", "to_kv", "to_added_qkv")
"""What diffusers' `fuse_qkv_projections` makes of the projections of an attention."""


def load_model(config: PreferenceConfig, pipeline: Any, dtype: torch.dtype) -> Model:
    """Load the denoiser and scheduler that the config names, or take those of a pipeline.

    Args:
        config: of the run.
        pipeline: or None.
        dtype: of weights that stay frozen under a LoRA; others are loaded in float32.

    Raises:
        ConfigError: nothing can be loaded, a family that cannot be trained so, or a pipeline whose
            QKV projections are fused.
    """
    name = _class_in_index(config) if pipeline is None else type(pipeline).__name__
    if name not in FAMILIES:
        raise ConfigError(
            f"the model must be a pipeline of one of the classes {', '.join(FAMILIES)}, got {name}"
        )
    family = FAMILIES[name]
    if config.rank is None and not family.full:
        raise ConfigError(f"rank must be given: a {name} is trained by LoRA only")
    options = {"dtype": torch.float32 if config.rank is None else dtype}
    parts = _denoiser_and_scheduler(config, family, options) if pipeline is None else pipeline
    denoiser, reference = getattr(parts, family.component), None
    if any(hasattr(part, copy) for part in denoiser.modules() for copy in _COPIES):
        raise ConfigError(
            "the pipeline must not have fused QKV projections, which copy weights that would then "
            "be trained in vain; unfuse_qkv_projections may leave the copies, so load it anew"
        )
    if config.unet_init is not None:
        reference = denoiser if OBJECTIVES[config.loss_type].starts_apart else None
        denoiser = other_denoiser(config.unet_init, type(denoiser), family.component, options)
    preprocess = preprocess_of(config, denoiser)
    try:
        schedule = schedule_of(parts.scheduler, preprocess.buckets)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the model's scheduler cannot be trained on: {error}") from error
    return Model(denoiser, schedule, name, preprocess, pipeline, reference)


def preprocess_of(config: PreferenceConfig, denoiser: Any) -> Preprocess:
    """What the config says of the images; without a size, that which the denoiser was made for.

    Raises:
        ConfigError: no size, or one that cannot be.
    """
    resolution = config.resolution
    if resolution is None and config.aspect_ratio_buckets is None:
        try:
            resolution = own_resolution(denoiser.config)
        except ValueError as error:
            raise ConfigError(f"resolution must be given: {error}") from error
    try:
        return Preprocess.of_flags(
            resolution=resolution,
            aspect_ratio_buckets=config.aspect_ratio_buckets,
            random_crop=config.random_crop,
            no_hflip=config.no_hflip,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def pipeline_class(name: str) -> Any:
    """The pipeline's class by name."""
    return getattr(importlib.import_module("diffusers"), name)


def _class_in_index(config: PreferenceConfig) -> str:
    name: str = _index(config)["_class_name"]
    return name


def _index(config: PreferenceConfig) -> dict[str, Any]:
    """model_index.json."""
    from diffusers import DiffusionPipeline

    where = config.pretrained_model_name_or_path
    if not where:
        raise ConfigError("pretrained_model_name_or_path must be a folder or a name, got none")
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(where, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained_model_name_or_path {where} is no pipeline in diffusers' format: {error}"
        ) from error
    return index


def _denoiser_and_scheduler(
    config: PreferenceConfig, family: Family, options: dict[str, Any]
) -> Any:
    """A pipeline without its other parts."""
    # a part that is given as None is not read
    others = {
        part: None
        for part, kind in _index(config).items()
        if isinstance(kind, (list, tuple)) and part not in (family.component, "scheduler")
    }
    where = config.pretrained_model_name_or_path
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            where, revision=config.revision, variant=config.variant, **others, **options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained_model_name_or_path {where} cannot be loaded: {error}"
        ) from error


def subfolder_of(where: str, component: str) -> str | None:
    """Where the denoiser `where` has its files: in a subfolder `component`, as that of a pipeline
    on the hub has, or, None, in the folder itself."""
    here = Path(where)
    return component if not here.is_dir() or (here / component).is_dir() else None


def other_denoiser(where: str, kind: Any, component: str, options: dict[str, Any]) -> Any:
    """The denoiser of `unet_init`.

    Args:
        where: a folder or a pipeline's name on the hub; see `subfolder_of`.
        kind: class of the denoiser.
        options: of its `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(where, subfolder=subfolder_of(where, component), **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"unet_init {where} cannot be loaded: {error}") from error
