"""Part 3: align the model by InPO, and by Diffusion-DPO with the same number of steps.

Both objectives start from the shipped UNet, see the same pairs at the same timesteps and use the
same loss; they differ in where the noisy latents come from, and in the settings that each needs.
The reader of attributes measures before and after, and takes no part in the training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..losses import dpo_loss
from ..schedule import NoiseSchedule
from ..shipped import reader, scenes
from ..training import NoisyLatents, ddim_inversion, q_sample, training_schedule
from .measures import mean_and_error
from .pipeline import Pipeline
from .preferences import MicroBatch, Pairs, depth_buckets, load_pairs, plan


@dataclass(frozen=True)
class Objective:
    """Where the noisy latents come from, and the settings of the optimisation.

    Attributes:
        name: `inpo` or `diffusion-dpo`.
        beta: β of the loss.
        learning_rate: peak of AdamW's.
    """

    name: str
    beta: float
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """What both objectives share.

    Attributes:
        objectives: run in order.
        steps: optimiser steps.
        pairs: pairs of a micro-batch; a step has one micro-batch for every inversion depth.
        max_depth: DDIM inversion steps of InPO that would reach the last timestep (10 in the
            paper); see `inpo_fast.training.inversion_depth`.
        first_timestep: timesteps are uniform from here on. A scene's attributes are decided where
            noise is strong. Below, the errors are larger and say nothing about them, and in so
            short a training their noise drowns the rest.
        prompts: held-out prompts of the evaluation.
        sample_steps, guidance: of the evaluation's DDIM sampling.
        warmup: fraction of the steps over which the learning rate rises.
    """

    objectives: tuple[Objective, ...] = (
        Objective("inpo", beta=200, learning_rate=2e-4),
        Objective("diffusion-dpo", beta=200, learning_rate=2e-4),
    )
    steps: int = 20
    pairs: int = 128
    max_depth: int = 2
    first_timestep: int = 501
    prompts: int = 128
    sample_steps: int = 20
    guidance: float = 3.0
    warmup: float = 0.1


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
    steps: Sequence[Sequence[MicroBatch]],
    *,
    warmup: float,
    seed: int,
    advance: Callable[[], object],
) -> tuple[nn.Module, Curve]:
    """Fine-tune a copy of the UNet; the pipeline's own is the frozen reference.

    Args:
        steps: the micro-batches of every optimiser step.
        warmup: see `Settings`.
        seed: of Diffusion-DPO's noise.
        advance: called after every step.
    """
    policy = copy.deepcopy(pipeline.unet).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=objective.learning_rate)
    schedule = training_schedule(pipeline.scheduler)
    noise = torch.Generator().manual_seed(seed)
    curve = Curve()
    for number, step in enumerate(steps):
        rate = objective.learning_rate * learning_rate(number, len(steps), warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses, accuracies = [], []
        for micro in step:
            clean = torch.cat([pairs.winners[micro.chosen], pairs.losers[micro.chosen]])
            text = pairs.text[micro.chosen].repeat(2, 1, 1)
            noisy = noisy_latents(objective, policy, clean, text, micro, schedule, noise)
            times = torch.tensor(micro.timesteps * 2, device=clean.device)
            with torch.no_grad():
                reference = pipeline.unet(noisy.latents, times, text, return_dict=False)[0]
            output = policy(noisy.latents, times, text, return_dict=False)[0]
            result = dpo_loss(output, reference, noisy.target, beta=objective.beta)
            (result.loss / len(step)).backward()
            losses.append(result.loss.detach())
            accuracies.append(result.accuracy)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.loss.append(float(torch.stack(losses).mean()))
        curve.accuracy.append(float(torch.stack(accuracies).mean()))
        advance()
    return policy.requires_grad_(False), curve


def noisy_latents(
    objective: Objective,
    policy: nn.Module,
    clean: Tensor,
    text: Tensor,
    micro: MicroBatch,
    schedule: NoiseSchedule,
    generator: torch.Generator,
) -> NoisyLatents:
    """x_t and τ of winners and losers, [2P, 4, h, w] each, at the pair's timestep."""
    timesteps = micro.timesteps * 2
    if objective.name == "inpo":
        return ddim_inversion(
            lambda sample, times: policy(sample, times, text, return_dict=False)[0],
            clean,
            timesteps,
            schedule,
            num_steps=micro.depth,
        )
    # winner and loser share the noise, as in Diffusion-DPO
    noise = torch.randn(len(micro.timesteps), *clean.shape[1:], generator=generator)
    return q_sample(clean, noise.to(clean.device).repeat(2, 1, 1, 1), timesteps, schedule)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Fraction of the peak: a linear rise, then a linear fall to zero after the last step."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


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
        pairs, steps = _prepare(pipeline, preferences, settings, seed)
        bar.update()
        rows, curves = [], {}
        for objective in settings.objectives:
            bar.set_postfix_str(objective.name)
            began = time.perf_counter()
            policy, curves[objective.name] = train(
                pipeline,
                pairs,
                objective,
                steps,
                warmup=settings.warmup,
                seed=seed,
                advance=bar.update,
            )
            seconds = time.perf_counter() - began
            images[objective.name] = draw(policy)
            after = reader.score(images[objective.name], chosen)
            rows.append(_row(objective, settings, seconds, before, after))
            bar.update()
    return AlignResult(rows, curves, prompts, images)


def _prepare(
    pipeline: Pipeline, preferences: Path, settings: Settings, seed: int
) -> tuple[Pairs, list[list[MicroBatch]]]:
    """The encoded pairs, and the batches that all objectives train on."""
    timesteps = len(pipeline.scheduler.alphas_cumprod)
    buckets = depth_buckets(settings.first_timestep, timesteps, settings.max_depth)
    wanted = settings.steps * len(buckets) * settings.pairs
    pairs = load_pairs(preferences, pipeline, wanted, seed)
    steps = plan(len(pairs.text), buckets, steps=settings.steps, pairs=settings.pairs, seed=seed)
    return pairs, steps


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
