"""Objectives on single samples: no pair is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .result import (
    BetaConvention,
    PreferenceLoss,
    Reduction,
    check_factor,
    check_samples,
    finish,
    measure,
    require_reference,
    unit,
)


def sft_loss(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    *,
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """Supervised fine-tuning on the winners: L = e_θ, the loss of ordinary diffusion training.

    Args:
        policy: [B, …] model outputs, winners only.
        reference: None, or outputs of which only the errors are reported.
        target: [B, …] τ.
        reduction: over samples.
        impl: backend of the reduction.
    """
    errors = measure(policy, reference, target, impl, pairs=False)
    nothing = errors.e_theta.detach()[:0]
    return finish(errors.e_theta, nothing, errors, reduction, paired=False)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    desirable: Tensor,
    kl: Tensor | float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    beta_convention: BetaConvention = "dpo/full",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """Diffusion-KTO (Li et al., NeurIPS 2024; as train_kto_sd_v1.5.py computes it),

        L = w_y (1 − σ(± k β ((e_ref − e_θ) − KL))),     + for desirable samples, − for others.

    Args:
        policy, reference, target: [B, …] as in `dpo_loss`, but unpaired.
        beta: β ≥ 0; the script has no factor 1/2, hence the default of `beta_convention`.
        desirable: [B] bool (or 0 and 1), which samples people like.
        kl: [] or a number, estimate of the mean of e_ref − e_θ, at least 0. None takes that of this
            batch, detached and clamped at 0; the script takes the mean over all processes. A
            gradient that is the mean over micro-batches needs one number for all of them.
        desirable_weight, undesirable_weight: w_y.
        beta_convention: unit of β.
        reduction: over samples.
        impl: backend of the reduction.

    Returns:
        logits [B], positive where the policy moved to the right side of KL.
    """
    require_reference(reference)
    check_factor("beta", beta)
    check_factor("desirable_weight", desirable_weight)
    check_factor("undesirable_weight", undesirable_weight)
    errors = measure(policy, reference, target, impl, pairs=False)
    gain = errors.e_ref - errors.e_theta  # [B]
    check_samples("desirable", desirable, len(gain), gain)
    if kl is None:
        kl = gain.detach().mean().clamp(min=0)
    elif not isinstance(kl, Tensor):
        check_factor("kl", kl)
    elif kl.shape != () or kl.requires_grad:
        raise ValueError(f"kl must be a scalar without gradient, got shape {tuple(kl.shape)}")
    good = desirable.to(torch.bool)
    sign = good.to(gain.dtype) * 2 - 1
    weight = torch.where(good, desirable_weight, undesirable_weight).to(gain.dtype)
    logits = unit(beta_convention, policy) * beta * sign * (gain - kl)
    return finish(weight * (-logits).sigmoid(), logits, errors, reduction, paired=False)
