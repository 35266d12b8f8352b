"""Part 3: align the model by InPO, and by Diffusion-DPO with the same number of steps.

Both objectives start from the shipped UNet, see the same pairs at the same timesteps and use the
same loss; they differ in where the noisy latents come from, and in the settings that each needs.
The reader of attributes measures before and after, and takes no part in the training.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..shipped import reader, scenes
from ..training import MemoryPairs
from ..training.config import PreferenceConfig
from ..training.trainer import PreferenceTrainer
from .measures import mean_and_error
from .pipeline import Pipeline
from .preferences import Pairs, load_pairs


@dataclass(frozen=True)
class Objective:
    """Where the noisy latents come from, and the settings of the optimisation.

    Attributes:
        name: `inpo` or `diffusion-dpo`.
        loss_type: the trainer's name of it.
        beta: β of the loss.
        learning_rate: peak of AdamW's.
    """

    name: str
    loss_type: str
    beta: float
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """What both objectives share.

    Attributes:
        objectives: run in order.
        steps: optimiser steps.
        pairs: of a step; they share the number of inversion steps.
        max_depth: DDIM inversion steps of InPO that would reach the last timestep (10 in the
            paper); see `inpo_fast.training.inversion_depth`.
        first_timestep: timesteps are uniform from here on. A scene's attributes are decided where
            noise is strong. Below, the errors are larger and say nothing about them, and in so
            short a training their noise drowns the rest.
        prompts: held-out prompts of the evaluation.
        sample_steps, guidance: of the evaluation's DDIM sampling.
    """

    objectives: tuple[Objective, ...] = (
        Objective("inpo", "inpo", beta=200, learning_rate=2e-4),
        Objective("diffusion-dpo", "dpo", beta=200, learning_rate=2e-4),
    )
    steps: int = 20
    pairs: int = 128
    max_depth: int = 2
    first_timestep: int = 501
    prompts: int = 128
    sample_steps: int = 20
    guidance: float = 3.0


@dataclass(frozen=True)
class AlignRow:
    """One objective.

    Attributes:
        steps: optimiser steps.
        seconds: of the training alone.
        accuracy_before, accuracy_after: mean fraction of attributes right on held-out prompts,
            each with its standard error over prompts.
        gain, gain_se: mean difference of the same prompts and noise, and its standard error.
    """

    objective: str
    steps: int
    seconds: float
    accuracy_before: float
    accuracy_after: float
    accuracy_before_se: float
    accuracy_after_se: float
    gain: float
    gain_se: float
    prompts: int
    beta: float
    learning_rate: float


@dataclass
class Curve:
    """Per optimiser step: the loss and the fraction of pairs that the policy orders rightly."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class AlignResult:
    """Rows, curves and pictures; images [B, 3, H, W] by objective, and "base" before."""

    rows: list[AlignRow]
    curves: dict[str, Curve]
    prompts: list[str]
    images: dict[str, Tensor]


def train(
    pipeline: Pipeline,
    pairs: Pairs,
    objective: Objective,
    settings: Settings,
    *,
    seed: int,
    advance: Callable[[], object],
) -> tuple[nn.Module, Curve]:
    """Fine-tune a copy of the UNet; the pipeline's own stays as it is.

    Args:
        settings: the steps, their pairs and their timesteps.
        seed: of batches, timesteps and Diffusion-DPO's noise.
        advance: called after every step.
    """
    data = MemoryPairs(
        torch.stack([pairs.winners, pairs.losers], dim=1).cpu(),
        None,
        {"prompt_embeds": pairs.text.cpu()},
    )
    with tempfile.TemporaryDirectory() as folder:
        config = PreferenceConfig(
            output_dir=folder,
            loss_type=objective.loss_type,
            beta_dpo=objective.beta,
            inversion_steps=settings.max_depth,
            first_timestep=settings.first_timestep,
            proportion_empty_prompts=0.0,
            max_train_steps=settings.steps,
            train_batch_size=settings.pairs,
            learning_rate=objective.learning_rate,
            lr_scheduler="linear",
            lr_warmup_steps=0,
            checkpointing_steps=settings.steps + 1,
            logging_steps=1,
            mixed_precision="no",
            use_cpu=pipeline.device.type == "cpu",
            seed=seed,
        )
        trainer = PreferenceTrainer(config, _stable_diffusion(pipeline), data)
        history = trainer.train(advance)
    policy: nn.Module = trainer.policy.requires_grad_(False).to(pipeline.device)
    return policy, Curve([row["loss"] for row in history], [row["accuracy"] for row in history])


def _stable_diffusion(pipeline: Pipeline) -> Any:
    """The pipeline as diffusers has it, with a copy of the UNet."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=copy.deepcopy(pipeline.unet),
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run(pipeline: Pipeline, preferences: Path, settings: Settings, *, seed: int) -> AlignResult:
    """Measure the base, then train and measure every objective."""
    chosen = scenes.held_out_scenes(settings.prompts, seed)
    prompts = [scenes.prompt(scene) for scene in chosen]
    noise = pipeline.noise(settings.prompts, seed)

    def draw(unet: nn.Module) -> Tensor:
        return pipeline.generate(
            prompts, noise, unet=unet, steps=settings.sample_steps, guidance=settings.guidance
        )

    total = 1 + len(settings.objectives) * (settings.steps + 1)
    with tqdm(total=total, desc="3/3 align") as bar:
        bar.set_postfix_str("base")
        images = {"base": draw(pipeline.unet)}
        before = reader.score(images["base"], chosen)
        pairs = load_pairs(preferences, pipeline, settings.steps * settings.pairs, seed)
        bar.update()
        rows, curves = [], {}
        for objective in settings.objectives:
            bar.set_postfix_str(objective.name)
            began = time.perf_counter()
            policy, curves[objective.name] = train(
                pipeline,
                pairs,
                objective,
                settings,
                seed=seed,
                advance=bar.update,
            )
            seconds = time.perf_counter() - began
            images[objective.name] = draw(policy)
            after = reader.score(images[objective.name], chosen)
            rows.append(_row(objective, settings, seconds, before, after))
            bar.update()
    return AlignResult(rows, curves, prompts, images)


def _row(
    objective: Objective, settings: Settings, seconds: float, before: Tensor, after: Tensor
) -> AlignRow:
    mean_before, error_before = mean_and_error(before)
    mean_after, error_after = mean_and_error(after)
    gain, gain_error = mean_and_error(after - before)
    return AlignRow(
        objective=objective.name,
        steps=settings.steps,
        seconds=seconds,
        accuracy_before=mean_before,
        accuracy_after=mean_after,
        accuracy_before_se=error_before,
        accuracy_after_se=error_after,
        gain=gain,
        gain_se=gain_error,
        prompts=settings.prompts,
        beta=objective.beta,
        learning_rate=objective.learning_rate,
    )
