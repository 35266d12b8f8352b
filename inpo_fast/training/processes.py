"""The processes and the memory that a training runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .cache import is_cache
from .config import ConfigError, PreferenceConfig
from .optimization import TrainingError

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk looks like to Python, torch and safetensors."""


def make_accelerator(config: PreferenceConfig) -> Any:
    """Accelerate's view of the processes.

    Raises:
        ConfigError: a way of distribution that is not supported, a precision that the device has
            not, or a tracker that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, ProjectConfiguration, set_seed

    # accelerate keeps precision, device and distribution of its first Accelerator, and of FSDP's
    # plugin nothing but that there was one; every trainer has its own
    AcceleratorState._reset_state(reset_partial_state=True)
    report = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(
            cpu=config.use_cpu,
            mixed_precision=config.mixed_precision,
            log_with=report,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs")
            ),
        )
    except ValueError as error:
        raise ConfigError(f"mixed_precision or report_to cannot be: {error}") from error
    if report is not None and not accelerator.log_with:
        # accelerate warns only and trains without it
        wanted, package = ("a tracker", "tensorboard") if report == "all" else (report, report)
        raise ConfigError(
            f"report_to={report} needs {wanted}, which is not installed: pip install {package}"
        )
    kind = accelerator.distributed_type
    plugin = accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    if kind == DistributedType.DEEPSPEED or (plugin is not None and plugin.fsdp_version != 2):
        raise ConfigError(
            "processes must share the work by DDP or FSDP2 (accelerate config: fsdp_version 2), "
            f"got {kind.value}"
        )
    if plugin is not None:
        # accelerate's would round what autocast leaves alone, the weights of norms and the reduced
        # gradient, and the policy would not start as the reference
        plugin.mixed_precision_policy = None
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            "mixed_precision=fp16 needs an accelerator with a loss scale, or gradients vanish; use "
            "bf16 on the CPU"
        )
    # what draws from torch's own generators: nothing here, but perhaps a model
    set_seed((config.seed + accelerator.process_index) % 2**32)
    if config.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


@contextlib.contextmanager
def memory_advice(config: PreferenceConfig) -> Iterator[None]:
    """Say what to lower where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = []
        if config.train_batch_size > 1:
            advice.append(
                f"lower train_batch_size ({config.train_batch_size}) and raise "
                "gradient_accumulation_steps by the same factor"
            )
        if config.cuda_graphs:
            advice.append("do without cuda_graphs, which keep the memory of every size of a batch")
        if not config.gradient_checkpointing:
            advice.append("set gradient_checkpointing")
        if config.mixed_precision in (None, "no"):
            advice.append("set mixed_precision=bf16")
        if config.rank is None:
            advice.append("train a LoRA (rank=8)")
            if not config.use_8bit_adam and config.optimizer == "adamw":
                advice.append("set use_8bit_adam or optimizer=adafactor")
        if config.dataset_name is not None and not is_cache(config.dataset_name):
            advice.append("train from a cache (inpo-fast cache), which needs no encoders")
        advice.append("lower resolution")
        raise TrainingError("too little memory: " + "; or ".join(advice) + f" ({error})") from error


def together(
    accelerator: Any, action: Callable[[], object], message: Callable[[object], str]
) -> None:
    """Run an action that writes on every process, and fail on all of them where it fails on one,
    for which the others would wait at their next exchange.

    Args:
        accelerator: of the run.
        action: has no exchange with other processes.
        message: of the error, given what went wrong or where to see it.

    Raises:
        TrainingError: on all processes. One that failed in another way than `WRITE_ERRORS` raises
            what it has caught.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    failed = torch.tensor(float(error is not None), device=accelerator.device)
    if not accelerator.reduce(failed, reduction="sum").item():
        return
    if error is not None and not isinstance(error, WRITE_ERRORS):
        raise error
    raise TrainingError(message(error or "see the other process")) from error


def on_main(accelerator: Any, action: Callable[[], object]) -> Callable[[], object]:
    """The action where this is the main process, and nothing on the others."""
    return action if accelerator.is_main_process else lambda: None
