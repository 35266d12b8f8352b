"""Preference objectives, one function each, on the fused reduction of `inpo_fast.ops`."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from . import ops
from .ops import PreferenceErrors


class PreferenceLoss(NamedTuple):
    """What an objective returns; everything but `loss` is detached and stays on the device."""

    loss: Tensor
    """[] mean over the pairs."""
    logits: Tensor
    """[P] argument of the log-sigmoid, positive where the policy prefers the winner more than the
    reference does."""
    accuracy: Tensor
    """[] fraction of positive logits, ties counting half."""
    errors: PreferenceErrors
    """[2P] each, winners first: mean squared errors of policy and reference."""


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """Diffusion-DPO's log-sigmoid objective, which is also that of DDIM-InPO.

    With e the mean squared error of an output against the target,

        L = −mean log σ(−(β/2) [(e_θ^w − e_ref^w) − (e_θ^l − e_ref^l)]).

    Diffusion-DPO (Wallace et al. 2024, eq. 14) takes x_t = α x_0 + σ ε and τ = ε; InPO (Lu et al.
    2025) takes x_t from DDIM inversion and τ = (x_t − α x_0)/σ: see `inpo_fast.training.latents`.
    Residuals and sums are float32 (float64 for float64 outputs) in both branches.

    Args:
        policy: [2P, …] model outputs m_θ, the P winners first, then their losers.
        reference: [2P, …] outputs of the reference model, without gradient.
        target: [2P, …] τ, float32 or the dtype of `policy`.
        beta: β ≥ 0; the factor 1/2 belongs to the formula.
        impl: backend of the reduction.

    Raises:
        ValueError, TypeError: an odd or empty batch, a negative or infinite β, or arguments that
            `preference_errors` refuses.
    """
    if not isinstance(policy, Tensor):
        raise TypeError(f"policy must be a tensor, got {type(policy).__name__}")
    if policy.ndim < 1 or policy.shape[0] == 0 or policy.shape[0] % 2:
        raise ValueError(
            f"policy must be [2P, …] with P ≥ 1 winners, then losers, got {tuple(policy.shape)}"
        )
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    errors = ops.preference_errors(policy, reference, target, impl=impl)
    winner, loser = (errors.e_theta - errors.e_ref).chunk(2)  # [P] each
    logits = -0.5 * beta * (winner - loser)
    loss = softplus(-logits).mean()
    logits = logits.detach()
    accuracy = ((logits.sign() + 1) / 2).mean()
    return PreferenceLoss(loss, logits, accuracy, PreferenceErrors(*(e.detach() for e in errors)))
