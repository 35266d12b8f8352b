"""Preference objectives, one function each, on the fused reduction of `inpo_fast.ops`.

With the per-sample means e_θ = |θ−τ|², e_ref = |ref−τ|² and d = |θ−ref|² every objective is a
scalar function of (e_θ, e_ref, d), so one reduction and one elementwise backward serve all of them.
Where the noisy latents come from is another choice: see `inpo_fast.training.latents`.
"""

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
from .registry import OBJECTIVES, Objective
from .result import BetaConvention, PreferenceLoss, Reduction
from .single import kto_loss, sft_loss

__all__ = [
    "OBJECTIVES",
    "BetaConvention",
    "Objective",
    "PreferenceLoss",
    "Reduction",
    "dmpo_loss",
    "dpo_loss",
    "dspo_loss",
    "inpo_loss",
    "inversion_dpo_loss",
    "ipo_loss",
    "kto_loss",
    "mapo_loss",
    "sft_loss",
    "smpo_loss",
]
