# SPDX-License-Identifier: Apache-2.0
"""Preference objectives on the shipped model, at equal optimiser steps and at equal time.

Every method starts from the shipped UNet and sees the same pairs in the same order, with the same
optimiser, learning rate and timesteps; it is measured on the way. ``attributes right``: the
reader's mean fraction over held-out prompts, sampled by DDIM from the same noise. ``moved``: mean
squared distance of the noise prediction from the base's, on noised images of held-out scenes at
uniform t.

A seed decides order, timesteps, noise, prompts and start noise. Intervals are Student's of 95 %
over seeds, of the difference from the base on the same prompts. Equal time is the time that the
fastest method takes for all its steps; the curves are read there by linear interpolation. Time is
of training alone and counts no measurement. Beside a result file lies a picture of the curves.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Row
from inpo_fast.demo.align import _stable_diffusion
from inpo_fast.demo.pipeline import Pipeline, load
from inpo_fast.demo.preferences import load_pairs
from inpo_fast.shipped import model_path, preferences_path, reader, scenes
from inpo_fast.training import (
    MemoryPairs,
    PreferenceConfig,
    PreferenceTrainer,
    q_sample,
    training_schedule,
)

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sft": {"loss_type": "sft"},
        "diffusion-dpo": {"loss_type": "dpo", "beta_dpo": 200.0},
        "kto": {"loss_type": "kto", "beta_dpo": 200.0},
        "mapo": {"loss_type": "mapo"},
        "smpo": {"loss_type": "smpo", "beta_dpo": 200.0},
        "inpo": {"loss_type": "inpo", "beta_dpo": 200.0},
        "inpo, official": {"loss_type": "inpo", "beta_dpo": 200.0, "latents": "official"},
        "inpo, bdia": {"loss_type": "inpo", "beta_dpo": 200.0, "latents": "bdia"},
        "inpo, 2 samples": {"loss_type": "inpo", "beta_dpo": 200.0, "samples_per_inversion": 2},
        "inpo, 4 samples": {"loss_type": "inpo", "beta_dpo": 200.0, "samples_per_inversion": 4},
    }
)
"""Fields of the trainer's config. β is the demo's, for all that compare errors as it does; the
others have the defaults of their scripts."""
_STUDENT = {2: 12.706, 3: 4.303}
"""97.5 % quantile of Student's t for so many seeds."""


@dataclass(frozen=True)
class Settings:
    """What all methods share; timesteps as in the demo, at a border of InPO's depth buckets."""

    seeds: tuple[int, ...] = (0, 1, 2)
    stops: tuple[int, ...] = (5, 10, 20, 40, 60)
    pairs: int = 128
    table: int = 7680
    prompts: int = 256
    sample_steps: int = 20
    guidance: float = 3.0
    learning_rate: float = 2e-4
    first_timestep: int = 500


QUICK = Settings(
    seeds=(0, 1), stops=(1, 2), pairs=4, table=8, prompts=4, sample_steps=2, learning_rate=1e-3
)


class Point(NamedTuple):
    """A model on the way."""

    steps: int
    seconds: float
    accuracy: float
    moved: float


@dataclass
class Curves:
    """[seed][point] of a method; the first point is the base."""

    points: list[list[Point]] = field(default_factory=list)

    def at_stop(self, index: int, name: str) -> list[float]:
        return [float(getattr(curve[index], name)) for curve in self.points]

    def at_time(self, seconds: float, name: str) -> list[float]:
        return [
            float(np.interp(seconds, [p.seconds for p in curve], [getattr(p, name) for p in curve]))
            for curve in self.points
        ]


class Exam:
    """What a seed measures a UNet with."""

    def __init__(self, pipeline: Pipeline, settings: Settings, seed: int) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.scenes = scenes.held_out_scenes(settings.prompts, seed)
        self.prompts = [scenes.prompt(scene) for scene in self.scenes]
        self.noise = pipeline.noise(settings.prompts, seed)
        generator = torch.Generator().manual_seed(seed)
        clean = pipeline.encode(scenes.render(self.scenes, generator=generator))
        noise = pipeline.noise(settings.prompts, seed + 1_000_000)
        times = torch.randint(1000, (len(clean),), generator=generator)
        schedule = training_schedule(pipeline.scheduler)
        self.noisy = q_sample(clean, noise, times, schedule)
        self.text = pipeline.embed(self.prompts)
        self.base = self._outputs(pipeline.unet)

    @torch.no_grad()
    def _outputs(self, unet: nn.Module) -> Tensor:
        given = zip(
            *(x.split(64) for x in (self.noisy.latents, self.noisy.timesteps, self.text)),
            strict=True,
        )
        return torch.cat([unet(x, t, text, return_dict=False)[0] for x, t, text in given])

    def measure(self, unet: nn.Module) -> tuple[float, float]:
        """Attributes right, and the mean squared distance of the outputs from the base's."""
        with torch.no_grad():
            images = self.pipeline.generate(
                self.prompts,
                self.noise,
                unet=unet,
                steps=self.settings.sample_steps,
                guidance=self.settings.guidance,
            )
        moved = (self._outputs(unet) - self.base).square().mean()
        return float(reader.score(images, self.scenes).mean()), float(moved)


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield rows of the base, of each method (or those named) at each stop, and at equal time."""
    if unknown := set(only) - set(METHODS):
        raise SystemExit(f"benchmarks: --only takes {', '.join(METHODS)}, got {sorted(unknown)}")
    settings = QUICK if quick else Settings()
    pipeline = load(model_path(), device)
    exams = [Exam(pipeline, settings, seed) for seed in settings.seeds]
    base = [Point(0, 0.0, *exam.measure(pipeline.unet)) for exam in exams]
    accuracies = [point.accuracy for point in base]
    yield _row("base", "attributes right", "%", [0.0] * len(base), accuracies, {"steps": 0})
    pairs = load_pairs(preferences_path(), pipeline, settings.table, 0)
    data = MemoryPairs(
        torch.stack([pairs.winners, pairs.losers], dim=1).cpu(),
        None,
        {"prompt_embeds": pairs.text.cpu()},
    )
    chosen = {name: METHODS[name] for name in METHODS if not only or name in only}
    # what the first steps of a process take longer belongs to no method
    train(pipeline, data, METHODS["inpo"], settings, 0, exams[0], stops=settings.stops[:1])
    curves: dict[str, Curves] = {}
    for name, options in chosen.items():
        curves[name] = Curves()
        for seed, exam, start in zip(settings.seeds, exams, base, strict=True):
            points = train(pipeline, data, options, settings, seed, exam, stops=settings.stops)
            curves[name].points.append([start, *points])
        for index, steps in enumerate(settings.stops, 1):
            seconds = statistics.mean(curves[name].at_stop(index, "seconds"))
            yield from _rows_at(
                f"{name}, {steps} steps",
                accuracies,
                curves[name].at_stop(index, "accuracy"),
                curves[name].at_stop(index, "moved"),
                {"steps": steps, "seconds": seconds},
            )
    budget = min(min(curve.at_stop(-1, "seconds")) for curve in curves.values())
    for name, curve in curves.items():
        yield from _rows_at(
            f"{name}, {budget:.2f} s of training",
            accuracies,
            curve.at_time(budget, "accuracy"),
            curve.at_time(budget, "moved"),
            {"seconds": budget, "steps": statistics.mean(curve.at_time(budget, "steps"))},
        )


def train(
    pipeline: Pipeline,
    data: MemoryPairs,
    options: Mapping[str, Any],
    settings: Settings,
    seed: int,
    exam: Exam,
    *,
    stops: Sequence[int],
) -> list[Point]:
    """Train a copy of the UNet and measure it after each of `stops` steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = PreferenceConfig(
            output_dir=folder,
            first_timestep=settings.first_timestep,
            proportion_empty_prompts=0.0,
            max_train_steps=stops[-1],
            train_batch_size=settings.pairs,
            learning_rate=settings.learning_rate,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            checkpointing_steps=stops[-1] + 1,
            logging_steps=stops[-1],
            mixed_precision="no",
            use_cpu=pipeline.device.type == "cpu",
            seed=seed,
            **options,
        )
        trainer = PreferenceTrainer(config, _stable_diffusion(pipeline), data)
        points: list[Point] = []
        seconds, began = 0.0, time.perf_counter()

        def advance() -> None:
            nonlocal seconds, began
            if trainer.step not in stops:
                return
            _synchronize(pipeline)
            seconds += time.perf_counter() - began
            points.append(Point(trainer.step, seconds, *exam.measure(trainer.policy)))
            _synchronize(pipeline)
            began = time.perf_counter()

        _synchronize(pipeline)
        began = time.perf_counter()
        trainer.train(advance)
    return points


def _synchronize(pipeline: Pipeline) -> None:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()


def _rows_at(
    case: str,
    base: list[float],
    accuracy: list[float],
    moved: list[float],
    values: dict[str, float],
) -> Iterator[Row]:
    yield _row(case, "attributes right", "%", base, accuracy, values)
    yield _row(case, "moved", "squared error", [0.0] * len(moved), moved, values)


def _row(
    case: str,
    metric: str,
    unit: str,
    base: list[float],
    found: list[float],
    values: dict[str, float],
) -> Row:
    """A mean over seeds with the interval of its difference from `base`, zeros where the value is
    reported by itself."""
    scale = 100.0 if unit == "%" else 1.0
    start = scale * statistics.mean(base)
    changes = [scale * (value - before) for value, before in zip(found, base, strict=True)]
    change = statistics.mean(changes)
    half = _STUDENT[len(changes)] * statistics.stdev(changes) / len(changes) ** 0.5
    ends = {"low": change - half, "high": change + half}
    told = f"95 % interval {ends['low']:.3g} to {ends['high']:.3g}"
    told = f"over the base {change:+.3g}, {told}" if start else told
    return Row(
        case=f"{case}, {metric} ({told})",
        metric=metric,
        unit=unit,
        ours=scale * statistics.mean(found),
        rivals={"base": start} if start else {},
        ratios={},
        values={**values, **ends},
    )


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw attributes right by steps, by seconds, and against the distance from the base."""
    from matplotlib.figure import Figure

    by_name: dict[str, list[tuple[Row, Row]]] = {}
    ends = [row for row in rows if " steps, " in row.case]
    for right, moved in zip(ends[::2], ends[1::2], strict=False):
        name = right.case.rsplit(" steps, ", 1)[0].rsplit(", ", 1)[0]
        by_name.setdefault(name, []).append((right, moved))
    base = rows[0].ours
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for index, (name, found) in enumerate(by_name.items()):
        right = [base, *(row.ours for row, _ in found)]
        low = [row.rivals["base"] + row.values["low"] for row, _ in found]
        high = [row.rivals["base"] + row.values["high"] for row, _ in found]
        across = (
            [row.values["steps"] for row, _ in found],
            [row.values["seconds"] for row, _ in found],
            [moved.ours for _, moved in found],
        )
        style = {"label": name, "color": f"C{index}", "marker": "."}
        for ax, x in zip(axes, across, strict=True):
            ax.plot([0.0, *x], right, **style)
            ax.fill_between(x, low, high, color=f"C{index}", alpha=0.08)
    labels = ("optimiser steps", "seconds of training", "squared distance from the base")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("attributes right, % (95 % intervals over seeds)")
    axes[0].legend(fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
