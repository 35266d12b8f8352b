"""The result of a run: weights, config and model card, put into place when all of it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from .config import ConfigError, PreferenceConfig
from .models import Model
from .weights import LORA, save_kohya

CONFIG = "training_config.json"


def write_result(
    folder: Path,
    config: PreferenceConfig,
    model: Model,
    steps: int,
    data: Mapping[str, int],
    save_weights: Callable[[Path], object],
) -> None:
    """Write everything beside its place and move it there; other files of the folder stay, but no
    LoRA that is not of this result.

    Args:
        steps: optimiser steps done.
        data: what identifies the pairs and their order, see `PreferenceTrainer`.
        save_weights: writes the LoRA file or the denoiser's folder into a folder.
    """
    part = folder / ".result.tmp"
    kohya = f"{folder.resolve().name}_kohya.safetensors"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_weights(part)
        if config.output_kohya_format:
            save_kohya(part / kohya, part / LORA)
        written = {**config.to_dict(), "data": data, "steps": steps, "inpo_fast": __version__}
        (part / CONFIG).write_text(json.dumps(written, indent=1) + "\n")
        model_card(config, model, steps, folder).save(part / "README.md")
        # the config first: what follows a kill is known by it as a result
        os.replace(part / CONFIG, folder / CONFIG)
        # a denoiser's folder may stay, which could be that of a pipeline
        for name in (LORA, kohya):
            if not (part / name).exists():
                (folder / name).unlink(missing_ok=True)
        for entry in part.iterdir():
            place = folder / entry.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(entry, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_result(folder: Path) -> dict[str, Any]:
    """`training_config.json` of a result.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        written: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read: {error}") from error
    return written


def model_card(config: PreferenceConfig, model: Model, steps: int, folder: Path) -> Any:
    """The card, with what is needed to repeat the run."""
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    base = config.pretrained_model_name_or_path or model.pipeline
    lora = config.rank is not None
    component = model.family.component
    load = (
        f'pipe.load_lora_weights("{config.hub_model_id or folder.name}")'
        if lora
        else f"pipe.{component} = type(pipe.{component}).from_pretrained("
        f'"{config.hub_model_id or folder.name}", subfolder="{component}")'
    )
    started = config.unet_init
    if lora and started is not None:
        where = f'"{started}"'
        if not (Path(started) / "config.json").is_file():
            where += f', subfolder="{component}"'
        load = f"pipe.{component} = type(pipe.{component}).from_pretrained({where})\n{load}"
    settings = {
        "base model": base,
        **({} if started is None else {"started from": started}),
        "preference data": config.dataset_name or "pairs given to PreferenceTrainer",
        "objective": config.loss_type,
        "β": config.beta_dpo,
        **({"its settings": ", ".join(config.loss_options)} if config.loss_options else {}),
        "noisy latents": f"{config.source}, {config.inversion_steps} steps to the last timestep",
        "trained": f"LoRA of rank {config.rank}" if lora else f"the whole {component}",
        "optimiser steps": steps,
        "pairs of a step and device": config.train_batch_size * config.gradient_accumulation_steps,
        "learning rate": config.learning_rate,
        "seed": config.seed,
        "made with": f"inpo_fast {__version__}, settings in {CONFIG}",
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    described = (
        f"# {folder.resolve().name}\n\n"
        f"{base}, aligned with human preferences by inpo_fast.\n\n{lines}\n\n"
        f"```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base}")\n{load}\n```\n'
    )
    is_name = not Path(base).exists() and base.count("/") == 1
    tags = ["text-to-image", "diffusers", "diffusers-training", "preference-optimization"]
    data = ModelCardData(library_name="diffusers", base_model=base if is_name else None)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{described}")
    return populate_model_card(card, tags=[*tags, *(["lora", "template:sd-lora"] if lora else [])])


def push(folder: Path, config: PreferenceConfig) -> None:
    """Upload the result, without checkpoints."""
    from huggingface_hub import create_repo, upload_folder

    name = config.hub_model_id or folder.resolve().name
    repository = create_repo(name, exist_ok=True).repo_id
    upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Train with inpo_fast",
        ignore_patterns=["checkpoint-*/**", ".*", "logs/**", "validation/**"],
    )
