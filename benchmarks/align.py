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
of training alone, from its first batch on, and counts no measurement. A row holds the numbers of
every seed, so the file has the whole curves. Beside it lies a picture of them.

With ``--device cuda`` every GPU that is visible has a process, and on the CPU there are as many as
it has cores for torch's threads (``OMP_NUM_THREADS=1``: one a core). The trainings go to whichever
is free, so times stay comparable. Methods come in the order of what matters most. An interrupt
(``timeout -s INT 240 python -m benchmarks.run align …``) ends the run with equal time over the
methods that are complete.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
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
        "diffusion-dpo": {"loss_type": "dpo", "beta_dpo": 200.0},
        "inpo": {"loss_type": "inpo", "beta_dpo": 200.0},
        "inpo, bdia": {"loss_type": "inpo", "beta_dpo": 200.0, "latents": "bdia"},
        "inpo, 4 samples": {"loss_type": "inpo", "beta_dpo": 200.0, "samples_per_inversion": 4},
        "inpo, 2 samples": {"loss_type": "inpo", "beta_dpo": 200.0, "samples_per_inversion": 2},
        "inpo, official": {"loss_type": "inpo", "beta_dpo": 200.0, "latents": "official"},
        "smpo": {"loss_type": "smpo", "beta_dpo": 200.0},
        "sft": {"loss_type": "sft"},
        "kto": {"loss_type": "kto", "beta_dpo": 200.0},
        "mapo": {"loss_type": "mapo"},
    }
)
"""Fields of the trainer's config, the main question first. β is the demo's for all whose loss
compares errors with a reference's, in the unit of each method's script: there, too, all have much
the same β, while KTO's reward is twice Diffusion-DPO's and SmPO's margin ten times InPO's. MaPO has
the default of its script."""
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

    steps: float
    seconds: float
    accuracy: float
    moved: float


@dataclass
class Curves:
    """[seed][point] of a method; the first point is the base."""

    points: list[list[Point]]

    def at_stop(self, index: int) -> list[Point]:
        return [curve[index] for curve in self.points]

    def at_time(self, seconds: float) -> list[Point]:
        """Between the points by linear interpolation; steps then are no whole number."""
        return [
            Point(
                *(
                    float(np.interp(seconds, [p.seconds for p in curve], values))
                    for values in zip(*curve, strict=True)
                )
            )
            for curve in self.points
        ]


class Exam:
    """What a seed measures a UNet with; everything that does not depend on the UNet is ready."""

    def __init__(self, pipeline: Pipeline, settings: Settings, seed: int) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.scenes = scenes.held_out_scenes(settings.prompts, seed)
        self.text = pipeline.embed([scenes.prompt(scene) for scene in self.scenes])
        self.empty = pipeline.embed([""])
        self.noise = pipeline.noise(settings.prompts, seed)
        generator = torch.Generator().manual_seed(seed)
        clean = pipeline.encode(scenes.render(self.scenes, generator=generator))
        noise = pipeline.noise(settings.prompts, seed + 1_000_000)
        times = torch.randint(1000, (len(clean),), generator=generator)
        schedule = training_schedule(pipeline.scheduler)
        self.noisy = q_sample(clean, noise, times, schedule)
        self.base = self._outputs(pipeline.unet)

    def _outputs(self, unet: nn.Module) -> Tensor:
        parts = (self.noisy.latents, self.noisy.timesteps, self.text)
        given = zip(*(x.split(self.pipeline.chunk) for x in parts), strict=True)
        return torch.cat([unet(x, t, text, return_dict=False)[0] for x, t, text in given])

    @torch.no_grad()
    def measure(self, unet: nn.Module) -> tuple[float, float]:
        """Attributes right, and the mean squared distance of the outputs from the base's."""
        latents = self.pipeline.sample(
            unet,
            self.text,
            self.empty,
            self.noise,
            steps=self.settings.sample_steps,
            guidance=self.settings.guidance,
        )
        right = reader.score(self.pipeline.pixels(latents), self.scenes).mean()
        moved = (self._outputs(unet) - self.base).square().mean()
        return float(right), float(moved)


class Bench:
    """The model, the pairs and the exams on one device, warmed up."""

    def __init__(self, device: str, settings: Settings) -> None:
        if device.startswith("cuda"):
            # before the first matrix product: the trainer repeats its bits with it, and warns at
            # every product without it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.settings = settings
        self.pipeline = pipeline = load(model_path(), device)
        with torch.no_grad():
            self.exams = {seed: Exam(pipeline, settings, seed) for seed in settings.seeds}
        pairs = load_pairs(preferences_path(), pipeline, settings.table, 0)
        self.data = MemoryPairs(
            torch.stack([pairs.winners, pairs.losers], dim=1).cpu(),
            None,
            {"prompt_embeds": pairs.text.cpu()},
        )
        # what the first steps of a process take longer belongs to no method
        self.train("inpo", settings.seeds[0], settings.stops[:1])

    def base(self, seed: int) -> Point:
        return Point(0, 0.0, *self.exams[seed].measure(self.pipeline.unet))

    def train(self, name: str, seed: int, stops: Sequence[int] | None = None) -> list[Point]:
        """The points of a method after each of `stops` steps, by default the settings'."""
        stops = self.settings.stops if stops is None else stops
        return train(self.pipeline, self.data, name, self.settings, seed, self.exams[seed], stops)


@contextmanager
def benches(device: str, settings: Settings, processes: int) -> Iterator[Callable[..., Any]]:
    """A `map` that takes a method of `Bench` by name: of one bench here, or of one in each of
    several processes, where each has a GPU of its own."""
    if processes == 1:
        bench = Bench(device, settings)
        yield lambda method, *given: map(getattr(bench, method), *given)
        return
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    names = visible_gpus() if device == "cuda" else [""]
    for index in range(processes):
        gpus.put(names[index % len(names)])
    threads = min(torch.get_num_threads(), max(1, cores() // processes))
    with ProcessPoolExecutor(
        processes, context, initializer=_begin, initargs=(device, settings, gpus, threads)
    ) as pool:
        try:
            yield lambda method, *given: pool.map(partial(_call, method), *given)
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [named[i] if named != [""] else str(i) for i in range(torch.cuda.device_count())]


_bench: Bench | None = None
"""Of this process, where it is one of several."""


def _begin(device: str, settings: Settings, gpus: Any, threads: int) -> None:
    global _bench
    # an interrupt is the first process's, which ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu := gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    _bench = Bench(device, settings)


def _call(method: str, *given: Any) -> Any:
    return getattr(_bench, method)(*given)


def rows(
    device: str, quick: bool, only: Sequence[str], processes: int | None = None
) -> Iterator[Row]:
    """Yield rows of the base, of each method (or those named) at each stop, and at equal time.

    Args:
        processes: trainings at a time; by default as many as there are GPUs, or as many as have
            cores for their threads.
    """
    if unknown := set(only) - set(METHODS):
        raise SystemExit(f"benchmarks: --only takes {', '.join(METHODS)}, got {sorted(unknown)}")
    settings = QUICK if quick else Settings()
    chosen = [name for name in METHODS if not only or name in only]
    if processes is None:
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        processes = gpus or max(1, cores() // torch.get_num_threads())
    with benches(device, settings, processes) as run:
        seeds = settings.seeds
        base_points = run("base", seeds)
        trained = run("train", *zip(*product(chosen, seeds), strict=True))
        base = list(base_points)
        start = [point.accuracy for point in base]
        yield _row(
            *("base", "attributes right", "%", [0.0] * len(base), start),
            {"steps": 0, "processes": processes},
        )
        curves: dict[str, Curves] = {}
        try:
            for name in chosen:
                curves[name] = curve = Curves([[point, *next(trained)] for point in base])
                for index, steps in enumerate(settings.stops, 1):
                    yield from _rows_at(f"{name}, {steps} steps", start, curve.at_stop(index))
        except KeyboardInterrupt:
            # what is there can be compared
            curves.pop(name, None)
            print(f"interrupted in {name}", file=sys.stderr)
        yield from _equal_time(curves, start)


def _equal_time(curves: Mapping[str, Curves], base: list[float]) -> Iterator[Row]:
    """Yield rows of all methods at the seconds that the fastest takes for all its steps."""
    budget = min(
        (min(p.seconds for p in curve.at_stop(-1)) for curve in curves.values()), default=0.0
    )
    for name, curve in curves.items():
        case = f"{name}, {budget:.2f} s of training"
        yield from _rows_at(case, base, curve.at_time(budget))


def train(
    pipeline: Pipeline,
    data: MemoryPairs,
    name: str,
    settings: Settings,
    seed: int,
    exam: Exam,
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
            **METHODS[name],
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


def _rows_at(case: str, base: list[float], points: list[Point]) -> Iterator[Row]:
    """Rows of a point of every seed, which they hold, too, so that nothing of a curve is lost."""
    told = {
        name: statistics.mean(getattr(p, name) for p in points) for name in ("steps", "seconds")
    }
    told |= {f"seconds of seed {i}": p.seconds for i, p in enumerate(points)}
    right, moved = [p.accuracy for p in points], [p.moved for p in points]
    yield _row(case, "attributes right", "%", base, right, told)
    yield _row(case, "moved", "squared error", [0.0] * len(moved), moved, told)


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
    seeds = {f"seed {i}": scale * value for i, value in enumerate(found)}
    told = f"95 % interval {ends['low']:.3g} to {ends['high']:.3g}"
    told = f"over the base {change:+.3g}, {told}" if start else told
    return Row(
        case=f"{case}, {metric} ({told})",
        metric=metric,
        unit=unit,
        ours=scale * statistics.mean(found),
        rivals={"base": start} if start else {},
        ratios={},
        values={**values, **ends, **seeds},
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
    # of a method that fails with one of the seeds the interval would hide all others
    lowest = min(row.ours for row in (rows[0], *ends[::2]))
    axes[0].set_ylim(max(0.0, lowest - 10), 100)
    axes[0].set_ylabel("attributes right, % (95 % intervals over seeds)")
    axes[0].legend(fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
