"""Training schedules and noising against diffusers' own."""

import numpy as np
import pytest
import torch

from inpo_fast.training import q_sample, training_schedule

diffusers = pytest.importorskip("diffusers")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EPS = torch.finfo(torch.float32).eps
CLEAN, NOISE = torch.randn((2, 5, 4, 3, 3), generator=torch.Generator().manual_seed(0))
TIMESTEPS = [0, 1, 250, 900, 999]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["epsilon", "v", "v with zero terminal SNR"],
)
def test_stable_diffusion(options):
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION, **options)
    schedule = training_schedule(scheduler)
    assert schedule.num_steps == 1000 and schedule.discrete
    assert schedule.timesteps[1:].tolist() == list(range(1000))
    assert torch.equal(torch.from_numpy(schedule.alpha[1:] ** 2).float(), scheduler.alphas_cumprod)
    point = q_sample(CLEAN, NOISE, TIMESTEPS, schedule)
    times = torch.tensor(TIMESTEPS)
    assert torch.equal(point.timesteps, times)
    # the scheduler works in float32, 1 − ᾱ included: √(1−ᾱ) is off by eps/(2 √(1−ᾱ))
    bar = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    allowed = (4 * EPS + EPS / (1 - bar).sqrt()) * (CLEAN.abs() + NOISE.abs())
    expected = scheduler.add_noise(CLEAN, NOISE, times)
    assert ((point.latents - expected).abs() <= allowed).all()
    if options:
        velocity = scheduler.get_velocity(CLEAN, NOISE, times)
        assert ((point.target - velocity).abs() <= allowed).all()
    else:
        assert torch.equal(point.target, NOISE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = training_schedule(scheduler)
    # the scheduler lists the levels that training draws from by falling noise
    np.testing.assert_allclose(schedule.sigma[:0:-1], scheduler.sigmas.numpy(), rtol=4 * EPS)
    np.testing.assert_allclose(schedule.timesteps[:0:-1], scheduler.timesteps.numpy(), rtol=4 * EPS)
    point = q_sample(CLEAN, NOISE, TIMESTEPS, schedule)
    sigma = torch.tensor(schedule.sigma[1:][TIMESTEPS])
    assert point.timesteps.dtype == torch.float32
    torch.testing.assert_close(point.timesteps.double(), 1000 * sigma, rtol=EPS, atol=0)
    column = sigma.view(-1, 1, 1, 1)
    by_hand = (1 - column) * CLEAN.double() + column * NOISE.double()
    assert ((point.latents - by_hand).abs() <= 2 * EPS * (CLEAN.abs() + NOISE.abs())).all()
    assert torch.equal(point.target, NOISE - CLEAN)


def test_a_dynamic_shift_is_left_to_the_caller():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    schedule = training_schedule(scheduler)
    np.testing.assert_allclose(schedule.sigma, np.arange(1001) / 1000, rtol=1e-15)


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (object(), TypeError, "scheduler must be a diffusers scheduler, got object"),
        (diffusers.DDIMScheduler(), ValueError, "scheduler must have clip_sample=False"),
    ],
)
def test_wrong_schedulers(scheduler, error, message):
    with pytest.raises(error, match=message):
        training_schedule(scheduler)
