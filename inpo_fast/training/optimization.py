"""The optimiser step: clipped, skipped on the device where something is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, PreferenceConfig


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to do."""


def make_optimizer(
    config: PreferenceConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser that the config names.

    Raises:
        ConfigError: its package is missing.
    """
    parameters = list(parameters)
    decay = config.adam_weight_decay
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # a fixed learning rate, as the official scripts have it for SDXL
        adafactor: torch.optim.Optimizer = Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
        )
        return adafactor
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"use_8bit_adam needs bitsandbytes (pip install bitsandbytes), and it cannot be "
                f"imported: {error}"
            ) from error
        eight_bit: torch.optim.Optimizer = AdamW8bit(parameters, **options)
        return eight_bit
    # fused: one kernel, and one that can leave a step out on the device
    return torch.optim.AdamW(parameters, fused=True, **options)


def make_schedule(
    config: PreferenceConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule that the config names, as diffusers' scripts have it: warmed up,
    its first step is at 0."""
    from diffusers.optimization import get_scheduler

    schedule: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    return schedule


def check_schedule(config: PreferenceConfig, total_steps: int | None) -> None:
    """Refuse a schedule that does not exist or by which nothing is learnt.

    Args:
        config: of the run.
        total_steps: of the run; None while it is not known.

    Raises:
        ConfigError: no such schedule, or one that is 0 in every step.

    Warns:
        UserWarning: the run ends before the learning rate has risen to its peak.
    """
    from diffusers.optimization import SchedulerType

    # piecewise_constant needs rules that no flag can give
    names = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in names:
        raise ConfigError(
            f"lr_scheduler must be one of {', '.join(names)}, got {config.lr_scheduler!r}"
        )
    if total_steps is None:
        return
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = make_schedule(config, nothing, total_steps).lr_lambdas[0]
    warmup = f"lr_warmup_steps={config.lr_warmup_steps}"
    if not any(factor(step) for step in range(total_steps)):
        raise ConfigError(
            f"{warmup} leaves a run of {total_steps} optimiser steps at a learning rate of 0, with "
            "which it would learn nothing: lower it"
        )
    last = factor(total_steps - 1)
    if config.lr_warmup_steps >= total_steps and last < 1:
        warnings.warn(
            f"{warmup} is not over when the run ends after {total_steps} optimiser steps: its "
            f"learning rate rises to {last:.0%} of learning_rate only",
            stacklevel=3,
        )


class Stepper:
    """Takes optimiser steps and counts those left out because the gradient is not finite.

    A loss that is not finite must poison the gradient (`poison`), so that all processes, which
    share the reduced gradient, decide alike. Fused AdamW leaves the step out on the device; for
    another optimiser the host looks at the norm, once a step.

    Args:
        optimizer: the bare optimiser.
        scaler: of float16, or None.
        max_grad_norm: the gradient is clipped to this norm.
        sharded: whether parameters are DTensors, which the fused skip does not take.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        max_grad_norm: float,
        *,
        sharded: bool = False,
    ) -> None:
        self.optimizer, self.scaler, self.max_grad_norm = optimizer, scaler, max_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._on_device = bool(optimizer.defaults.get("fused")) and not sharded
        device = self._parameters[0].device
        zero = torch.zeros((), device=device)
        self.skipped, self._row, self._longest = zero, zero, zero

    def step(self) -> Tensor:
        """Clip and step; the gradient's norm, [], is returned and the gradient dropped."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = (~norm.isfinite()).float()
        self.skipped = self.skipped + bad
        self._row = (self._row + 1) * bad
        self._longest = torch.maximum(self._longest, self._row)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._on_device:
            # what GradScaler does for a fused optimiser
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self, limit: int) -> int:
        """Steps left out so far; waits for the device.

        Raises:
            TrainingError: `limit` of them came in a row.
        """
        skipped, longest = torch.stack([self.skipped, self._longest]).tolist()
        self._longest = self._row
        if longest >= limit:
            raise TrainingError(
                f"loss or gradient was not finite in {int(longest)} steps in a row "
                f"(max_nonfinite_steps {limit}), {int(skipped)} in all: lower learning_rate, use "
                f"bf16 instead of fp16, and look for corrupt latents with inpo-fast validate-data"
            )
        return int(skipped)

    def state(self) -> dict[str, float]:
        return {"skipped": self.skipped.item(), "row": self._row.item()}

    def load(self, state: dict[str, float]) -> None:
        device = self.skipped.device
        self.skipped = torch.tensor(state["skipped"], device=device)
        self._row = self._longest = torch.tensor(state["row"], device=device)


def poison(loss: Tensor) -> Tensor:
    """The gradient to start the backward of a loss [] with: 1, or NaN where the loss is not
    finite."""
    one = torch.ones_like(loss)
    return torch.where(loss.detach().isfinite(), one, torch.nan)
