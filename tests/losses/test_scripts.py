"""The numbers of public training scripts on fixed tensors, each written from its description.

The transcriptions compute as the scripts do, in float32 with `mse`, `chunk` and `logsigmoid`; equal
means equal up to the float32 rounding of the reduction, in units of the logits.
"""

import math

import pytest
import torch
from torch.nn import functional

from inpo_fast.losses import (
    dmpo_loss,
    dpo_loss,
    dspo_loss,
    inpo_loss,
    inversion_dpo_loss,
    ipo_loss,
    kto_loss,
    mapo_loss,
    sft_loss,
    smpo_loss,
)

P, SHAPE = 3, (4, 8, 8)
N = math.prod(SHAPE)


def wave(frequency, phase):
    index = torch.arange(2 * P * N, dtype=torch.float64)
    return torch.sin(frequency * index + phase).reshape(2 * P, *SHAPE)


# no generator, so that the tensors are the same in every version of torch
REFERENCE = wave(0.37, 0.1).float()
TARGET = wave(0.61, 0.5).float()
STEP = wave(0.23, 0.9) * torch.linspace(0.01, 0.03, 2 * P, dtype=torch.float64).view(-1, 1, 1, 1)
POLICY = (REFERENCE.double() + STEP).float()
BATCH = (POLICY, REFERENCE, TARGET)


def mse(prediction):
    """Mean over the elements of every sample, float32."""
    losses = functional.mse_loss(prediction.float(), TARGET.float(), reduction="none")
    return losses.mean(dim=list(range(1, losses.dim())))


def differences(reduce):
    model_w, model_l = reduce(POLICY).chunk(2)
    ref_w, ref_l = reduce(REFERENCE).chunk(2)
    return model_w - model_l, ref_w - ref_l


def same(value, expected, beta, size=1.0):
    """Errors near `size` are rounded to float32 some times on either side; β multiplies that."""
    atol = 8 * torch.finfo(torch.float32).eps * size * beta
    assert abs(value.item() - expected.item()) <= atol + 4e-7 * abs(expected.item())


def test_diffusers_sd15():
    """train_diffusion_dpo.py: β without the half; ties of the accuracy count half."""
    model_diff, ref_diff = differences(mse)
    logits = ref_diff - model_diff
    got = dpo_loss(*BATCH, beta=500.0, beta_convention="dpo/full")
    same(got.loss, -functional.logsigmoid(500.0 * logits).mean(), 500)
    accuracy = (logits > 0).sum().float() / P + 0.5 * (logits == 0).sum().float() / P
    assert got.accuracy == accuracy
    # half of the β of the other convention
    same(dpo_loss(*BATCH, beta=1000.0).loss, got.loss, 500)
    # --loss_type ipo, with the β that it means
    ipo = ipo_loss(*BATCH, beta=50.0, beta_convention="dpo/full")
    same(ipo.loss, ((logits - 1 / (2 * 50.0)) ** 2).mean(), 1)


@pytest.mark.parametrize("loss", [dpo_loss, inpo_loss])
@pytest.mark.parametrize("beta", [500.0, 2000.0, 5000.0])
def test_diffusers_sdxl_diffusion_dpo_and_inpo(loss, beta):
    """scale −0.5 β on the difference of mean errors; a tie is not accurate."""
    model_diff, ref_diff = differences(mse)
    inside = -0.5 * beta * (model_diff - ref_diff)
    got = loss(*BATCH, beta=beta)
    same(got.loss, -functional.logsigmoid(inside).mean(), beta / 2)
    assert (got.logits > 0).float().mean() == (inside > 0).sum().float() / P


def test_a_script_that_reduces_the_reference_in_16_bit_does_not_start_at_ln_2():
    """DiffusionDPO: policy errors in float32, those of the reference in the mixed dtype."""
    output, target = REFERENCE.bfloat16(), TARGET.bfloat16()
    model = (output.float() - target.float()).pow(2).mean(dim=[1, 2, 3])
    reference = (output - target).pow(2).mean(dim=[1, 2, 3])
    (w, loser), (rw, rl) = model.chunk(2), reference.float().chunk(2)
    inside = -0.5 * 5000 * ((w - loser) - (rw - rl))
    assert inside.abs().max() > 0.1
    got = dpo_loss(output, output.clone(), target, beta=5000.0)
    assert (got.logits == 0).all() and abs(got.loss.item() - math.log(2)) < 1e-6


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_simpletuner_flow_dpo(norm):
    """Errors summed (default) or averaged over the elements, β/2 on the margin, plus α times the
    mean squared distance of policy and reference, halved over winner and loser."""
    policy_errors, ref_errors = (
        getattr((m - TARGET).pow(2), norm)(dim=(1, 2, 3)) for m in (POLICY, REFERENCE)
    )
    (pw, pl), (rw, rl) = policy_errors.chunk(2), ref_errors.chunk(2)
    margin = (rw - pw) + (pl - rl)
    beta, alpha = (0.1, 3.0) if norm == "sum" else (50.0, 3.0)
    expected = -functional.logsigmoid(0.5 * beta * margin).mean()
    (w, loser), (ref_w, ref_l) = POLICY.chunk(2), REFERENCE.chunk(2)
    anchor = 0.5 * (functional.mse_loss(w, ref_w) + functional.mse_loss(loser, ref_l)) * alpha
    convention = "sum/half" if norm == "sum" else "dpo/half"
    got = dpo_loss(*BATCH, beta=beta, beta_convention=convention)
    same(got.loss, expected, beta * (N if norm == "sum" else 1))
    with_anchor = dpo_loss(*BATCH, beta=beta, beta_convention=convention, anchor=alpha)
    same(with_anchor.loss, expected + anchor, beta * (N if norm == "sum" else 1))
    assert with_anchor.loss > got.loss


def test_smpo():
    """−0.5 β (2 probs[0] − 1) 10 for the whole batch."""
    probabilities = torch.tensor([0.8, 0.6, 0.95])
    model_diff, ref_diff = differences(mse)
    scale = -0.5 * 2000.0 * (2 * probabilities[0] - 1) * 10
    expected = -functional.logsigmoid(scale * (model_diff - ref_diff)).mean()
    got = smpo_loss(*BATCH, beta=2000.0, preference=probabilities, compat="official")
    same(got.loss, expected, 6000)
    single = [rows[[0, P]] for rows in BATCH]
    own = smpo_loss(*single, beta=2000.0, preference=probabilities[:1])
    alone = -functional.logsigmoid(scale * (model_diff - ref_diff)[:1]).mean()
    same(own.loss, alone, 6000)


def test_diffusion_kto():
    """Utility sigmoid, λ_D and λ_U, KL the mean over the batch, clamped at 0."""
    labels = torch.tensor([1, 0, 1, 1, 0, 0])
    gain = -mse(POLICY) - -mse(REFERENCE)
    kl = gain.mean().detach().clamp(min=0).detach()
    h = torch.sigmoid((2 * labels - 1) * 5000.0 * (gain - kl))
    weight = 1.5 * (labels == 1) + 0.5 * ~(labels == 1)
    expected = (weight * (1 - h)).mean()
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    got = kto_loss(*BATCH, beta=5000.0, desirable=labels == 1, **weights)
    same(got.loss, expected, 5000)
    same(kto_loss(*BATCH, beta=5000.0, desirable=labels, kl=kl, **weights).loss, expected, 5000)
    accuracy = ((2 * labels - 1) * (gain - kl) > 0).float().mean()
    assert got.accuracy == accuracy and 0 < accuracy < 1


def test_mapo():
    """snr 0.5, T 1000, β on the ratio, the winner's error beside it; no reference."""
    losses = mse(POLICY)
    w, loser = losses.chunk(2)
    odds = (0.5 * w) / (torch.exp(0.5 * w) - 1) - (0.5 * loser) / (torch.exp(0.5 * loser) - 1)
    ratio = functional.logsigmoid(odds * 1000)
    expected = w.mean() - (0.1 * ratio).mean()
    # exp(x) − 1 and the quotient round at 1, T multiplies that and β takes a tenth
    same(mapo_loss(POLICY, None, TARGET, beta=0.1).loss, expected, 1000 * 0.1)


def test_dspo_sd15():
    inside = -0.5 * 20.0 * torch.sub(*differences(mse))
    residual = (POLICY - TARGET).chunk(2)[0]
    drift = (POLICY - REFERENCE).chunk(2)[0]
    weight = (1 - torch.sigmoid(inside))[:, None, None, None]
    expected = (residual - 20.0 * weight * drift).pow(2).mean(dim=[1, 2, 3]).mean()
    same(dspo_loss(*BATCH, beta=20.0).loss, expected, 20)


@pytest.mark.parametrize("far", [False, True])
def test_dspo_sdxl(far):
    """Two losses, chosen by the batch mean of the winners' distance from the reference."""
    policy = REFERENCE + (POLICY - REFERENCE) * (40 if far else 1)
    (w, loser), (rw, rl) = mse(policy).chunk(2), mse(REFERENCE).chunk(2)
    weight = (1 - torch.sigmoid(-0.5 * 2.0 * ((w - loser) - (rw - rl))))[:, None, None, None]
    drift = (policy - REFERENCE).chunk(2)[0]
    if drift.pow(2).mean(dim=[1, 2, 3]).mean() >= 0.1:
        assert far
        expected = (weight * drift).pow(2).mean(dim=[1, 2, 3]).mean()
    else:
        assert not far
        expected = weight.pow(2).mean(dim=[1, 2, 3]).mean()
    same(dspo_loss(policy, REFERENCE, TARGET, beta=2.0, variant="sdxl").loss, expected, 2)


def test_dmpo():
    inside = -0.5 * 500.0 * torch.sub(*differences(mse))
    p, q = torch.sigmoid(inside), torch.tensor([1.0 - 0.01])
    log_p, log_rest = -functional.softplus(-inside), -functional.softplus(inside)
    expected = (p * (log_p - torch.log(q)) + (1 - p) * (log_rest - torch.log1p(-q))).mean()
    # the logarithm of the odds, up to 5, multiplies the error of p; log1p(−q) loses 1/α
    same(dmpo_loss(*BATCH, beta=500.0, alpha=0.01).loss, expected, 5 * 500)


def test_inversion_dpo():
    """One pair, its levels averaged with the weight (1−ᾱ)/(2 (1−ᾱ) ᾱ)."""
    bars = torch.tensor([0.9, 0.5, 0.1])
    winners, losers = 0.0, 0.0
    for k in range(P):
        weight = (1 - bars[k]) / (2 * (1 - bars[k]) * bars[k])
        winners = winners + weight * torch.mean((POLICY[k] - REFERENCE[k]) ** 2)
        losers = losers + weight * torch.mean((POLICY[P + k] - REFERENCE[P + k]) ** 2)
    expected = -functional.logsigmoid(0.5 * (winners - losers) / P * 5000.0)
    got = inversion_dpo_loss(*BATCH, beta=5000.0, alphas_cumprod=bars.repeat(2), num_levels=P)
    # distances of some 1e-4, relative to which they are rounded
    same(got.loss, expected, 5000, size=1e-3)


def test_sft():
    expected = functional.mse_loss(POLICY, TARGET)
    same(sft_loss(POLICY, None, TARGET).loss, expected, 1)
