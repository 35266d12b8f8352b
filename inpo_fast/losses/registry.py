"""Objectives by name, with what each needs, so that a trainer can choose one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

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
        defaults: settings of its public script, by keyword (for SD1.5 where they differ).
    """

    function: Callable[..., PreferenceLoss]
    needs_reference: bool = True
    needs_pairs: bool = True
    inputs: tuple[str, ...] = ()
    probability: Literal["preference", "label_smoothing"] | None = None
    latents: Literal["q_sample", "ddim", "renoise"] = "q_sample"
    starts_apart: bool = False
    additive: bool = True
    defaults: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "inpo": Objective(
            inpo_loss, probability="label_smoothing", latents="ddim", defaults={"beta": 2000.0}
        ),
        "smpo": Objective(
            smpo_loss,
            inputs=("preference",),
            probability="preference",
            latents="renoise",
            defaults={"beta": 2000.0},
        ),
        "dpo": Objective(dpo_loss, probability="label_smoothing", defaults={"beta": 5000.0}),
        "ipo": Objective(ipo_loss, defaults={"beta": 5000.0}),
        "dmpo": Objective(dmpo_loss, defaults={"beta": 2000.0, "alpha": 0.01}),
        "dspo": Objective(dspo_loss, defaults={"beta": 0.001}),
        "inversion-dpo": Objective(
            inversion_dpo_loss,
            inputs=("alphas_cumprod",),
            latents="ddim",
            starts_apart=True,
            defaults={"beta": 2000.0},
        ),
        "mapo": Objective(mapo_loss, needs_reference=False, defaults={"beta": 0.1}),
        "kto": Objective(
            kto_loss,
            needs_pairs=False,
            inputs=("desirable",),
            additive=False,
            defaults={"beta": 5000.0},
        ),
        "sft": Objective(sft_loss, needs_reference=False, needs_pairs=False),
    }
)
"""Every objective by name. DSPO is additive in its default variant only (see `dspo_loss`)."""
