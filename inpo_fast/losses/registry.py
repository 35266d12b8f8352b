"""Objectives by name, with what each needs, so that a trainer can choose one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch

from .pairwise import (
    dmpo_loss,
    dpo_loss,
    dspo_loss,
    inpo_loss,
    inversion_dpo_loss,
    ipo_loss,
    mapo_loss,
    smpo_loss,
)
from .result import PreferenceLoss
from .single import kto_loss, sft_loss

Setting: TypeAlias = float | str


@dataclass(frozen=True)
class Objective:
    """An objective and how to call it: `function(policy, reference, target, **settings, **inputs)`.

    Attributes:
        function: the loss.
        needs_reference: whether `reference` must be the reference model's outputs; else it may be
            None.
        needs_pairs: whether a batch is [2P, …], winners first; else [B, …].
        inputs: tensors that must be given by keyword beside the outputs, one number a pair or row.
        probability: the keyword that takes how sure the label of each pair is, [P]: p that the
            winner is the better one as `preference`, 1 − p as `label_smoothing`. None where every
            label is taken as sure.
        latents: where its paper takes the noisy latents from, a name in
            `inpo_fast.training.SOURCES`.
        starts_apart: whether the gradient is 0 at policy = reference, so that a training has to
            start from another policy.
        additive: whether the gradient of a batch is the mean over its micro-batches.
        defaults: settings that a trainer may change, by keyword, as its public script has them (for
            SD1.5 where they differ).
        sdxl: what its script for SDXL has instead.
    """

    function: Callable[..., PreferenceLoss]
    needs_reference: bool = True
    needs_pairs: bool = True
    inputs: tuple[str, ...] = ()
    probability: Literal["preference", "label_smoothing"] | None = None
    latents: Literal["q_sample", "ddim", "renoise"] = "q_sample"
    starts_apart: bool = False
    additive: bool = True
    defaults: Mapping[str, Setting] = field(default_factory=dict)
    sdxl: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("defaults", "sdxl"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def check(self, settings: Mapping[str, Setting]) -> None:
        """Refuse settings that the function refuses, before there are outputs.

        Raises:
            ValueError, TypeError: of the function, naming the setting.
        """
        pair = torch.zeros(2, 1)
        inputs = {name: torch.ones(1 if name == "preference" else 2) for name in self.inputs}
        self.function(pair, pair, pair, impl="reference", **settings, **inputs)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "inpo": Objective(
            inpo_loss,
            probability="label_smoothing",
            latents="ddim",
            defaults={"beta": 2000.0},
            sdxl={"beta": 5000.0},
        ),
        "smpo": Objective(
            smpo_loss,
            inputs=("preference",),
            probability="preference",
            latents="renoise",
            defaults={"beta": 2000.0, "scale": 10.0},
        ),
        "dpo": Objective(
            dpo_loss, probability="label_smoothing", defaults={"beta": 5000.0, "anchor": 0.0}
        ),
        "ipo": Objective(ipo_loss, defaults={"beta": 5000.0}),
        "dmpo": Objective(dmpo_loss, defaults={"beta": 2000.0, "alpha": 0.01}),
        "dspo": Objective(
            dspo_loss,
            defaults={"beta": 0.001, "variant": "sd15"},
            sdxl={"beta": 5000.0, "variant": "sdxl"},
        ),
        "inversion-dpo": Objective(
            inversion_dpo_loss,
            inputs=("alphas_cumprod",),
            latents="ddim",
            starts_apart=True,
            defaults={"beta": 2000.0},
        ),
        "mapo": Objective(mapo_loss, needs_reference=False, defaults={"beta": 0.1, "snr": 0.5}),
        "kto": Objective(
            kto_loss,
            needs_pairs=False,
            inputs=("desirable",),
            additive=False,
            defaults={"beta": 5000.0, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        ),
        "sft": Objective(sft_loss, needs_reference=False, needs_pairs=False),
    }
)
"""Every objective by name. DSPO is additive in its variant for SD1.5 only (see `dspo_loss`)."""
