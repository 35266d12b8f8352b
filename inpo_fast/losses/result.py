"""What the objectives share: their result, the unit of β, the reduction and the checks."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from .. import ops
from ..ops import PreferenceErrors

Reduction = Literal["mean", "sum", "none"]
"""Over pairs, or over samples where an objective has no pairs."""

BetaConvention = Literal["dpo/half", "dpo/full", "sum/half"]
"""The factor k in the implicit reward h = k (e_ref − e_θ), e being a mean over the elements.

`dpo/half`: k = 1/2, Diffusion-DPO, InPO and diffusers' SDXL script. `dpo/full`: k = 1, diffusers'
SD1.5 script and Diffusion-KTO; its β is half of that of `dpo/half`. `sum/half`: k = n/2 with n
elements a sample, for errors that are sums, as SimpleTuner's Flow-DPO has them by default.
"""

SATURATED = math.log(99)
"""Beyond ± this logit the log-sigmoid's slope is below 1 % or above 99 % of its largest."""


class PreferenceLoss(NamedTuple):
    """What an objective returns; everything but `loss` is detached and stays on the device."""

    loss: Tensor
    """[] the mean or the sum, or [P] (without pairs [B]) with the reduction `none`."""
    logits: Tensor
    """[P] the margin that the objective turns into a loss, in units of a logit, positive where the
    policy prefers the winner more than the reference does. [B] for KTO, [0] for SFT."""
    errors: PreferenceErrors
    """[2P] each, winners first (without pairs [B]): e_θ, e_ref and d, 0 where there is no
    reference."""
    paired: bool = True
    """Whether the first half of `errors` are winners and the second half their losers."""

    @property
    def accuracy(self) -> Tensor:
        """[] fraction of positive logits, ties counting half."""
        return ((self.logits.sign() + 1) / 2).mean()

    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log, [] each, on the device: nothing waits for it here.

        `loss`; with preferences `accuracy`, `margin_mean`, `margin_std` (over the batch, 0 for one
        pair) and `saturated` (fraction of logits beyond ± ln 99); the mean errors of policy and
        reference, by winners and losers (`policy_winner`, `policy_loser`, `reference_winner`,
        `reference_loser`) or without pairs `policy_error` and `reference_error`.
        """
        values = {"loss": self.loss.detach().mean()}
        if len(self.logits):
            values["accuracy"] = self.accuracy
            values["margin_mean"] = self.logits.mean()
            values["margin_std"] = self.logits.std(correction=0)
            values["saturated"] = (self.logits.abs() > SATURATED).to(self.logits.dtype).mean()
        for name, error in (("policy", self.errors.e_theta), ("reference", self.errors.e_ref)):
            if self.paired:
                winner, loser = error.chunk(2)
                values[f"{name}_winner"], values[f"{name}_loser"] = winner.mean(), loser.mean()
            else:
                values[f"{name}_error"] = error.mean()
        return values


def finish(
    losses: Tensor,
    logits: Tensor,
    errors: PreferenceErrors,
    reduction: Reduction,
    *,
    paired: bool = True,
) -> PreferenceLoss:
    """Reduce the losses, [P] or [B], and detach what is only looked at."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    loss = losses if reduction == "none" else getattr(losses, reduction)()
    detached = PreferenceErrors(*(e.detach() for e in errors))
    return PreferenceLoss(loss, logits.detach(), detached, paired)


def measure(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    impl: ops.Impl,
    *,
    pairs: bool,
    through_d: bool = False,
) -> PreferenceErrors:
    """The per-sample errors, [B] each; `through_d` where the loss is a function of d too."""
    check_outputs(policy, pairs=pairs)
    try:
        return ops.preference_errors(
            policy, reference, target, differentiate_d=through_d, impl=impl
        )
    except (TypeError, ValueError) as error:
        raise named(error) from error


def named(error: TypeError | ValueError) -> TypeError | ValueError:
    """An operator's error, with the names that its arguments have in an objective."""
    words = re.sub(r"\bref\b", "reference", re.sub(r"\btheta\b", "policy", str(error)))
    return TypeError(words) if isinstance(error, TypeError) else ValueError(words)


def check_outputs(policy: Tensor, *, pairs: bool) -> None:
    """Refuse a batch that is empty, or odd where its halves are pairs."""
    if not isinstance(policy, Tensor):
        raise TypeError(f"policy must be a tensor, got {type(policy).__name__}")
    if policy.ndim < 1 or policy.shape[0] == 0 or (pairs and policy.shape[0] % 2):
        wanted = "[2P, …] with P ≥ 1 winners, then losers" if pairs else "[B, …] with B ≥ 1"
        raise ValueError(f"policy must be {wanted}, got {tuple(policy.shape)}")


def require_reference(reference: Tensor | None) -> None:
    """Refuse an objective that is relative to a reference and has none."""
    if not isinstance(reference, Tensor):
        raise TypeError(f"reference must be a tensor, got {type(reference).__name__}")


def unit(convention: BetaConvention, policy: Tensor) -> float:
    """k of `BetaConvention`."""
    match convention:
        case "dpo/half":
            return 0.5
        case "dpo/full":
            return 1.0
        case "sum/half":
            return 0.5 * policy[0].numel()
        case _:
            raise ValueError(
                f"beta_convention must be one of {get_args(BetaConvention)}, got {convention!r}"
            )


def check_factor(name: str, value: float, *, positive: bool = False) -> None:
    """Refuse a factor that is not a finite number, at least 0 or above it."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor: it has no gradient")
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf or (positive and value == 0):
        least = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be finite and {least}, got {value}")


def check_samples(name: str, value: Tensor, count: int, like: Tensor) -> None:
    """Refuse per-sample numbers that are not [count] on the device of the errors."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != (count,):
        raise ValueError(f"{name} must be [{count}], got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: objectives differentiate policy only")
