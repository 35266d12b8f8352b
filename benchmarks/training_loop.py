# SPDX-License-Identifier: Apache-2.0
"""The trainer as the training benchmarks drive it: its own parts, without files written."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import models
from inpo_fast.training import MemoryPairs, PairBatch, PreferenceConfig, PreferenceTrainer, draws
from inpo_fast.training import step as training_step
from inpo_fast.training.step import Learner


@dataclass(frozen=True)
class Setting:
    """A model and what it is trained with.

    Attributes:
        model: name in `benchmarks.models`.
        pairs: of a micro-batch.
        beta: β of the official example script.
        config: fields of `PreferenceConfig` that the model needs.
    """

    model: str
    pairs: int
    beta: float
    config: dict[str, Any]

    @property
    def xl(self) -> bool:
        return self.model.startswith("sdxl")


SETTINGS = {
    "sd15": Setting("sd15", 16, 2000.0, {}),
    "sdxl": Setting("sdxl", 8, 5000.0, {"optimizer": "adafactor", "gradient_checkpointing": True}),
}


def setting(name: str, quick: bool) -> Setting:
    """The setting of "sd15" or "sdxl"; `quick` has a tiny model and micro-batches."""
    found = SETTINGS[name]
    return replace(found, model=f"{found.model}-small", pairs=2) if quick else found


def make_trainer(given: Setting, device: str, **changes: Any) -> PreferenceTrainer:
    """A trainer of the setting with random weights, in bfloat16 unless `changes` say otherwise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    # weights of a LoRA's base are 16-bit, all others begin in float32
    dtype = torch.bfloat16 if changes.get("rank") else torch.float32
    # channels first, as a pipeline is loaded
    unet = models.unet(given.model, device, dtype).to(memory_format=torch.contiguous_format)
    parts |= {"unet": unet, "scheduler": scheduler}
    if given.xl:
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    config: dict[str, Any] = {
        "output_dir": tempfile.gettempdir() + "/inpo-fast-benchmark",
        "beta_dpo": given.beta,
        "learning_rate": 1e-8,
        "train_batch_size": 1,
        "max_train_steps": 1,
        "lr_warmup_steps": 0,
        "mixed_precision": "bf16",
        "use_cpu": device == "cpu",
        **given.config,
        **changes,
    }
    return PreferenceTrainer(
        PreferenceConfig(**config), pipeline, make_pairs(given.model, given.pairs)
    )


def make_pairs(model: str, count: int) -> MemoryPairs:
    """Encoded pairs in memory; losers are half as large, so that a loss can tell them apart."""
    told = models.inputs(model, count)
    mean = torch.stack([told.latents, told.latents.flip(0) / 2], dim=1)
    text = {"prompt_embeds": told.text}
    time_ids = None
    if told.added is not None:
        text["pooled_prompt_embeds"] = told.added["text_embeds"]
        time_ids = told.added["time_ids"][:, None].repeat(1, 2, 1)
    empty = {name: torch.zeros_like(value[0]) for name, value in text.items()}
    return MemoryPairs(mean, 0.1 * mean.abs(), text, empty_text=empty, time_ids=time_ids)


def with_config(learner: Learner, **changes: Any) -> Learner:
    """The same networks under another config."""
    other = copy.copy(learner)
    other.config = replace(learner.config, **changes)
    other.timesteps = training_step._timesteps(other.config, learner.schedule.num_steps)
    return other


def micro_steps(
    learner: Learner, pairs: int, mean: float | None = None
) -> tuple[tuple[int, float], ...]:
    """Numbers of micro-steps, and shares with which their depths have the mean depth.

    A step's time is affine in its depth (each costs one more call of the same shapes), so its mean
    over all steps is that of the two depths around the mean one.

    Args:
        pairs: of a micro-batch on one process.
        mean: of the depths, by default the sampler's own.
    """
    sampler, config = learner.timesteps, learner.config
    mean = sampler.mean_calls if mean is None else mean
    low = math.floor(mean)
    together = pairs * learner.accelerator.num_processes

    def number_of(depth: int) -> int:
        for number in itertools.count():
            source = draws.generator(draws.Purpose.TIMESTEP, config.seed, number)
            if len(sampler.draw(together, source).grid) == depth:
                return number
        raise AssertionError

    shares = {low: low + 1 - mean, low + 1: mean - low}
    return tuple((number_of(depth), share) for depth, share in shares.items() if share)


def seconds_of_steps(
    step: Callable[[int], object],
    numbers: Sequence[tuple[int, float]],
    device: str,
    *,
    least: float,
) -> float:
    """Seconds of a micro-step on average over these; three in a row, as in a training."""

    def seconds(number: int) -> float:
        def job() -> None:
            for _ in range(3):
                step(number)

        return wall_clock(job, device, least=least / len(numbers)) / 3

    return sum(share * seconds(number) for number, share in numbers)


def batches(trainer: PreferenceTrainer, pairs: int) -> Iterator[PairBatch]:
    """The trainer's own loader, for micro-batches of another size."""
    accelerator = trainer.accelerator
    order = trainer.data.order(
        batch_size=pairs, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    return trainer.data.loader(order, proportion_empty_prompts=0.2, device=accelerator.device)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def wall_clock(job: Callable[[], object], device: str, *, least: float) -> float:
    """Seconds of a job, the mean of as many runs as take `least` seconds together."""
    runs = 0
    synchronize(device)
    began = time.perf_counter()
    while True:
        job()
        synchronize(device)
        runs += 1
        elapsed = time.perf_counter() - began
        if elapsed >= least:
            return elapsed / runs
