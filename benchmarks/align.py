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
steps by the seconds of one, which are measured for every method before anything is trained, at the
mean depth of its inversions, with nothing beside it. A row holds the numbers of every seed, so the
file has the whole curves. Beside it lies a picture of them.

With ``--device cuda`` every GPU that is visible has four processes, and on the CPU there are as
many as it has cores for torch's threads (``OMP_NUM_THREADS=1``: one a core). The trainings go to
whichever is free. Methods come in the order of what matters most. An interrupt (``timeout -s INT
240 python -m benchmarks.run align …``) ends the run with equal time over the methods that are
complete.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
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

from benchmarks import training_loop
from benchmarks.common import Row
from inpo_fast.demo.align import _stable_diffusion
from inpo_fast.demo.pipeline import Pipeline, load
from inpo_fast.demo.preferences import load_pairs
from inpo_fast.determinism import reproducible_training
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
    least: float = 2.0
    """Seconds that the steps of a method are timed for."""


QUICK = Settings(
    seeds=(0, 1),
    stops=(1, 2),
    pairs=4,
    table=8,
    prompts=4,
    sample_steps=2,
    learning_rate=1e-3,
    least=0.0,
)
_PER_GPU = 4
"""Processes of a GPU: most of a training is launching small kernels."""


class Point(NamedTuple):
    """A model on the way."""

    steps: float
    accuracy: float
    moved: float


@dataclass
class Curves:
    """[seed][point] of a method, the first of them the base, and the seconds of a step."""

    points: list[list[Point]]
    step: float

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.points[0][-1].steps * self.step

    def at_stop(self, index: int) -> list[Point]:
        return [curve[index] for curve in self.points]

    def at_time(self, seconds: float) -> list[Point]:
        """Between the points by linear interpolation; steps then are no whole number."""
        return [
            Point(
                *(
                    float(np.interp(seconds / self.step, [p.steps for p in curve], values))
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
    """The model, the pairs and the exams on one device."""

    def __init__(self, device: str, settings: Settings) -> None:
        if device.startswith("cuda"):
            # before the first matrix product: the trainer repeats its bits with it, and warns at
            # every product without it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.settings = settings
        self.pipeline = pipeline = load(model_path(), device)
        self._exams: dict[int, Exam] = {}
        pairs = load_pairs(preferences_path(), pipeline, settings.table, 0)
        self.data = MemoryPairs(
            torch.stack([pairs.winners, pairs.losers], dim=1).cpu(),
            None,
            {"prompt_embeds": pairs.text.cpu()},
        )

    @torch.no_grad()
    def exam(self, seed: int) -> Exam:
        if seed not in self._exams:
            self._exams[seed] = Exam(self.pipeline, self.settings, seed)
        return self._exams[seed]

    def base(self, seed: int) -> Point:
        return Point(0, *self.exam(seed).measure(self.pipeline.unet))

    def train(self, name: str, seed: int) -> list[Point]:
        """Train a copy of the UNet; the points of a method after each of the settings' stops."""
        points: list[Point] = []
        exam, stops = self.exam(seed), self.settings.stops
        with self._trainer(name, seed) as trainer:

            def advance() -> None:
                if trainer.step in stops:
                    points.append(Point(trainer.step, *exam.measure(trainer.policy)))

            trainer.train(advance)
        return points

    def seconds_of_step(self, name: str) -> float:
        """Of an optimiser step of a method at the mean depth of its inversions."""
        settings, device = self.settings, str(self.pipeline.device)
        with self._trainer(name, settings.seeds[0]) as trainer, reproducible_training():
            loader = trainer.data.loader(trainer.order, device=self.pipeline.device)

            def step(number: int) -> None:
                trainer.learner.learn(next(loader), number, last=True)
                trainer.stepper.step()

            numbers = training_loop.micro_steps(trainer.learner, settings.pairs)
            for number, _ in numbers:
                # the first steps take longer
                step(number)
            return training_loop.seconds_of_steps(step, numbers, device, least=settings.least)

    @contextmanager
    def _trainer(self, name: str, seed: int) -> Iterator[PreferenceTrainer]:
        settings, steps = self.settings, self.settings.stops[-1]
        with tempfile.TemporaryDirectory() as folder:
            config = PreferenceConfig(
                output_dir=folder,
                first_timestep=settings.first_timestep,
                proportion_empty_prompts=0.0,
                max_train_steps=steps,
                train_batch_size=settings.pairs,
                learning_rate=settings.learning_rate,
                lr_scheduler="constant",
                lr_warmup_steps=0,
                checkpointing_steps=steps + 1,
                logging_steps=steps,
                mixed_precision="no",
                use_cpu=self.pipeline.device.type == "cpu",
                seed=seed,
                **METHODS[name],
            )
            yield PreferenceTrainer(config, _stable_diffusion(self.pipeline), self.data)


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


def room(device: str) -> int:
    """How many trainings there are at a time."""
    if device == "cuda":
        return torch.cuda.device_count() * _PER_GPU
    return max(1, cores() // torch.get_num_threads())


def rows(
    device: str, quick: bool, only: Sequence[str], processes: int | None = None
) -> Iterator[Row]:
    """Yield rows of the base, of each method (or those named) at each stop, and at equal time.

    Args:
        processes: trainings at a time; by default as many as there is `room` for.
    """
    if unknown := set(only) - set(METHODS):
        raise SystemExit(f"benchmarks: --only takes {', '.join(METHODS)}, got {sorted(unknown)}")
    settings = QUICK if quick else Settings()
    chosen = [name for name in METHODS if not only or name in only]
    with benches(device, settings, 1) as run:
        steps = dict(zip(chosen, run("seconds_of_step", chosen), strict=True))
    processes = processes or room(device)
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
                points = [[point, *next(trained)] for point in base]
                curves[name] = curve = Curves(points, steps[name])
                for index, stop in enumerate(settings.stops, 1):
                    found = curve.at_stop(index)
                    yield from _rows_at(f"{name}, {stop} steps", start, found, curve.step)
        except KeyboardInterrupt:
            # what is there can be compared
            curves.pop(name, None)
            print(f"interrupted in {name}", file=sys.stderr)
        yield from _equal_time(curves, start)


def _equal_time(curves: Mapping[str, Curves], base: list[float]) -> Iterator[Row]:
    """Yield rows of all methods at the seconds that the fastest takes for all its steps."""
    budget = min((curve.seconds for curve in curves.values()), default=0.0)
    for name, curve in curves.items():
        case = f"{name}, {budget:.2f} s of training"
        yield from _rows_at(case, base, curve.at_time(budget), curve.step)


def _rows_at(case: str, base: list[float], points: list[Point], step: float) -> Iterator[Row]:
    """Rows of a point of every seed, which they hold, too, so that nothing of a curve is lost."""
    steps = points[0].steps
    told = {"steps": steps, "seconds": steps * step, "seconds of a step": step}
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
