"""Preference training: one loop, from pairs to weights that stock diffusers loads."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..determinism import reproducible_training
from ..environment import versions
from ..losses import OBJECTIVES
from . import policy, weights
from .artefacts import CONFIG, push, read_result, write_result
from .checkpoint import STATE, Checkpoints, read_state, rng_state, set_rng_state
from .config import ConfigError, PreferenceConfig
from .metrics import measured_peak
from .models import load_model
from .opening import open_pairs
from .optimization import Stepper, check_schedule, make_optimizer, make_schedule
from .order import BatchOrder
from .processes import make_accelerator, memory_advice, on_main, together
from .step import Learner, Networks
from .validation import draw_images, keep_images

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PreferenceTrainer:
    """Trains a denoiser on preference pairs.

        trainer = PreferenceTrainer(PreferenceConfig(...))
        trainer.train()

    What happens in an optimiser step depends on the config, the pairs and the step's number alone:
    batches, timesteps and noise are functions of (seed, step, pair). So a run that is killed and
    resumed ends with the same bits, and processes see together what one process with their whole
    batch would see.

    Args:
        config: see `PreferenceConfig`.
        model: a loaded pipeline, whose denoiser is trained in place; None loads the config's.
        dataset: `PairData`, or anything that `sources.open_source` takes; None takes the config's
            `dataset_name`.

    Raises:
        ConfigError, DataError: naming the field, or what is wrong with the pairs.
        TrainingError: too little memory for the weights.
    """

    def __init__(self, config: PreferenceConfig, model: Any = None, dataset: Any = None) -> None:
        self.accelerator = accelerator = make_accelerator(config)
        # that of `accelerate config` where none is given
        self.config = config = replace(config, mixed_precision=accelerator.mixed_precision)
        self.dtype = _DTYPES[accelerator.mixed_precision]
        if config.cuda_graphs and accelerator.device.type != "cuda":
            raise ConfigError(f"cuda_graphs needs a GPU, got the device {accelerator.device}")
        self.folder = Path(config.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output_dir must be a folder, and {self.folder} is a file")
        if (self.folder / "model_index.json").exists():
            # whose denoiser the result would replace
            raise ConfigError(f"output_dir must not be the folder of a pipeline, got {self.folder}")
        check_schedule(config, config.max_train_steps)
        self.checkpoints = Checkpoints(self.folder, config.checkpoints_total_limit, accelerator)
        resume = self.checkpoints.resolve(config.resume_from_checkpoint)
        self.model = load_model(config, model, self.dtype)
        self.config = config = config.for_model(self.model.pipeline)
        with memory_advice(config):
            self.data = open_pairs(config, self.model, dataset, accelerator, self.dtype)
        self.order = self._order()
        micro_batches = self.order.steps_per_epoch * config.num_train_epochs
        self.total_steps = config.max_train_steps or math.ceil(
            micro_batches / config.gradient_accumulation_steps
        )
        if config.max_train_steps is None:
            check_schedule(config, self.total_steps)
        self.step = 0
        """Optimiser steps done."""
        self.history: list[dict[str, float]] = []
        """What this process logged, every `logging_steps`, each with its `step`."""
        state = None if resume is None else read_state(resume)
        if resume is not None and state is not None:
            self._check_same(state, "checkpoint", resume)
        self._check_result(anew=resume is None)
        with memory_advice(config):
            self._build(resume)
            if resume is not None and state is not None:
                self._load(resume, state)

    def _order(self) -> BatchOrder:
        config = self.config
        buckets = self.data.buckets[: config.max_train_samples]
        try:
            return BatchOrder(
                buckets,
                batch_size=config.train_batch_size,
                seed=config.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            )
        except ValueError as error:
            raise ConfigError(f"train_batch_size is too large for the pairs: {error}") from error

    def _build(self, resume: Path | None) -> None:
        """Make policy, reference, optimiser and learning-rate schedule."""
        from diffusers.training_utils import EMAModel

        config, accelerator = self.config, self.accelerator
        denoiser = self.model.denoiser.to(accelerator.device)
        if config.rank is None:
            reference = self.model.reference
            if reference is not None:
                reference.to(accelerator.device)
            trained, reference = policy.full(denoiser, self.dtype, reference)
        else:
            trained, reference = policy.lora(
                denoiser,
                self.dtype,
                rank=config.rank,
                alpha=config.lora_alpha or config.rank,
                targets=config.lora_target_modules,
                seed=config.seed,
            )
        # dropout off: policy and reference differ by their weights alone
        trained.eval()
        reference.eval()
        if resume is not None:
            self._load_weights(resume, trained)
        needed = OBJECTIVES[config.loss_type].needs_reference
        networks = Networks(trained, trained, reference if needed else None)
        self.learner = Learner(config, accelerator, self.model, networks, self.dtype)
        if config.gradient_checkpointing or self.model.denoiser.is_gradient_checkpointing:
            # which a loaded pipeline may do already, in a way that graphs cannot
            policy.checkpoint_activations(self.model.denoiser)
        sharded = accelerator.state.distributed_type == "FSDP"
        # a LoRA shares its frozen weights with the reference
        networks.as_trained = config.compile == "blocks" and config.rank is None
        for module in (trained, networks.reference):
            if module is not None and config.fused_layers:
                policy.fuse_layers(module, accelerator.device, sharded=sharded)
            if module is not None and config.compile != "none":
                policy.compile_model(
                    module,
                    config.compile,
                    self.model.family.blocks,
                    as_trained=networks.as_trained and module is reference,
                )
        optimizer = make_optimizer(
            config, [p for p in trained.parameters() if p.requires_grad], self._learning_rate()
        )
        own = vars(trained).get("forward")
        networks.wrapped, prepared = accelerator.prepare(trained, optimizer)
        networks.policy = accelerator.unwrap_model(networks.wrapped)
        policy.restore_forward(networks.policy, own)
        self.policy: Any = networks.policy
        self.optimizer: torch.optim.Optimizer = prepared.optimizer
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.sharded = any(hasattr(p, "full_tensor") for p in self.parameters)
        if config.cuda_graphs and self.sharded:
            raise ConfigError("cuda_graphs needs whole weights on every process, got sharded ones")
        if self.sharded and networks.reference is not None:
            policy.shard(networks.reference, self.model.family.blocks)
        if self.sharded and config.rank is not None:
            policy.gather_on_demand(networks.policy)
        self.stepper = Stepper(
            self.optimizer, accelerator.scaler, config.max_grad_norm, sharded=self.sharded
        )
        self.schedule = make_schedule(config, self.optimizer, self.total_steps)
        self.ema: Any = None
        if config.use_ema:
            if self.sharded:
                raise ConfigError("use_ema needs whole weights on every process, got sharded ones")
            self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)

    def _learning_rate(self) -> float:
        config = self.config
        if not config.scale_lr:
            return config.learning_rate
        pairs = config.train_batch_size * config.gradient_accumulation_steps
        processes: int = self.accelerator.num_processes
        return config.learning_rate * pairs * processes

    def train(self, advance: Callable[[], object] | None = None) -> list[dict[str, float]]:
        """Train to the end, and write the result into `output_dir`.

        Args:
            advance: called after every optimiser step, in the place of the progress bar.

        Returns:
            `history`.

        Raises:
            TrainingError: too many steps without a finite gradient, too little memory, or a
                checkpoint that cannot be written.
        """
        config = self.config
        if self.accelerator.is_main_process:
            # a run that was killed after it had written one may have left one too many
            self.checkpoints.prune(self.step)
        self._start_trackers()
        accumulation = config.gradient_accumulation_steps
        batches = self.data.loader(
            self.order,
            start=self.step * accumulation,
            proportion_empty_prompts=config.proportion_empty_prompts,
            num_workers=config.dataloader_num_workers,
            device=self.accelerator.device,
        )
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="Steps",
            disable=advance is not None or not self.accelerator.is_local_main_process,
        )
        free = config.nondeterministic
        settings = contextlib.nullcontext() if free else reproducible_training()
        with bar, memory_advice(config), settings:
            while self.step < self.total_steps:
                for part in range(accumulation):
                    batch = next(batches)
                    self.model.check(batch)
                    micro = self.step * accumulation + part
                    self.learner.learn(batch, micro, last=part == accumulation - 1)
                self.learner.meter.add({"grad_norm": self.stepper.step()})
                rate = float(self.schedule.get_last_lr()[0])
                self.schedule.step()
                if self.ema is not None:
                    self.ema.step(self.parameters)
                self.step += 1
                (advance or bar.update)()
                if self._due(config.logging_steps):
                    values = self._log(rate)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{rate:.1e}")
                with self.learner.throughput.paused():
                    if self.step % config.checkpointing_steps == 0:
                        self.save_checkpoint()
                    if config.validation_prompts and self._due(config.validation_steps):
                        self._validate()
        # the memory of its graphs is somebody else's now
        self.learner.graphs = None
        self.save()
        # not end_training, which takes the process group from whatever this process does next
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.history

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _log(self, rate: float) -> dict[str, float]:
        """Read the metrics of the interval, the one place where the host waits for the device."""
        config, learner = self.config, self.learner
        processes = self.accelerator.num_processes
        values = learner.meter.read(lambda x: self.accelerator.reduce(x, reduction="mean"))
        speed = learner.throughput.look(self._peak())
        values |= {
            "lr": rate,
            "skipped_steps": self.stepper.check(config.max_nonfinite_steps),
            "samples_per_second": speed.pop("samples_per_second") * processes,
            **speed,
        }
        self.history.append({"step": self.step, **values})
        self.accelerator.log(values, step=self.step)
        return values

    def _peak(self) -> float:
        """FLOP/s of this device in the dtype of the model calls."""
        with self.learner.throughput.paused():
            return measured_peak(self.accelerator.device, self.dtype)

    def _start_trackers(self) -> None:
        if not self.accelerator.log_with:
            return
        settings = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in self.config.to_dict().items()
        }
        self.accelerator.init_trackers(self.config.tracker_name, config=settings)

    def _validate(self) -> None:
        with self._averaged():
            images = draw_images(self.config, self.model, self.policy, self.dtype)
        together(
            self.accelerator,
            lambda: keep_images(self.accelerator, self.config, images, self.step),
            lambda error: (
                f"validation images cannot be written to {self.folder} ({error}): free disk space "
                f"and resume with resume_from_checkpoint=latest"
            ),
        )

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The policy has its averaged weights, where there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def save(self) -> None:
        """Write the weights (or their average), the config and the model card; all processes must
        call it.

        Raises:
            TrainingError: they cannot be written, or uploaded; on all processes.
        """
        accelerator = self.accelerator
        with self._averaged():
            state = weights.full_state(self.policy)
            together(
                accelerator,
                on_main(accelerator, lambda: self._write_result(state)),
                lambda error: (
                    f"the result cannot be written to {self.folder} ({error}): free disk space and "
                    f"call save() again, or run with resume_from_checkpoint=latest"
                ),
            )
        if self.config.push_to_hub:
            together(
                accelerator,
                on_main(accelerator, lambda: push(self.folder, self.config)),
                lambda error: (
                    f"the result is in {self.folder} and cannot be uploaded ({error}): call save() "
                    f"again, or upload the folder by hand"
                ),
            )

    def _write_result(self, state: dict[str, Tensor]) -> None:
        write_result(
            self.folder,
            self.config,
            self.model,
            self.step,
            self._data_identity(),
            lambda folder: self._save_weights(folder, state),
        )

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`; all processes must call it.

        Raises:
            TrainingError: it cannot be written. The checkpoints before it stay.
        """
        state = weights.full_state(self.policy)
        optimizer = weights.optimizer_state(self.policy, self.optimizer, sharded=self.sharded)
        trainer = {
            "step": self.step,
            "config": self.config.to_dict(),
            "data": self._data_identity(),
            "stepper": self.stepper.state(),
            "versions": versions(),
        }

        def write(folder: Path) -> None:
            accelerator = self.accelerator
            states = rng_state(accelerator.device)
            torch.save(states, folder / f"random_states_{accelerator.process_index}.pkl")
            if not accelerator.is_main_process:
                return
            self._save_weights(folder, state)
            torch.save(optimizer, folder / "optimizer.bin")
            torch.save(self.schedule.state_dict(), folder / "scheduler.bin")
            if self.accelerator.scaler is not None:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")
            if self.ema is not None:
                torch.save(self.ema.state_dict(), folder / "ema.bin")
            (folder / STATE).write_text(json.dumps(trainer, indent=1) + "\n")

        self.checkpoints.save(self.step, write)

    def _save_weights(self, folder: Path, state: dict[str, Tensor]) -> None:
        component = self.model.family.component
        if self.config.rank is None:
            weights.save_denoiser(folder / component, self.policy, state)
        else:
            weights.save_lora(folder, self.model.pipeline, component, self.policy, state)

    def _load_weights(self, folder: Path, trained: nn.Module) -> None:
        component = self.model.family.component
        if self.config.rank is None:
            weights.load_denoiser(folder / component, trained)
        else:
            weights.load_lora(folder, self.model.pipeline, component, trained)

    def _data_identity(self) -> dict[str, int]:
        return {
            "pairs": len(self.data.buckets[: self.config.max_train_samples]),
            "micro_batches_of_an_epoch": self.order.steps_per_epoch,
            "processes": self.accelerator.num_processes,
        }

    def _check_same(self, state: dict[str, Any], kind: str, folder: Path) -> None:
        """Refuse the state of a checkpoint or a result (`kind`) that is not of this run.

        Raises:
            ConfigError: naming what differs.
        """
        whose = f"the {kind}"
        lines = self.config.differences(state["config"], whose)
        lines += [
            f"{name}: {whose} has {state['data'].get(name)}, this run {value}"
            for name, value in self._data_identity().items()
            if state["data"].get(name) != value
        ]
        if lines:
            raise ConfigError(
                f"{whose} {folder} is of another run; restore these or begin a new "
                f"output_dir:\n  " + "\n  ".join(lines)
            )

    def _check_result(self, *, anew: bool) -> None:
        """Refuse to replace the result of another run, and with a run from its start that of a
        longer one.

        Raises:
            ConfigError: naming what differs.
        """
        if not (self.folder / CONFIG).exists():
            return
        result = read_result(self.folder)
        state = {"config": result, "data": result.get("data", {})}
        self._check_same(state, "result", self.folder)
        if anew and result["steps"] > self.total_steps:
            raise ConfigError(
                f"the result {self.folder} has {result['steps']} optimiser steps, and this run "
                f"{self.total_steps}: choose another output_dir"
            )

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; its weights are loaded before."""

        def read(name: str) -> Any:
            return torch.load(folder / name, map_location="cpu", weights_only=True)

        weights.load_optimizer_state(
            self.policy, self.optimizer, read("optimizer.bin"), sharded=self.sharded
        )
        self.schedule.load_state_dict(read("scheduler.bin"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read("scaler.pt"))
        if self.ema is not None:
            self.ema.load_state_dict(read("ema.bin"))
            self.ema.to(self.accelerator.device)
        self.stepper.load(state["stepper"])
        self.step = int(state["step"])
        states = read(f"random_states_{self.accelerator.process_index}.pkl")
        set_rng_state(states, self.accelerator.device)
