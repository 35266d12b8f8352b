"""The configuration of a preference training, and the command-line flags made from it."""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..losses import OBJECTIVES
from ..losses.registry import Setting
from . import loss_options
from .inversion import SOURCES
from .pairs import TieMode


class ConfigError(ValueError):
    """A setting that cannot be; the message names the field."""


def _option(default: Any, about: str, *, free: bool = False) -> Any:
    """A field with its help. `free` fields may change when a run is resumed: they decide what is
    written and shown, never a weight."""
    return field(default=default, metadata={"help": about, "free": free})


@dataclass(frozen=True)
class PreferenceConfig:
    """Everything that decides a run. Names are those of diffusers' training scripts where they have
    one; `inpo-fast train --help` prints what each means.

    Raises:
        ConfigError: naming the field, what must hold and what came.
    """

    pretrained_model_name_or_path: str = _option(
        "", "folder or hub name of a pipeline: Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX"
    )
    pretrained_vae_model_name_or_path: str | None = _option(
        None, "another autoencoder, as SDXL's madebyollin/sdxl-vae-fp16-fix"
    )
    revision: str | None = _option(None, "revision of the model on the hub")
    variant: str | None = _option(None, "variant of the weight files, as fp16")
    unet_init: str | None = _option(
        None,
        "denoiser that policy and reference start from, instead of the pipeline's; for "
        "inversion-dpo the policy alone",
    )

    dataset_name: str | None = _option(
        None,
        "pairs: a cache of `inpo-fast cache`, a .parquet or .arrow file, a folder of them, a "
        "folder with w/ and l/, or the name of a data set on the hub",
    )
    dataset_split_name: str | None = _option(None, "split of a data set that has several")
    max_train_samples: int | None = _option(
        None, "use the first so many rows only (of a cache: pairs)"
    )
    resolution: int | None = _option(
        None, "height and width of the images; by default what the model was trained on"
    )
    aspect_ratio_buckets: str | None = _option(
        None, "sizes h,w;h,w instead of the resolution; a pair gets the nearest in aspect"
    )
    random_crop: bool = _option(False, "crop at random instead of in the centre")
    no_hflip: bool = _option(
        False, "never mirror pairs; by default half of them are, both images of a pair together"
    )
    ties: TieMode = _option(  # noqa: RUF009 - a field, as the others
        "drop",
        "pairs with label 0.5: leave them out (they say nothing about the better image), let "
        "chance name the winner, keep them with p = 0.5, or refuse them",
    )
    proportion_empty_prompts: float = _option(
        0.2, "captions replaced by the empty prompt, so that guidance keeps working (InPO: 0.2)"
    )
    dataloader_num_workers: int = _option(
        0, "processes that read and decode; 0 does it in this one", free=True
    )

    loss_type: str = _option("inpo", f"objective: {', '.join(OBJECTIVES)}")
    beta_dpo: float | None = _option(
        None,
        "β; by default that of the objective's public script for the model (InPO: 2000, for SDXL "
        "5000); SmPO multiplies it by 10 (2p - 1), with p = 1 for a pair that is no tie",
    )
    loss_options: tuple[str, ...] = _option(
        (),
        "other settings of the objective, each NAME=VALUE; by default those of its public script "
        f"for the model, for SD1.5 {loss_options.described()}, and for SDXL dspo variant=sdxl",
    )
    latents: str | None = _option(
        None,
        f"where x_t comes from: {', '.join(SOURCES)}; by default what the objective's paper takes",
    )
    inversion_steps: int = _option(
        10, "inversion steps that would reach the last timestep; t takes ⌈t·n/T⌉ (InPO: 10)"
    )
    inversion_eta: float = _option(
        0.0, "noise of a DDIM or ReNoise inversion step, as in η-DDIM; the official script has 0.1"
    )
    samples_per_inversion: int = _option(
        1,
        "noise levels of one inversion path that are trained on; more cost few extra model calls "
        "(the paper: 1)",
    )
    first_timestep: int = _option(0, "t is uniform from here to the last timestep (the papers: 0)")
    guidance_scale: float = _option(
        3.5, "what FLUX's guidance embedding is told, as in diffusers' scripts"
    )

    rank: int | None = _option(
        None, "train a LoRA of this rank; by default all weights are trained"
    )
    lora_alpha: float | None = _option(None, "scale of the LoRA, by default its rank: factor 1")
    lora_target_modules: tuple[str, ...] = _option(
        ("to_k", "to_q", "to_v", "to_out.0"), "layers with adapters, by the end of their names"
    )

    output_dir: str = _option("inpo-model", "folder of checkpoints and of the result", free=True)
    seed: int = _option(0, "of data order, noise, timesteps and adapters")
    train_batch_size: int = _option(4, "pairs of a micro-batch on each device")
    gradient_accumulation_steps: int = _option(1, "micro-batches of an optimiser step")
    max_train_steps: int | None = _option(None, "optimiser steps; overrides num_train_epochs")
    num_train_epochs: int = _option(1, "passes over the pairs")
    learning_rate: float = _option(
        1e-5, "peak; 1e-5 is what InPO's 1e-8 per pair comes to at its 1024 pairs"
    )
    scale_lr: bool = _option(
        False, "multiply the learning rate by accumulation steps, batch size and processes"
    )
    lr_scheduler: str = _option(
        "constant_with_warmup", "a name that diffusers.optimization.get_scheduler knows"
    )
    lr_warmup_steps: int = _option(100, "optimiser steps over which the learning rate rises from 0")
    optimizer: Literal["adamw", "adafactor"] = _option(
        "adamw", "adafactor keeps no momentum and saves 8 bytes a weight less a little"
    )
    use_8bit_adam: bool = _option(False, "AdamW with 8-bit states (needs bitsandbytes)")
    adam_beta1: float = _option(0.9, "β1 of AdamW")
    adam_beta2: float = _option(0.999, "β2 of AdamW")
    adam_weight_decay: float = _option(1e-2, "weight decay, of Adafactor too")
    adam_epsilon: float = _option(1e-8, "ε of AdamW")
    max_grad_norm: float = _option(1.0, "the gradient is clipped to this norm; inf: never")
    use_ema: bool = _option(False, "average the weights, and write the average")
    ema_decay: float = _option(0.9999, "decay of the average")
    max_nonfinite_steps: int = _option(
        20,
        "stop after so many skipped steps in a row, whose loss or gradient was not finite; float16 "
        "skips a few while it looks for its loss scale",
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "of the model calls; by default what `accelerate config` says"
    )
    use_cpu: bool = _option(False, "train on the CPU even where there is an accelerator")
    nondeterministic: bool = _option(
        False,
        "give up that a resumed run ends with the bits of an uninterrupted one: attention may then "
        "use cuDNN's backward, which is faster and repeats no bits",
    )
    allow_tf32: bool = _option(False, "TF32 for float32 matrix products, on Ampere and later")
    gradient_checkpointing: bool = _option(
        False, "recompute activations in the backward: less memory, about a third more time"
    )
    compile: Literal["none", "blocks", "full"] = _option(
        "none",
        "torch.compile for policy and reference: nothing, the repeated blocks, or the whole "
        "denoiser; it takes minutes to compile, once for every size of a batch",
    )
    fused_layers: bool = _option(
        False,
        "what lies between the UNet's products (norms, activations, gates, biases, residual sums) "
        "as Triton kernels: fewer passes over memory with nothing to compile; in place of compile",
    )
    cuda_graphs: bool = _option(
        False,
        "model calls as CUDA graphs, captured for every size of a batch (those with gradient, too, "
        "in a single process and without compile): for a GPU that is faster than the host can "
        "launch kernels; keeps activations and gradients to the end, beside a second size of a "
        "batch while it is captured",
    )

    checkpointing_steps: int = _option(500, "optimiser steps between checkpoints", free=True)
    checkpoints_total_limit: int | None = _option(
        None, "keep so many checkpoints, the newest", free=True
    )
    resume_from_checkpoint: str | None = _option(
        None,
        "latest, or the folder of a checkpoint; where there is no latest, a new run, which may "
        "replace the result of the same run (with the same bits, unless nondeterministic) and of "
        "no other",
        free=True,
    )
    logging_steps: int = _option(
        10, "optimiser steps between looks at the metrics, each of which waits once", free=True
    )
    report_to: str = _option("none", "trackers: tensorboard, wandb, comet_ml, all, none", free=True)
    tracker_name: str = _option("inpo-fast", "project of the trackers", free=True)
    validation_prompts: tuple[str, ...] = _option(
        (), "prompts of validation images, which go to output_dir/validation too", free=True
    )
    validation_steps: int = _option(100, "optimiser steps between validations", free=True)
    num_validation_images: int = _option(1, "images of each prompt", free=True)
    validation_inference_steps: int = _option(25, "sampling steps of a validation image", free=True)
    validation_guidance_scale: float = _option(7.5, "guidance of a validation image", free=True)

    output_kohya_format: bool = _option(
        False, "write the LoRA with kohya's names too, for ComfyUI and WebUI", free=True
    )
    push_to_hub: bool = _option(False, "upload the result (log in with `hf auth login`)", free=True)
    hub_model_id: str | None = _option(
        None, "repository of the upload, by default output_dir's name", free=True
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, kind in hints.items():
            if not _is_of(kind, value := getattr(self, name)):
                raise ConfigError(f"{name} must be of type {kind}, got {value!r}")
            if (choices := _choices(kind)) and value not in (*choices, None):
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name, holds, expected in _RULES:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} must be {expected}, got {value!r}")
        for name, given, table in (
            ("loss_type", self.loss_type, OBJECTIVES),
            ("latents", self.latents, SOURCES),
        ):
            if given is not None and given not in table:
                raise ConfigError(f"{name} must be one of {', '.join(table)}, got {given!r}")
        objective = OBJECTIVES[self.loss_type]
        if self.beta_dpo is not None and "beta" not in objective.defaults:
            raise ConfigError(f"loss_type={self.loss_type} has no beta_dpo, got {self.beta_dpo}")
        try:
            objective.check(self.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"loss_type={self.loss_type}: {error}") from error
        if objective.starts_apart and (self.unet_init is None or self.rank):
            raise ConfigError(
                f"loss_type={self.loss_type} has no gradient where the policy equals its "
                f"reference, the pipeline's denoiser: it needs unet_init, another denoiser to "
                f"start the policy from, and no rank; got unet_init={self.unet_init} and "
                f"rank={self.rank}"
            )
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ConfigError("use_8bit_adam needs optimizer=adamw, got adafactor")
        if self.ties == "soft":
            self.check_soft_labels("ties=soft")
        if self.samples_per_inversion > 1 and self.source in ("q_sample", "official"):
            raise ConfigError(
                f"samples_per_inversion must be 1 with latents={self.source}, which has no path to "
                f"reuse, got {self.samples_per_inversion}"
            )
        if self.inversion_eta and self.source not in ("ddim", "renoise"):
            raise ConfigError(
                f"inversion_eta needs latents=ddim or renoise, got latents={self.source}"
            )
        if self.fused_layers and self.compile != "none":
            raise ConfigError(f"fused_layers needs compile=none, got compile={self.compile}")
        if self.rank is None and (self.lora_alpha is not None or self.output_kohya_format):
            raise ConfigError("lora_alpha and output_kohya_format need a rank, got none")

    @property
    def settings(self) -> dict[str, Setting]:
        """Settings of the objective by keyword; where none is given those for SD1.5."""
        return self._settings(xl=False)

    def for_model(self, pipeline: str) -> PreferenceConfig:
        """The config with all settings of the objective given, so that a checkpoint tells them.

        Args:
            pipeline: class of the model's pipeline.
        """
        settings: dict[str, Any] = self._settings(xl=pipeline == "StableDiffusionXLPipeline")
        options = loss_options.write(settings)
        return replace(self, beta_dpo=settings.get("beta"), loss_options=options)

    def _settings(self, *, xl: bool) -> dict[str, Setting]:
        objective, given = OBJECTIVES[self.loss_type], self._given()
        if "variant" in given:
            # its β goes with it: that of the other would turn the loss around
            xl = given["variant"] == objective.sdxl["variant"]
        return {**objective.defaults, **(objective.sdxl if xl else {}), **given}

    def _given(self) -> dict[str, Setting]:
        beta: dict[str, Setting] = {} if self.beta_dpo is None else {"beta": self.beta_dpo}
        return {**beta, **loss_options.read(self.loss_type, self.loss_options)}

    @property
    def source(self) -> str:
        """Where x_t comes from, a key of `SOURCES`."""
        return self.latents or OBJECTIVES[self.loss_type].latents

    def check_soft_labels(self, what: str) -> None:
        """Refuse labels that are no certainties where the objective would take them as such.

        Args:
            what: has such labels.

        Raises:
            ConfigError: naming the objectives that take probabilities.
        """
        if OBJECTIVES[self.loss_type].probability is None:
            soft = [name for name, objective in OBJECTIVES.items() if objective.probability]
            raise ConfigError(
                f"{what} needs a loss_type that takes probabilities, one of {', '.join(soft)}, got "
                f"{self.loss_type}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Mapping[str, Any], whose: str = "the checkpoint") -> list[str]:
        """Fields that decide the weights and differ from a checkpoint's or a result's, a line
        each."""
        lines = []
        # a run can be made longer where its learning rate does not look at the end
        longer = _LENGTH if self.lr_scheduler in _ENDLESS else ()
        for spec in fields(self):
            mine, theirs = getattr(self, spec.name), other.get(spec.name)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            if not (spec.metadata["free"] or spec.name in longer) and mine != theirs:
                lines.append(f"{spec.name}: {whose} has {theirs!r}, this run {mine!r}")
        return lines

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """A flag for every field."""
        hints = get_type_hints(cls)
        for spec in fields(cls):
            _add_flag(parser, spec, hints[spec.name])

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> PreferenceConfig:
        """The config of parsed flags.

        Raises:
            ConfigError: see the class.
        """
        given: dict[str, Any] = {spec.name: getattr(arguments, spec.name) for spec in fields(cls)}
        as_tuples = {k: tuple(v) for k, v in given.items() if isinstance(v, list)}
        return cls(**{**given, **as_tuples})


_ENDLESS = ("constant", "constant_with_warmup")
_LENGTH = ("max_train_steps", "num_train_epochs")

_Rule = tuple[str, Callable[[Any], bool], str]


def _at_least(least: float, *names: str) -> list[_Rule]:
    return [(name, lambda v: least <= v < math.inf, f"at least {least}") for name in names]


_RULES: list[_Rule] = [
    *_at_least(
        1,
        *("max_train_samples", "inversion_steps", "samples_per_inversion", "rank"),
        *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs"),
        *("max_nonfinite_steps", "checkpointing_steps", "checkpoints_total_limit"),
        *("logging_steps", "validation_steps", "num_validation_images"),
        *("validation_inference_steps", "resolution"),
    ),
    *_at_least(
        0,
        *("dataloader_num_workers", "lr_warmup_steps", "beta_dpo", "adam_weight_decay"),
        *("validation_guidance_scale", "guidance_scale", "first_timestep"),
    ),
    *(
        (name, lambda v: 0 < v < math.inf, "positive and finite")
        for name in ("learning_rate", "adam_epsilon", "lora_alpha")
    ),
    *(
        (name, lambda v: 0 <= v <= 1, "in [0, 1]")
        for name in ("proportion_empty_prompts", "inversion_eta")
    ),
    *(
        (name, lambda v: 0 <= v < 1, "in [0, 1)")
        for name in ("adam_beta1", "adam_beta2", "ema_decay")
    ),
    ("max_grad_norm", lambda v: v > 0, "positive"),
    # as NumPy takes it
    ("seed", lambda v: 0 <= v < 2**32, "in [0, 2^32)"),
    ("lora_target_modules", bool, "at least one name"),
    ("output_dir", bool, "a folder"),
]


def _choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal, also of an optional one."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(choice for part in get_args(kind) for choice in _choices(part))
    return ()


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of a field's type; an int is a float too, a bool is no number."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(part, value) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _add_flag(parser: argparse.ArgumentParser, spec: Field[Any], kind: Any) -> None:
    flag, default = f"--{spec.name}", spec.default
    assert default is not MISSING
    about = spec.metadata["help"].replace("%", "%%")
    if default is not None and default != () and default != "" and kind is not bool:
        shown = " ".join(default) if isinstance(default, tuple) else default
        about += f" (default: {shown})"
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=about)
        return
    options: dict[str, Any] = {"default": default, "help": about}
    if get_origin(kind) is tuple:
        options |= {"nargs": "+", "metavar": "TEXT"}
    elif choices := _choices(kind):
        options |= {"choices": choices}
    else:
        (options["type"],) = (part for part in get_args(kind) or (kind,) if part is not type(None))
        options["metavar"] = options["type"].__name__.upper().replace("STR", "TEXT")
    if default == "":
        options |= {"required": True}
    parser.add_argument(flag, **options)
