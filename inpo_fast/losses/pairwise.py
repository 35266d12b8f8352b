"""Objectives on pairs: winners and their losers, [2P, …] with the winners first.

Letters: e, e_ref and d are the per-sample means of `inpo_fast.losses`, D = (e_θ − e_ref)_w −
(e_θ − e_ref)_l, u = −k β D with k of `BetaConvention` (β/2 by default), σ the logistic function.
At policy = reference u is 0 to the bit, because both branches are reduced in the same way.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import ops
from ..ops import PreferenceErrors
from .result import (
    BetaConvention,
    PreferenceLoss,
    Reduction,
    check_factor,
    check_outputs,
    check_samples,
    finish,
    measure,
    named,
    require_reference,
    unit,
)


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    beta_convention: BetaConvention = "dpo/half",
    label_smoothing: float | Tensor = 0.0,
    anchor: float = 0.0,
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """Diffusion-DPO's log-sigmoid objective (Wallace et al. 2024, eq. 14),

        L = −(1−s) log σ(u) − s log σ(−u) + λ (d_w + d_l)/2,     u = −(β/2) D,

    at x_t = α x_0 + σ ε with the model's own target (ε, v, or the velocity of a flow model:
    Flow-DPO, Liu et al. 2025). Residuals are float32 (float64 for float64 outputs) and sums float64
    in both branches.

    Args:
        policy: [2P, …] model outputs m_θ, the P winners first, then their losers.
        reference: [2P, …] outputs of the reference model, without gradient.
        target: [2P, …] τ, float32 or the dtype of `policy`.
        beta: β ≥ 0.
        beta_convention: unit of β; the factor 1/2 belongs to the formula in the default.
        label_smoothing: s in [0, 1], one number or [P] per pair: the probability that the label is
            wrong (conservative DPO, Mitchell 2023). A tie that is kept as a soft label has 0.5.
        anchor: λ ≥ 0 of a penalty on the distance to the reference (Flow-DPO of SimpleTuner).
        reduction: over pairs.
        impl: backend of the reduction.

    Raises:
        ValueError, TypeError: an odd or empty batch, a negative or infinite β, or arguments that
            `preference_errors` refuses.
    """
    check_factor("anchor", anchor)
    errors, u = _logits(
        policy, reference, target, beta, beta_convention, impl, through_d=anchor > 0
    )
    losses = softplus(-u)
    if isinstance(label_smoothing, Tensor):
        check_samples("label_smoothing", label_smoothing, len(u), u)
        losses = losses + label_smoothing.to(u.dtype) * u
    elif not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    elif label_smoothing:
        # −(1−s) log σ(u) − s log σ(−u) = softplus(−u) + s u
        losses = losses + label_smoothing * u
    if anchor:
        winner, loser = errors.d.chunk(2)
        losses = losses + 0.5 * anchor * (winner + loser)
    return finish(losses, u, errors, reduction)


def inpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    beta_convention: BetaConvention = "dpo/half",
    label_smoothing: float | Tensor = 0.0,
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """DDIM-InPO (Lu et al., CVPR 2025; official train.py, β 2000 for SD1.5 and 5000 for SDXL):

        L = −log σ(u),     u = −(β/2) D

    at latents that the policy itself has inverted (`inpo_fast.training.latents`), τ = (x_t − α_t
    x_0)/σ_t. Given (policy, reference, target) it is `dpo_loss`, whose arguments it has.
    """
    return dpo_loss(
        policy,
        reference,
        target,
        beta=beta,
        beta_convention=beta_convention,
        label_smoothing=label_smoothing,
        reduction=reduction,
        impl=impl,
    )


def smpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    preference: Tensor,
    scale: float = 10.0,
    compat: Literal["official"] | None = None,
    beta_convention: BetaConvention = "dpo/half",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """SmPO (Lu et al., ICML 2025; as its train.py computes it): L = −log σ(scale (2p−1) u).

    Args:
        policy, reference, target, beta, beta_convention, reduction, impl: see `dpo_loss`.
        preference: [P] p, probability that the winner is preferred, of a reward model; 1 is a sure
            label, 1/2 a tie without gradient.
        scale: 10 in the script, so that p = 0.55 is InPO.
        compat: `official` takes the p of the first pair for the whole batch, as the script does.
    """
    check_factor("scale", scale)
    if compat not in (None, "official"):
        raise ValueError(f"compat must be None or 'official', got {compat!r}")
    errors, u = _logits(policy, reference, target, beta, beta_convention, impl)
    check_samples("preference", preference, len(u), u)
    p = preference[0] if compat == "official" else preference
    logits = scale * (2 * p.to(u.dtype) - 1) * u
    return finish(softplus(-logits), logits, errors, reduction)


def ipo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    beta_convention: BetaConvention = "dpo/half",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """IPO (Azar et al. 2024, eq. 17): L = (h − 1/(2β))² with h = u/β, the margin without its β.

    diffusers' script has it with `dpo/full`. The optimum is the logit u = 1/2. Arguments as in
    `dpo_loss`, with β > 0.
    """
    check_factor("beta", beta, positive=True)
    errors, u = _logits(policy, reference, target, beta, beta_convention, impl)
    # (u − 1/2)/β, so that a large β does not lose the difference
    return finish(((u - 0.5) / beta).square(), u, errors, reduction)


def dmpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    alpha: float = 0.01,
    beta_convention: BetaConvention = "dpo/half",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """DMPO, divergence minimisation (2025; as AIDC-AI/Diffusion-SDPO computes it): the reverse KL

        L = KL(p ‖ 1−α) = p log(p/(1−α)) + (1−p) log((1−p)/α),     p = σ(u).

    Arguments as in `dpo_loss`, and alpha: α in (0, 1), probability that a label is wrong; the
    optimum is p = 1 − α.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    errors, u = _logits(policy, reference, target, beta, beta_convention, impl)
    p, rest = u.sigmoid(), (-u).sigmoid()
    losses = p * (-softplus(-u) - math.log1p(-alpha)) + rest * (-softplus(u) - math.log(alpha))
    return finish(losses, u, errors, reduction)


def dspo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    variant: Literal["sd15", "sdxl"] = "sd15",
    beta_convention: BetaConvention = "dpo/half",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """DSPO, direct score preference optimisation (Zhu et al., ICLR 2025; as coded):

        sd15   L = mean|(θ−τ)_w − c (θ−ref)_w|² = e_θ − c (e_θ + d − e_ref) + c² d
               of the winner, c = β (1 − σ(u))
        sdxl   L = (1 − σ(u))² d_w if the batch mean of d_w is at least 0.1, else (1 − σ(u))²

    The weights keep their gradient. The launchers have β = 0.001 (sd15: β multiplies the step along
    θ − ref, too) and 5000 (sdxl). `sdxl` looks at the whole batch, so its gradient is not the
    mean over micro-batches. Arguments as in `dpo_loss`.
    """
    if variant not in ("sd15", "sdxl"):
        raise ValueError(f"variant must be 'sd15' or 'sdxl', got {variant!r}")
    errors, u = _logits(policy, reference, target, beta, beta_convention, impl, through_d=True)
    e, e_ref, d = (error.chunk(2)[0] for error in errors)  # [P], winners
    wrong = (-u).sigmoid()
    if variant == "sd15":
        c = beta * wrong
        losses = e - c * (e + d - e_ref) + c.square() * d
    else:
        near = d.detach().mean() < 0.1
        losses = wrong.square() * torch.where(near, torch.ones_like(d), d)
    return finish(losses, u, errors, reduction)


def inversion_dpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float,
    alphas_cumprod: Tensor,
    num_levels: int = 1,
    beta_convention: BetaConvention = "dpo/half",
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """Inversion-DPO (MM 2025; as its train_ddim.py computes it),

        L = −log σ(u),     u = (β/2) mean_t (d_w − d_l)/(2 ᾱ_t)

    with the mean over the levels t of an inverted trajectory. As in the script, the margin grows
    with the distance from the reference at the winner, and at policy = reference the gradient is 0:
    training has to start from another policy.

    Args:
        policy, reference, target: [2P·S, …], the S levels of a sample one after the other, all
            winners first. The target enters no gradient, only the errors that are reported.
        beta, beta_convention, reduction, impl: see `dpo_loss`.
        alphas_cumprod: [2P·S] ᾱ_t > 0 of each row.
        num_levels: S.
    """
    require_reference(reference)
    check_factor("beta", beta)
    errors = measure(policy, reference, target, impl, pairs=True, through_d=True)
    rows = len(errors.d)
    if num_levels < 1 or rows % (2 * num_levels):
        raise ValueError(
            f"num_levels must divide the {rows // 2} rows of the winners, got {num_levels}"
        )
    check_samples("alphas_cumprod", alphas_cumprod, rows, errors.d)
    distances = errors.d / (2 * alphas_cumprod.to(errors.d.dtype))
    winner, loser = distances.view(-1, num_levels).mean(1).chunk(2)  # [P]
    u = beta * unit(beta_convention, policy) * (winner - loser)
    return finish(softplus(-u), u, errors, reduction)


def mapo_loss(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    *,
    beta: float,
    snr: float = 0.5,
    num_train_timesteps: int = 1000,
    reduction: Reduction = "mean",
    impl: ops.Impl = "auto",
) -> PreferenceLoss:
    """MaPO, margin-aware and without a reference (Hong et al. 2024; as mapo-t2i/mapo computes it):

        L = e_w − β log σ(T (φ(e_w) − φ(e_l))),     φ(e) = c e/(exp(c e) − 1).

    Args:
        policy, target, reduction, impl: see `dpo_loss`.
        reference: None, or outputs of which only the errors are reported.
        beta: weight of the margin; it has no convention, the errors are not compared with others.
        snr: c.
        num_train_timesteps: T.
    """
    check_factor("beta", beta)
    check_factor("snr", snr, positive=True)
    check_factor("num_train_timesteps", num_train_timesteps, positive=True)
    errors = measure(policy, reference, target, impl, pairs=True)
    winner = errors.e_theta.chunk(2)[0]
    phi_winner, phi_loser = _odds(snr * errors.e_theta).chunk(2)
    logits = num_train_timesteps * (phi_winner - phi_loser)
    return finish(winner + beta * softplus(-logits), logits, errors, reduction)


def _odds(x: Tensor) -> Tensor:
    """x/(e^x − 1) of x ≥ 0, 1 at x = 0, [B]."""
    # neither branch of the choice may divide by zero, nor e^x overflow, or the gradient is NaN
    zero = x == 0
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, 1 - x / 2, safe * (-safe).exp() / -(-safe).expm1())


def _logits(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    beta: float,
    convention: BetaConvention,
    impl: ops.Impl,
    *,
    through_d: bool = False,
) -> tuple[PreferenceErrors, Tensor]:
    """The errors, [2P] each, and u, [P], with gradient."""
    require_reference(reference)
    check_factor("beta", beta)
    check_outputs(policy, pairs=True)
    factor = -unit(convention, policy) * beta
    try:
        return ops.preference_margin(
            policy, reference, target, scale=factor, differentiate_d=through_d, impl=impl
        )
    except (TypeError, ValueError) as error:
        raise named(error) from error
