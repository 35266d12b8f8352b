"""What happens with a batch of pairs: noisy latents, model calls, loss, gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..determinism import deterministic_gradients
from ..losses import OBJECTIVES, Objective, PreferenceLoss
from . import draws, policy
from .batch import PairBatch
from .config import ConfigError, PreferenceConfig
from .families import Conditioning
from .graphed import Graphs
from .inversion import SOURCES
from .metrics import Meter, Throughput, count_flops, on_meta
from .models import Model
from .optimization import poison
from .timesteps import TimestepSampler
from .trajectory import Call, Trajectory


@dataclass
class Networks:
    """Who is called.

    Attributes:
        wrapped: the policy as accelerate wraps it, for the calls that have a gradient.
        policy: the policy itself, for those that have none.
        reference: or None for an objective without.
        as_trained: whether the reference is compiled as the policy is (`policy.compile_model`).
    """

    wrapped: nn.Module
    policy: nn.Module
    reference: nn.Module | None
    as_trained: bool = False


class Learner:
    """Accumulates the gradient of micro-batches.

    Args:
        config: of the run.
        accelerator: of the run.
        model: family and noise levels.
        networks: see `Networks`.
        dtype: of the model calls.

    Raises:
        ConfigError: settings that the model's schedule does not allow.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        accelerator: Any,
        model: Model,
        networks: Networks,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.accelerator, self.dtype = config, accelerator, dtype
        self.family, self.schedule, self.networks = model.family, model.schedule, networks
        self.objective: Objective = OBJECTIVES[config.loss_type]
        self._settings = config.settings
        self.timesteps = _timesteps(config, self.schedule.num_steps)
        self.meter, self.throughput = Meter(), Throughput()
        if "alphas_cumprod" in self.objective.inputs and not self.schedule.discrete:
            raise ConfigError(
                f"loss_type={config.loss_type} needs a model with a table of ᾱ, got a flow model"
            )
        alpha = torch.tensor(self.schedule.alpha[1:])
        table = alpha.square().float()
        if "alphas_cumprod" in self.objective.inputs and not bool((table > 0).all()):
            raise ConfigError(
                f"loss_type={config.loss_type} divides by ᾱ, and the model's schedule ends at 0 "
                "(rescale_betas_zero_snr)"
            )
        self._alphas_cumprod = table.to(accelerator.device)
        # made before anything is compiled or wrapped, counted when the shapes are known
        self._structure: nn.Module | None = on_meta(networks.policy)
        self._flops: tuple[int, int] | None = None
        self.graphs = Graphs(accelerator.device) if config.cuda_graphs else None
        self._rounded: tuple[nn.Module, Callable[[], None]] | None = None
        # SFT looks at winners only; KTO at both, but not as pairs
        pairs = self.objective.needs_pairs or "desirable" in self.objective.inputs
        self._rows = 2 if pairs else 1
        try:
            # what the schedule cannot serve is known by the beginning of any path
            self._path(torch.zeros(self._rows, 1), 0, self._rows)
        except ValueError as error:
            raise ConfigError(
                f"latents={config.source} and mixed_precision={config.mixed_precision} do not go "
                f"with the model's noise levels: {error}"
            ) from error

    def learn(self, batch: PairBatch, micro: int, *, last: bool) -> None:
        """Add the gradient of micro-batch number `micro` of the run.

        Args:
            last: whether it is the last of its optimiser step, when processes exchange gradients.
        """
        config, rows = self.config, self._rows
        clean = batch.latents[: rows * len(batch)]
        told = Conditioning(
            {name: torch.cat([value] * rows) for name, value in batch.text.items()},
            None if batch.time_ids is None else batch.time_ids[: len(clean)],
            config.guidance_scale,
        )
        samples = left = config.samples_per_inversion
        path = self._path(clean, micro, rows)
        inverting: nn.Module | None = None
        with contextlib.ExitStack() as rounded:
            # Around a context of autocast, one that does nothing keeps what it has rounded: the
            # weights of the inversion are rounded once, not at every call.
            rounded.enter_context(self._autocast(enabled=False))
            for call in path:
                if call.target is None:
                    inverting = self._inverting() if inverting is None else inverting
                    output = self._infer(inverting, call, told)
                else:
                    # what was rounded without gradient must not serve a call with it
                    rounded.close()
                    left -= 1
                    with self._exchanging(last and left == 0), self._repeating():
                        output = self._learnable(call, told)
                        result = self._loss(output, call, told, batch)
                        loss = result.loss / (config.gradient_accumulation_steps * samples)
                        self.accelerator.backward(loss, gradient=poison(loss))
                    self.meter.add(result.metrics())
                self._count(call, told)
                if not call.last:
                    path.give(output)

    def _inverting(self) -> nn.Module:
        """Who inverts a micro-batch: in a graph the policy with weights that are rounded here,
        once, unless blocks are compiled, which its second tree would not be."""
        compiled = self.config.compile != "none"
        if self.graphs is None or self.dtype == torch.float32 or compiled:
            return self.networks.policy
        if self._rounded is None:
            self._rounded = policy.rounded(self.networks.policy, self.dtype)
        model, again = self._rounded
        again()
        return model

    def _path(self, clean: Tensor, micro: int, rows: int) -> Trajectory:
        """The way to the training samples of a micro-batch, [rows·P, …]. The pairs of all processes
        draw their levels together, so that they share the number of steps."""
        config, count = self.config, len(clean) // rows
        first = self.accelerator.process_index * count
        drawn = self.timesteps.draw(
            count * self.accelerator.num_processes,
            draws.generator(draws.Purpose.TIMESTEP, config.seed, micro),
        )
        grid = drawn.grid[:, first : first + count].tolist()
        noise = [
            draws.generator(draws.Purpose.NOISE, config.seed, micro, first + pair)
            for pair in range(count)
        ]
        options: dict[str, dict[str, Any]] = {
            "q_sample": {"shared": self.objective.needs_pairs},
            "ddim": {"eta": config.inversion_eta, "train_at": drawn.train_at},
            "bdia": {"train_at": drawn.train_at},
            "renoise": {"eta": config.inversion_eta, "train_at": drawn.train_at},
            "official": {"num_steps": config.inversion_steps, "dtype": self.dtype},
        }
        return SOURCES[config.source](
            clean,
            # winner and loser of a pair share their levels
            [row * rows for row in grid],
            self.schedule,
            generator=noise,
            **options[config.source],
        )

    def _predict(self, model: nn.Module, call: Call, told: Conditioning) -> Tensor:
        """A model's output at a call, [B, …] float32, computed in `dtype`."""
        with self._autocast(enabled=self.dtype != torch.float32):
            output = self.family.predict(model, call.latents, call.timesteps, told)
        return output.float()

    def _learnable(self, call: Call, told: Conditioning) -> Tensor:
        """The policy's output at a call, whose backward adds to the gradients of its weights.

        By graphs where nothing is compiled, and in a single process: of several the wrapper
        exchanges gradients in the backward.
        """
        single = self.accelerator.num_processes == 1
        if self.graphs is None or not single or self.config.compile != "none":
            return self._predict(self.networks.wrapped, call, told)
        return self._graphed(self.graphs.learn, self.networks.policy, call, told)

    @torch.no_grad()
    def _infer(self, model: nn.Module, call: Call, told: Conditioning) -> Tensor:
        """A model's output without gradient."""
        if self.graphs is None:
            return self._predict(model, call, told)
        return self._graphed(self.graphs.call, model, call, told)

    def _refer(self, reference: nn.Module, call: Call, told: Conditioning) -> Tensor:
        """The reference's output, with the policy's bits where both have the same weights."""
        if self.networks.as_trained:
            return self._predict(reference, call, told).detach()
        return self._infer(reference, call, told)

    def _graphed(
        self, replay: Callable[..., Tensor], model: nn.Module, call: Call, told: Conditioning
    ) -> Tensor:
        """A model's output by a graph, which reads what it is given here and the weights."""
        names = sorted(told.text)

        def predict(latents: Tensor, timesteps: Tensor, *given: Tensor) -> Tensor:
            text = dict(zip(names, given, strict=False))
            ids = given[-1] if len(given) > len(names) else None
            same = Conditioning(text, ids, told.guidance)
            # what is kept of weights that were rounded outside has no place in a graph
            with self._autocast(enabled=self.dtype != torch.float32, keep=False):
                return self.family.predict(model, latents, timesteps, same).float()

        ids = () if told.time_ids is None else (told.time_ids,)
        text = (told.text[name] for name in names)
        return replay(model, predict, call.latents, call.timesteps, *text, *ids)

    def _autocast(self, *, enabled: bool, keep: bool = True) -> torch.autocast:
        """Autocast to the dtype of model calls, which keeps rounded weights to its end or not."""
        kind = self.accelerator.device.type
        return torch.autocast(kind, self.dtype, enabled=enabled, cache_enabled=keep)

    def _loss(
        self, output: Tensor, call: Call, told: Conditioning, batch: PairBatch
    ) -> PreferenceLoss:
        """The objective at a training sample."""
        reference = None
        if self.networks.reference is not None:
            reference = self._refer(self.networks.reference, call, told)
        target, wanted = call.target, self.objective.inputs
        settings: dict[str, Any] = {**self._settings}
        # whatever `ties` is: pairs that were handed over may have soft labels
        if self.objective.probability == "preference":
            settings["preference"] = batch.label
        elif self.objective.probability == "label_smoothing":
            settings["label_smoothing"] = 1 - batch.label
        if "alphas_cumprod" in wanted:
            settings["alphas_cumprod"] = self._alphas_cumprod[call.timesteps]
        if "desirable" in wanted:
            assert reference is not None and target is not None
            settings["desirable"] = torch.arange(len(output), device=output.device) < len(batch)
            # the mean over all processes, as in its script
            with torch.no_grad():
                errors = ops.preference_errors(output, reference, target)
                gain = (errors.e_ref - errors.e_theta).mean()
            settings["kl"] = self.accelerator.reduce(gain, reduction="mean").clamp(min=0)
        return self.objective.function(output, reference, target, **settings)

    def _repeating(self) -> contextlib.AbstractContextManager[None]:
        """Policy, reference and backward use the same kernels, whose bits repeat. The inversion,
        which has no backward, may use others."""
        free = self.config.nondeterministic
        return contextlib.nullcontext() if free else deterministic_gradients()

    def _exchanging(self, exchange: bool) -> contextlib.AbstractContextManager[None]:
        """Whether the backward in here exchanges gradients between processes."""
        if exchange:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(
            self.networks.wrapped
        )
        return quiet

    def _count(self, call: Call, told: Conditioning) -> None:
        """Count a call's FLOPs, and its samples if it is trained on."""
        if self._flops is None:
            self._flops = self._measure(call, told)
        trained, inverted = self._flops
        count = len(call.latents)
        self.throughput.flops += count * (inverted if call.target is None else trained)
        self.throughput.samples += count if call.target is not None else 0

    def _measure(self, call: Call, told: Conditioning) -> tuple[int, int]:
        """FLOPs of a sample: trained on (policy with backward, and reference), and inverted."""

        def one(value: Tensor) -> Tensor:
            return torch.empty_like(value[:1], device="meta")

        empty = Conditioning(
            {name: one(value) for name, value in told.text.items()},
            None if told.time_ids is None else one(told.time_ids),
            told.guidance,
        )
        latents, times = one(call.latents), one(call.timesteps)

        policy = self._structure
        assert policy is not None
        self._structure = None
        # float32, as counting does not depend on it and meta tensors have no autocast
        policy.float()
        called, backward = count_flops(lambda: self.family.predict(policy, latents, times, empty))
        return called + backward + (called if self.networks.reference else 0), called


def _timesteps(config: PreferenceConfig, total: int) -> TimestepSampler:
    """t uniform; one bucket where nothing is inverted, or as the official script does it."""
    inverted = config.source not in ("q_sample", "official")
    try:
        return TimestepSampler(
            total,
            config.inversion_steps if inverted else 1,
            samples_per_inversion=config.samples_per_inversion,
            first_timestep=config.first_timestep,
        )
    except ValueError as error:
        raise ConfigError(
            f"inversion_steps, samples_per_inversion or first_timestep cannot be: {error}"
        ) from error
