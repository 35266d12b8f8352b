"""The official script, transcribed from its description in plain torch, against the trajectory."""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from inpo_fast import NoiseSchedule
from inpo_fast.losses import inpo_loss
from inpo_fast.schedule import scaled_linear_alphas_cumprod
from inpo_fast.training import official_inversion_path

# the scheduler's own table: float32 betas, float32 cumulative product
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
FLOAT32 = torch.cumprod(1.0 - BETAS, dim=0)
SCHEDULE = NoiseSchedule.from_alphas_cumprod(FLOAT32.double().numpy(), 1000)
SHAPE = (4, 6, 5)


def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """A float32 policy, as accelerate returns its autocast output."""
    x = x.float()
    y = x + x.roll(1, -1) / 2 + (t / 500).to(x.dtype).reshape(-1, 1, 1, 1)
    return y / (1 + y * y) + x / 2


def script(latents, timesteps, dtype, seed):
    """papers: what the official script does, steps 1, 4, 5 and 6, with quirks 1 to 7.

    Returns its x_t, τ and the timesteps of its calls.
    """
    generator = torch.Generator().manual_seed(seed)
    # diffusers 0.20: level −99 is that of set_alpha_to_one=False, ᾱ_0
    inverse = {t: FLOAT32[t] for t in range(1, 1000, 100)} | {-99: FLOAT32[0]}
    cast = FLOAT32.to(dtype)  # the generative scheduler's table, cast by the training script
    start = latents.to(dtype)
    noisy = latents.to(dtype)
    grid = torch.arange(10) * 100 + 1 - 100
    called = []
    for t in grid[grid < timesteps[0]].tolist():
        called.append(t)
        output = network(noisy, torch.full((len(noisy),), t))
        # DDIMInverseScheduler.step: level t → t + 100
        now, following = inverse[t], inverse[t + 100]
        x0 = (noisy - (1 - now) ** 0.5 * output) / now**0.5
        noisy = following**0.5 * x0 + (1 - following) ** 0.5 * output
        # DDIMScheduler._get_variance(t + 100, t); its final_alpha_cumprod was never cast
        bar, bar_before = cast[t + 100], cast[t] if t >= 0 else FLOAT32[0]
        variance = ((1 - bar_before) / (1 - bar)) * (1 - bar / bar_before)
        drawn = torch.randn(noisy.shape, generator=generator, dtype=dtype)
        noisy = noisy + 0.1 * drawn * variance**0.5
    alpha = cast[timesteps[0]]
    target = (noisy - start * alpha**0.5) / ((1 - alpha) ** 0.5)
    return noisy.to(dtype), target, called


def trajectory(latents, timesteps, dtype, seed):
    path = official_inversion_path(
        latents, [timesteps], SCHEDULE, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )
    calls = []
    for call in path:
        calls.append(call)
        if not call.last:
            path.give(network(call.latents, call.timesteps))
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("t", [2, 25, 101, 102, 450, 500, 501, 777, 902, 999])
def test_latents_targets_and_loss_are_the_scripts_to_the_bit(t, dtype):
    latents = normal(t, (2, *SHAPE))
    *steps, last = trajectory(latents, [t, t], dtype, seed=t)
    noisy, target, called = script(latents, [t, t], dtype, seed=t)
    assert [call.timesteps.tolist() for call in steps] == [[time] * 2 for time in called]
    assert last.timesteps.tolist() == [t, t]
    assert torch.equal(last.latents, noisy) and last.latents.dtype == dtype
    assert torch.equal(last.target, target) and last.target.dtype == torch.float32
    assert target.isfinite().all()
    # the policy's output is float32, the reference is a pure 16-bit network; τ is float32, so both
    # errors are
    policy = network(noisy, torch.tensor([t, t]))
    reference = (0.9 * policy).to(dtype)
    errors = [(m - target).pow(2).mean(dim=[1, 2, 3]) for m in (policy, reference)]
    inside = -0.5 * 2000 * ((errors[0][0] - errors[0][1]) - (errors[1][0] - errors[1][1]))
    got = inpo_loss(policy, reference.float(), last.target, beta=2000.0)
    # both errors round to float32, some units in the last place, and β/2 multiplies that
    atol = 1000 * 4 * 2**-23 * torch.stack(errors).max().item()
    assert abs(got.logits.item() - inside.item()) <= atol
    assert abs(got.loss.item() - -logsigmoid(inside).item()) <= atol + 1e-6


def test_the_first_sample_decides_for_the_batch():
    timesteps = [450, 3, 450, 3]
    latents = normal(0, (4, *SHAPE))
    *steps, last = trajectory(latents, timesteps, torch.float16, seed=1)
    noisy, target, called = script(latents, timesteps, torch.float16, seed=1)
    assert called == [-99, 1, 101, 201, 301, 401] and len(steps) == 6
    assert torch.equal(last.latents, noisy) and torch.equal(last.target, target)
    # while the networks are told each sample's own
    assert last.timesteps.tolist() == timesteps


def test_depths_are_those_of_the_description():
    calls, reached = [], []
    for t in range(1000):
        path = official_inversion_path(torch.zeros(1, 1), [[t]], SCHEDULE)
        count = 0
        for call in path:
            if not call.last:
                count += 1
                path.give(call.latents)
        calls.append(count)
        reached.append(1 + 100 * (count - 1))
    # 1 + #{k: 1 + 100 k < t}, minimum 1, maximum 10, mean 6.38
    assert calls == [min(10, 1 + sum(1 + 100 * k < t for k in range(9))) for t in range(1000)]
    assert min(calls) == 1 and max(calls) == 10 and np.mean(calls) == pytest.approx(6.38, abs=0.005)
    # the latent ends on level g: g = t for 10 of 1000, mean +39.7, from −98 to +99
    gap = np.array(reached) - np.arange(1000)
    assert (gap == 0).sum() == 10 and gap.min() == -98 and gap.max() == 99
    assert gap.mean() == pytest.approx(39.7, abs=0.05)


def test_the_16_bit_table_is_as_wrong_as_described():
    # error of 1 − ᾱ in float16 at t = 0, 1, 2, 5: +14.9 %, −14.0 %, −4.7 %, +4.1 %
    half = FLOAT32.half()
    error = ((1 - half).double() / (1 - FLOAT32.double()) - 1)[[0, 1, 2, 5]] * 100
    np.testing.assert_allclose(error.numpy(), [14.9, -14.0, -4.7, 4.1], atol=0.05)


def test_the_script_is_not_a_number_in_bfloat16():
    """Why the trajectory refuses it."""
    noisy, target, _ = script(normal(0, (2, *SHAPE)), [450, 450], torch.bfloat16, seed=0)
    assert noisy.isnan().all() and target.isnan().all()


def test_smpo_has_five_steps():
    path = official_inversion_path(torch.zeros(1, 1), [[999]], SCHEDULE, num_steps=5)
    times = []
    for call in path:
        times.append(call.timesteps.item())
        path.give(call.latents)
    assert times == [-199, 1, 201, 401, 601, 999]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [5, 5]}, r"grid must be \[n, B\], got shape \(2,\)"),
        ({"grid": [[5, 5, 5]]}, "grid must have one entry a sample, 2"),
        ({"dtype": torch.bfloat16}, "must hold 1 − ᾱ, .*: 8.5e-04 .* is 0 in torch.bfloat16"),
        (
            # beta_start=1e-4, which diffusers' DDIMScheduler has by default
            {
                "schedule": NoiseSchedule.from_alphas_cumprod(
                    np.linspace(1 - 1e-4, 0.01, 1000), 1000
                )
            },
            "must hold 1 − ᾱ, .*: 1.0e-04 .* is 0 in torch.float16",
        ),
        ({"train_at": (1,)}, r"the official script trains at the end only, got train_at \(1,\)"),
        (
            {"schedule": NoiseSchedule.flow(1000)},
            "needs a variance-preserving schedule of an epsilon model, got flow and flow",
        ),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"clean": torch.zeros(2, 1), "grid": [[5, 5]], "schedule": SCHEDULE, **change}
    with pytest.raises(ValueError, match=message):
        official_inversion_path(**arguments)


def test_the_table_survives_the_schedule():
    # α = √ᾱ in float64, squared and rounded, gives the float32 table back
    assert torch.equal(torch.from_numpy(SCHEDULE.alpha[1:] ** 2).float(), FLOAT32)
    # which is not the float64 table rounded
    assert not torch.equal(torch.from_numpy(scaled_linear_alphas_cumprod()).float(), FLOAT32)
