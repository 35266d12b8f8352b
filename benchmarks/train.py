# SPDX-License-Identifier: Apache-2.0
"""Training throughput: InPO by the trainer against the official script's step, in one run.

Real architectures with random weights, full fine-tuning. A sample is a pair at a noise level. Both
sides take an optimiser step every 128 samples of a device, as the official example does; its time
is measured by itself and shared out. Steps are run at the mean depth of their inversions (5.5 calls
for the trainer's depth buckets, 6.4 for the script), which is exact because a step's time is affine
in the depth. Before anything is timed, both sides must have computed the same loss in float32 from
the same pair, timesteps and noise (the trainer with `latents="official"`).

Cases for ``--only``: ``sd15`` and ``sdxl`` with fused layers; ``sdxl lora`` (peak memory at one
pair); ``2 gpus`` (the trainer in two processes against one); ``sd15 compiled``, ``sdxl compiled``
with compiled blocks in their place, which takes minutes more; ``sd15 fastest``, ``sdxl fastest``
with fused layers and graphs only.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import official, training_loop
from benchmarks.common import Row
from benchmarks.training_loop import (
    Setting,
    batches,
    micro_steps,
    seconds_of_steps,
    synchronize,
    wall_clock,
)
from inpo_fast.determinism import reproducible_training
from inpo_fast.training import PreferenceTrainer, draws, policy
from inpo_fast.training.families import Conditioning
from inpo_fast.training.graphed import Graphs
from inpo_fast.training.metrics import measured_peak
from inpo_fast.training.step import Learner
from inpo_fast.training.trajectory import Call

CASES = (
    *("sd15", "sdxl lora", "sdxl", "2 gpus", "sd15 compiled", "sdxl compiled"),
    *("sd15 fastest", "sdxl fastest"),
)
SPEEDUP = {"sd15": {1: 6.0, 4: 12.0}, "sdxl": {1: 3.0, 4: 5.0}}
"""Targets against the official step, by samples of an inversion."""
MFU = {"sd15": 0.40, "sdxl": 0.55}
OVERHEAD = 0.03
CARD = 23.5
"""GiB that a program has on a card of 24 GB."""
SCALING = 1.9
ACCUMULATED = 128
"""Samples of a device between optimiser steps: 1024 on the example's 8 GPUs."""
REUSE = (1, 2, 4)
WHOLE = 130
"""GiB of a card with room for 6 pairs of SDXL without gradient checkpointing; 3 pairs took 68."""


class Timed(NamedTuple):
    """Seconds of a sample, optimiser included, and the peak of memory in GiB."""

    sample: float
    memory: float
    micro: float  # seconds of a micro-step alone


def rows(device: str, quick: bool, only: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of each case, or of those named."""
    if unknown := set(only) - set(CASES):
        raise SystemExit(f"benchmarks: --only takes {', '.join(CASES)}, got {sorted(unknown)}")
    for case in CASES:
        if case not in only and (only or case.endswith("fastest")):
            continue
        if case == "2 gpus":
            yield from scaling_rows(device, quick)
        elif case == "sdxl lora":
            yield lora_row(training_loop.setting("sdxl", quick), device)
        else:
            given = training_loop.setting(case.split()[0], quick)
            yield from model_rows(case, given, device, quick)
        release(device)


def model_rows(name: str, given: Setting, device: str, quick: bool) -> Iterator[Row]:
    """Yield the rows of a model."""
    least = 0.0 if quick else 4.0
    rival, ratio = official_step(given, device, least)
    print(f"     {name}: both compute the same loss (largest difference {ratio:.2f} of the bound)")
    release(device)
    yield rate(f"{name}, official step", rival)
    with reproducible_training():  # as `PreferenceTrainer.train` does it
        yield from our_rows(name, given, device, quick, rival, least)


def our_rows(
    name: str, given: Setting, device: str, quick: bool, rival: Timed, least: float
) -> Iterator[Row]:
    """Yield the trainer's rows against the official step."""
    trainer = training_loop.make_trainer(given, device)
    ours, pairs, networks = Ours(trainer, device, least), given.pairs, trainer.learner.networks
    levers = Levers(name, ours, pairs)
    all_levers = not name.endswith("fastest")
    stock: dict[int, Timed] = {}
    if all_levers:
        for count in (1, pairs):
            stock[count] = ours.timed(count, 1)
            yield rate(f"{name}, stock layers, {count} pairs", stock[count], official=rival)
        forwards = {count: ours.forward(count) for count in (1, pairs)}
        gain = stock[1].sample / stock[pairs].sample
        yield levers.row("micro-batches", gain, forwards[1] / forwards[pairs], samples=1)

    layers = "stock layers"  # on a CPU there are no others
    if name.endswith("compiled"):
        layers = "compiled blocks"
        networks.as_trained = True
        for module in (trainer.policy, networks.reference):
            same = module is networks.reference
            policy.compile_model(module, "blocks", trainer.model.family.blocks, as_trained=same)
        trainer.learner.config = replace(trainer.learner.config, compile="blocks")
        seconds = first_seconds(ours, pairs)
        yield Row(f"{name}, first micro-step with compilation", "wall clock", "s", seconds, {}, {})
    elif device == "cuda":
        layers = "fused layers"
        for module in (trainer.policy, networks.reference):
            policy.fuse_layers(module, trainer.accelerator.device, sharded=False)
        # in the layout of the weights, as where the trainer makes them itself
        trainer.optimizer.state.clear()
        trainer.optimizer.zero_grad(set_to_none=True)
    forward = ours.forward(pairs)
    if layers != "stock layers" and all_levers:
        eager = ours.timed(pairs, 1)
        yield rate(f"{name}, {layers}, {pairs} pairs", eager, official=rival)
        gain = stock[pairs].sample / eager.sample
        yield levers.row(layers, gain, forwards[pairs] / forward, samples=1)
    peak = measured_peak(trainer.accelerator.device, trainer.dtype)
    if device == "cuda":
        layers += " and graphs"
        trainer.learner.graphs = Graphs(trainer.accelerator.device)
        # here, so that learners with other settings share what graphs read
        trainer.learner._inverting()
    best: dict[int, Timed] = {}
    for samples in REUSE:
        best[samples] = ours.timed(pairs, samples)
        label = f"{name}, {layers}, {pairs} pairs, samples_per_inversion {samples}"
        target = SPEEDUP[name.split()[0]].get(samples)
        yield rate(label, best[samples], target=target, official=rival)
        yield utilisation(f"{label}, rate of the whole step", name, ours, best[samples], peak)
        if samples == 1:
            yield overhead(label, *ours.against_calls(pairs, samples))
    if device == "cuda" and given.xl:
        yield from unchecked_rows(f"{name}, {layers}", name, ours, rival, peak)
    if device == "cuda" and all_levers:
        yield levers.graphs(eager, best[1], forward, ours.forward(pairs))
    if name == "sd15":
        yield levers.reuse(best)
        yield levers.buckets(best)
        yield levers.cache(best, given, device)
    if device == "cuda":
        # last, as what the rows above have captured goes: the memory is to be its own
        ours.renew_graphs()
        free = ours.timed(pairs, 1, nondeterministic=True)
        yield rate(f"{name}, {layers}, {pairs} pairs, nondeterministic", free, official=rival)


def unchecked_rows(case: str, name: str, ours: Ours, rival: Timed, peak: float) -> Iterator[Row]:
    """Yield the rows without gradient checkpointing, with as many pairs as the memory allows."""
    ours.trainer.policy.disable_gradient_checkpointing()
    # those that were captured compute activations again
    ours.renew_graphs()
    fewer = 6 if torch.cuda.mem_get_info()[1] > WHOLE * 2**30 else 3
    for samples in (min(REUSE), max(REUSE)):
        timed = ours.timed(fewer, samples)
        label = f"{case}, {fewer} pairs, no checkpointing, samples_per_inversion {samples}"
        yield rate(label, timed, official=rival)
        yield utilisation(f"{label}, rate of the whole step", name, ours, timed, peak)
    policy.checkpoint_activations(ours.trainer.policy)


class Ours:
    """The trainer's micro-steps and optimiser step.

    Args:
        trainer: its learner is driven as its own loop does it.
        device: of it.
        least: seconds that are timed at least.
    """

    def __init__(self, trainer: PreferenceTrainer, device: str, least: float) -> None:
        self.trainer, self.device, self.least = trainer, device, least
        self.flops = 0.0
        """Of a sample, by the trainer's count, in the last `timed`."""

    def renew_graphs(self) -> None:
        """Drop all that was captured, with its memory."""
        self.trainer.learner.graphs = None
        # the sums of gradients are among it
        self.trainer.optimizer.zero_grad(set_to_none=True)
        release(self.device)
        self.trainer.learner.graphs = Graphs(self.trainer.accelerator.device)

    def learner(self, samples: int, **changes: Any) -> Learner:
        return training_loop.with_config(
            self.trainer.learner, samples_per_inversion=samples, **changes
        )

    def timed(
        self,
        pairs: int,
        samples: int,
        *,
        before: Callable[[], object] = lambda: None,
        **changes: Any,
    ) -> Timed:
        """Time micro-steps at the mean depth.

        Args:
            pairs: of a micro-batch.
            samples: of an inversion.
            before: run before every micro-step.
            changes: of the trainer's config.
        """
        learner = self.learner(samples, **changes)
        self._count_flops(learner, pairs)
        numbers = micro_steps(learner, pairs)
        loader = batches(self.trainer, pairs)
        learner.learn(next(loader), numbers[0][0], last=True)
        # the optimiser makes its states in its first step
        optimizer = self._optimizer_seconds(learner, pairs)
        reset_peak(self.device)
        flops: dict[int, list[float]] = {number: [] for number, _ in numbers}

        def step(number: int) -> None:
            before()
            counted = learner.throughput.flops
            learner.learn(next(loader), number, last=True)
            flops[number].append(learner.throughput.flops - counted)

        micro = seconds_of_steps(step, numbers, self.device, least=self.least)
        together = sum(share * flops[number][0] for number, share in numbers)
        self.flops = together / (pairs * samples)
        learner.meter.read(lambda mean: mean)
        sample = micro / (pairs * samples) + optimizer / ACCUMULATED
        return Timed(sample, peak_memory(self.device), micro)

    def _count_flops(self, learner: Learner, pairs: int) -> None:
        """Let the trainer count once: the structure it counts on is made before compilation."""
        if self.trainer.learner._flops is None:
            learner.learn(next(batches(self.trainer, pairs)), 0, last=True)
            self.trainer.learner._flops = learner._flops
            self.trainer.learner._structure = None
        learner._flops = self.trainer.learner._flops

    def _optimizer_seconds(self, learner: Learner, pairs: int) -> float:
        """Seconds of clipping, stepping and dropping the gradient."""
        stepper = self.trainer.stepper
        times = []
        loader = batches(self.trainer, pairs)
        shallow = micro_steps(learner, pairs)[0][0]
        for _ in range(2):
            learner.learn(next(loader), shallow, last=True)
            synchronize(self.device)
            began = time.perf_counter()
            stepper.step()
            synchronize(self.device)
            times.append(time.perf_counter() - began)
        return min(times)

    def told(self, pairs: int) -> tuple[Call, Conditioning]:
        """Inputs of a model call, winners and losers."""
        batch = next(batches(self.trainer, pairs))
        learner = self.trainer.learner
        text = {name: torch.cat([value, value]) for name, value in batch.text.items()}
        times = torch.full((2 * pairs,), 501, device=batch.latents.device)
        return Call(batch.latents, times, None, False), Conditioning(
            text, batch.time_ids, learner.config.guidance_scale
        )

    def forward(self, pairs: int) -> float:
        """Seconds for a pair of one call without gradient."""
        learner, (call, told) = self.learner(1), self.told(pairs)

        def job() -> None:
            learner._infer(learner._inverting(), call, told)

        job()
        return wall_clock(job, self.device, least=self.least / 8) / pairs

    def against_calls(self, pairs: int, samples: int) -> tuple[float, float]:
        """Seconds of a micro-step, and of its model calls and backwards with nothing between them.

        Three steps at a time, in turns, because a card's speed changes with its warmth by more than
        what lies between.
        """
        learner = self.learner(samples)
        learner._flops = self.trainer.learner._flops
        networks, (call, told) = learner.networks, self.told(pairs)
        assert networks.reference is not None
        gradient = torch.ones_like(call.latents) / call.latents.numel()
        number, _ = micro_steps(learner, pairs)[0]
        depth = calls_before_the_last(learner, pairs, number)
        loader = batches(self.trainer, pairs)

        def whole() -> None:
            for _ in range(3):
                learner.learn(next(loader), number, last=True)

        def alone() -> None:
            for _ in range(3):
                # as in the trainer, weights are rounded once for these
                with learner._autocast(enabled=False):
                    inverting = learner._inverting()
                    for _ in range(depth + 1 - samples):
                        learner._infer(inverting, call, told)
                for _ in range(samples):
                    with learner._repeating():
                        output = learner._learnable(call, told)
                        learner._refer(networks.reference, call, told)
                        output.backward(gradient)

        seconds: dict[Callable[[], None], list[float]] = {whole: [], alone: []}
        learner.learn(next(loader), number, last=True)
        began = time.perf_counter()
        while not seconds[whole] or time.perf_counter() - began < 2 * self.least:
            for job in (whole, alone, alone, whole):
                seconds[job].append(wall_clock(job, self.device, least=0.0) / 3)
        learner.meter.read(lambda mean: mean)
        return statistics.median(seconds[whole]), statistics.median(seconds[alone])


def calls_before_the_last(learner: Learner, pairs: int, number: int) -> int:
    """Depth of a micro-step."""
    source = draws.generator(draws.Purpose.TIMESTEP, learner.config.seed, number)
    together = pairs * learner.accelerator.num_processes
    return len(learner.timesteps.draw(together, source).grid)


def first_seconds(ours: Ours, pairs: int) -> float:
    """Seconds of the next micro-step, the first after a change."""
    learner = ours.learner(1)
    loader = batches(ours.trainer, pairs)
    batch = next(loader)
    synchronize(ours.device)
    began = time.perf_counter()
    learner.learn(batch, micro_steps(learner, pairs)[0][0], last=True)
    synchronize(ours.device)
    return time.perf_counter() - began


class Levers:
    """What the best configuration loses when one thing is switched off: gain predicted, measured.

    Predictions by arithmetic count model calls: a backward is two forwards. Those for layers and
    micro-batches take the time of one forward without gradient for all the model does.
    """

    def __init__(self, name: str, ours: Ours, pairs: int) -> None:
        self.name, self.ours, self.pairs = name, ours, pairs

    def row(self, lever: str, measured: float, predicted: float, *, samples: int) -> Row:
        return Row(
            case=f"{self.name}, lever: {lever} (samples_per_inversion {samples})",
            metric="samples/s with it over without",
            unit="x",
            ours=measured,
            rivals={"predicted": predicted},
            ratios={"predicted": measured / predicted},
        )

    def forwards(self, depth: float, samples: int) -> float:
        """Forwards of a sample: inversion, and policy with backward and reference."""
        return (depth + 1 - samples) / samples + 4

    def mean_depth(self, samples: int) -> float:
        return self.ours.learner(samples).timesteps.mean_calls

    def graphs(self, eager: Timed, best: Timed, forward: float, graphed: float) -> Row:
        """Predicted by what a call without gradient takes in both ways; a backward is two."""
        calls = self.mean_depth(1) + 1  # and the reference
        if self.ours.trainer.learner.config.compile == "none":
            checkpointed = self.ours.trainer.policy.is_gradient_checkpointing
            calls += 4 if checkpointed else 3  # the policy with its backward
        predicted = eager.sample / (eager.sample - calls * (forward - graphed))
        return self.row("CUDA graphs", eager.sample / best.sample, predicted, samples=1)

    def reuse(self, best: dict[int, Timed]) -> Row:
        top = max(best)
        once, often = (self.forwards(self.mean_depth(s), s) for s in (1, top))
        measured = best[1].sample / best[top].sample
        return self.row("trajectory reuse", measured, once / often, samples=top)

    def buckets(self, best: dict[int, Timed]) -> Row:
        """Without buckets a micro-batch is as deep as its deepest pair."""
        ours, pairs, learner = self.ours, self.pairs, self.ours.learner(1)
        most = learner.timesteps.max_steps
        deepest = sum(1 - (depth / most) ** pairs for depth in range(most))
        predicted = self.forwards(deepest, 1) / self.forwards(self.mean_depth(1), 1)
        numbers = micro_steps(learner, pairs, deepest)
        loader = batches(ours.trainer, pairs)

        def step(number: int) -> None:
            learner.learn(next(loader), number, last=True)

        micro = seconds_of_steps(step, numbers, ours.device, least=ours.least)
        learner.meter.read(lambda mean: mean)
        return self.row("depth buckets", micro / best[1].micro, predicted, samples=1)

    def cache(self, best: dict[int, Timed], given: Setting, device: str) -> Row:
        """Without a cache images and captions are encoded in the step, in bfloat16."""
        encode = official.encoders(given.model, device, torch.bfloat16)
        pixels, tokens = images(encode, self.pairs, device)
        encode(pixels, tokens)
        alone = wall_clock(lambda: encode(pixels, tokens), device, least=self.ours.least / 8)
        top = max(best)
        without = self.ours.timed(self.pairs, top, before=lambda: encode(pixels, tokens))
        gain = without.sample / best[top].sample
        return self.row("cache", gain, 1 + alone / best[top].micro, samples=top)


def official_step(given: Setting, device: str, least: float) -> tuple[Timed, float]:
    """Check the script's loss against the trainer's, then time its step as it runs it.

    Returns:
        its time, and the largest difference of a loss as a share of what was allowed.
    """
    trainer = training_loop.make_trainer(
        given, device, mixed_precision="no", latents="official", compile="none"
    )
    networks = trainer.learner.networks
    reference: Any = networks.reference
    table = trainer.model.loaded.scheduler.alphas_cumprod
    ratio = check(
        trainer, official.OfficialStep(networks.policy, reference, table, given.beta, torch.float32)
    )
    trainer.optimizer.zero_grad(set_to_none=True)
    release(device)
    step = official.OfficialStep(networks.policy, reference.half(), table, given.beta)
    encode = official.encoders(given.model, device, torch.float16)
    pixels, tokens = images(encode, 1, device)
    optimizer: torch.optim.Optimizer = trainer.optimizer
    if not given.xl:
        optimizer = torch.optim.AdamW(networks.policy.parameters(), lr=1e-8)
    calls = Fraction(mean_official_calls()).limit_denominator(8)
    low = int(calls)
    deeper = int((calls - low) * calls.denominator)
    counts = cycle([low] * (calls.denominator - deeper) + [low + 1] * deeper)

    def micro() -> None:
        # t just above the last grid level that is run: 1 + 100 (calls − 2)
        t = torch.full((2,), 100 * (next(counts) - 1), device=device)
        loss = step.loss(
            encode(pixels, tokens),
            t,
            lambda shape, dtype: torch.randn(shape, dtype=dtype, device=device),
        )
        (loss / ACCUMULATED).backward()
        loss.item()

    def update() -> float:
        synchronize(device)
        began = time.perf_counter()
        nn.utils.clip_grad_norm_(networks.policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return time.perf_counter() - began

    update_seconds = []
    for _ in range(2):
        micro()
        update_seconds.append(update())
    counts = cycle([low] * (calls.denominator - deeper) + [low + 1] * deeper)
    reset_peak(device)

    def job() -> None:
        for _ in range(calls.denominator):
            micro()

    seconds = wall_clock(job, device, least=least) / calls.denominator
    memory = peak_memory(device)
    return Timed(seconds + min(update_seconds) / ACCUMULATED, memory, seconds), ratio


def mean_official_calls() -> float:
    """Inversion calls of the script on average over t in 0 … 999."""
    grid = range(-99, 901, 100)
    return sum(max(1, sum(level < t for level in grid)) for t in range(1000)) / 1000


def check(trainer: PreferenceTrainer, step: official.OfficialStep) -> float:
    """Compare losses of the same pairs, timesteps and noise at float32 rounding, or refuse.

    A perturbed policy makes them differ from ln 2.
    """
    learner = trainer.learner
    before = trainer.policy.conv_out.weight.detach().clone()
    with torch.no_grad():
        trainer.policy.conv_out.weight.mul_(1.05)
    loader = batches(trainer, 1)
    largest = 0.0
    device = trainer.accelerator.device
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        for number in range(3):
            batch = next(loader)
            t = (
                learner.timesteps.draw(
                    1, draws.generator(draws.Purpose.TIMESTEP, learner.config.seed, number)
                )
                .grid[-1]
                .tolist()
            )
            source = draws.generator(draws.Purpose.NOISE, learner.config.seed, number, 0)

            def draw(
                shape: tuple[int, ...], dtype: torch.dtype, source: torch.Generator = source
            ) -> Tensor:
                noise = [torch.randn(shape[1:], generator=source, dtype=dtype) for _ in range(2)]
                return torch.stack(noise).to(device)

            text = batch.paired_text
            added = None
            if batch.time_ids is not None:
                pooled = text["pooled_prompt_embeds"]
                added = {"text_embeds": pooled, "time_ids": batch.time_ids}
            pair = official.Encoded(batch.latents, text["prompt_embeds"], added)
            learner.learn(batch, number, last=True)
            ours = learner.meter.read(lambda mean: mean)["loss"]
            with torch.no_grad():
                theirs = step.loss(pair, torch.tensor(t * 2, device=device), draw)
                # errors of order 1 in units of the last place, each rounded in some tens of
                # operations; the logit is β/2 times a sum of four of them
                bound = 0.5 * step.beta * 4 * 32 * 2**-24
            if abs(ours - 0.6931472) < 10 * bound:
                raise AssertionError(f"t = {t[0]}: the loss {ours} says nothing, it is near ln 2")
            if not abs(ours - theirs.item()) <= bound * max(1.0, theirs.item()):
                raise AssertionError(
                    f"t = {t[0]}: the losses differ: {ours} by the trainer, {theirs.item()} by the "
                    f"official step (allowed {bound:.2e})"
                )
            largest = max(largest, abs(ours - theirs.item()) / bound)
    with torch.no_grad():
        trainer.policy.conv_out.weight.copy_(before)
    return largest


def images(encode: official.Encoders, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    """Pixels [2P, 3, H, W] and tokens [P, 77]."""
    rng = torch.Generator(device).manual_seed(4)
    side = encode.image_side
    pixels = torch.rand(2 * pairs, 3, side, side, generator=rng, device=device) * 2 - 1
    tokens = torch.randint(49408, (pairs, 77), generator=rng, device=device)
    return pixels, tokens


def lora_row(given: Setting, device: str) -> Row:
    """Peak memory of a LoRA of rank 8 at one pair: two optimiser steps, everything counted."""
    trainer = training_loop.make_trainer(given, device, rank=8, optimizer="adamw")
    release(device)
    reset_peak(device)
    loader = batches(trainer, 1)
    for number in range(2):
        trainer.learner.learn(next(loader), number, last=True)
        norm = trainer.stepper.step()
    if not norm.isfinite():
        raise AssertionError(f"the gradient's norm is {norm.item()}")
    reserved = 0.0
    if device.startswith("cuda"):
        reserved = torch.cuda.max_memory_reserved() / 2**30
    return Row(
        case=f"{given.model} lora, 1 pair, gradient checkpointing",
        metric="peak of the allocator's reserved memory",
        unit="GiB",
        ours=reserved,
        rivals={"card of 24 GB": CARD},
        ratios={"card of 24 GB": CARD / reserved} if reserved else {},
        target={"card of 24 GB": 1.0} if reserved else {},
        values={"allocated": peak_memory(device)},
    )


def scaling_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield samples/s of two processes against one, each on its own device."""
    accumulations = (1, 4)
    for accumulation in accumulations:
        found = {}
        for processes in (1, 2):
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(processes), "-m", "benchmarks.train_scaling"),
                *("--device", device, "--accumulation", str(accumulation)),
                *(["--quick"] if quick else []),
            ]
            # torchrun gives several processes one thread each, and a single one all of them
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
            found[processes] = json.loads(done.stdout.strip().splitlines()[-1])
        one, two = (found[processes]["samples_per_second"] for processes in (1, 2))
        pairs = found[2]["pairs"]
        yield Row(
            case=f"sd15, eager, 2 processes, {accumulation} micro-batches of {pairs} pairs a step",
            metric="samples of both devices, DDP, optimiser included",
            unit="samples/s",
            ours=two,
            rivals={"1 process": one},
            ratios={"1 process": two / one},
            target={"1 process": SCALING} if device == "cuda" else {},
        )


def rate(case: str, ours: Timed, *, target: float | None = None, **rivals: Timed) -> Row:
    """A row of samples per second, with the memory of each."""
    memory = {"ours": ours.memory} | {name: t.memory for name, t in rivals.items()}
    told = ", ".join(f"{name} {gib:.1f}" for name, gib in memory.items())
    return Row(
        case=f"{case} (GiB: {told})",
        metric="pairs at a noise level, optimiser included",
        unit="samples/s",
        ours=1 / ours.sample,
        rivals={name: 1 / t.sample for name, t in rivals.items()},
        ratios={name: t.sample / ours.sample for name, t in rivals.items()},
        target={} if target is None else {"official": target},
        values={f"GiB, {name}": gib for name, gib in memory.items()},
    )


def utilisation(case: str, name: str, ours: Ours, timed: Timed, peak: float) -> Row:
    """A row of the model's arithmetic, without what is recomputed, as a share of the peak."""
    achieved = ours.flops / timed.sample
    return Row(
        case=case,
        metric="model arithmetic over time",
        unit="TFLOP/s",
        ours=achieved / 1e12,
        rivals={"bf16 matrix peak": peak / 1e12},
        ratios={"bf16 matrix peak": achieved / peak},
        target={"bf16 matrix peak": MFU[name.split()[0]]},
    )


def overhead(case: str, whole: float, alone: float) -> Row:
    """A row of the micro-step against its model calls alone."""
    return Row(
        case=f"{case}, against its model calls alone",
        metric="wall clock of a micro-step",
        unit="s",
        ours=whole,
        rivals={"model calls alone": alone},
        ratios={"model calls alone": alone / whole},
        target={"model calls alone": 1 / (1 + OVERHEAD)},
    )


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> float:
    """Peak of allocated GiB since the last reset, with what graphs keep; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0.0
    # between their replays torch takes the memory of graphs for free, and gives it to nobody
    kept = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] != (0, 0)
    )
    return (torch.cuda.max_memory_allocated() + kept) / 2**30


def release(device: str) -> None:
    """Give memory back, so that the peak of what comes next is its own."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
