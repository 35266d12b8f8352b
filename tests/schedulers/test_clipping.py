"""Sampling with `clip_sample`: what pixel-space models are saved with."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast import NoiseSchedule
from tests.schedulers.cases import FORWARD, INVERSE, PAIRS, STABLE_DIFFUSION, loop, normal

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
CLIPPED = {"clip_sample": True, "clip_sample_range": 0.8}


def make(cls, steps=6, **config):
    scheduler = cls(**{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def overshooting(prediction_type):
    """A model whose x̂ leaves [-0.8, 0.8] in part of the elements, at every noise level."""

    table = DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod

    def model(z, t):
        wide = z if z.dtype == torch.float64 else z.float()
        bar = table.to(wide.dtype)[int(t)]
        clean = 1.2 * torch.tanh(wide.roll(1, -1))
        noise = (wide - bar.sqrt() * clean) / (1 - bar).sqrt()
        outputs = {
            "epsilon": noise,
            "v_prediction": bar.sqrt() * noise - (1 - bar).sqrt() * clean,
            "sample": clean,
        }
        return outputs[prediction_type].to(z.dtype)

    return model


@pytest.mark.parametrize("cls", FORWARD)
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [*((p, False) for p in PREDICTIONS), ("v_prediction", True), ("sample", True)],
)
def test_the_first_step_is_that_of_ddim(cls, prediction_type, zero_snr):
    ddim = DDIMScheduler(
        **{**STABLE_DIFFUSION, **CLIPPED},
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    ours = cls.from_config(ddim.config)
    assert ours.config.clip_sample is True
    sample, output = normal(2, 3, 8), normal(2, 3, 8, seed=1)
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(10)
    for first in (0, 5, 9):
        t = int(ddim.timesteps[first])
        mine, theirs = (s.step(output, t, sample) for s in (ours, ddim))
        ours.set_begin_index(0)
        # float32 rounding of a few numbers of size 1, of x̂ divided by α
        alpha = float(ddim.alphas_cumprod[t]) ** 0.5 if prediction_type == "epsilon" else 1
        clean = theirs.pred_original_sample
        assert 0.1 < (clean.abs() == 0.8).float().mean() < 1
        torch.testing.assert_close(mine.pred_original_sample, clean, rtol=0, atol=1e-6 / alpha)
        torch.testing.assert_close(mine.prev_sample, theirs.prev_sample, rtol=0, atol=2e-6)


def two_step(name, levels, sample, model, times, gamma=1.0):
    """BDIA (eq. 15) and O-BELM (eq. 18) written with x̂ and ε̂, clamping x̂; float64."""
    alpha, sigma = levels
    tau = sigma / alpha
    last = None
    z = sample
    for i in range(len(times), 0, -1):
        output = model(z, times[i - 1])
        noise = (z - alpha[i] * output) / sigma[i]
        clean = output.clamp(-0.8, 0.8)
        held = alpha[i] * clean + sigma[i] * noise
        down = alpha[i - 1] * clean + sigma[i - 1] * noise
        if last is None:
            z = down
        elif name == "bdia":
            z = gamma * last - gamma * (alpha[i + 1] * clean + sigma[i + 1] * noise) + down
        else:
            h, above = tau[i] - tau[i - 1], tau[i + 1] - tau[i]
            a = (h / above) ** 2
            u = a * last / alpha[i + 1] + (1 - a) * held / alpha[i] - (h + a * above) * noise
            z = alpha[i - 1] * u
        last = held
    return z


def coupled(levels, sample, model, times, p=0.93):
    """EDICT (eq. 13-15), clamping the x̂ of the track that moves; float64."""
    alpha, sigma = levels
    tracks = [sample, sample]
    for i in range(len(times), 0, -1):
        first = (len(times) - i) % 2
        for j in (first, 1 - first):
            other = tracks[1 - j]
            noise = (other - alpha[i] * model(other, times[i - 1])) / sigma[i]
            clean = ((tracks[j] - sigma[i] * noise) / alpha[i]).clamp(-0.8, 0.8)
            tracks[j] = alpha[i - 1] * clean + sigma[i - 1] * noise
        tracks[0] = p * tracks[0] + (1 - p) * tracks[1]
        tracks[1] = p * tracks[1] + (1 - p) * tracks[0]
    return tracks[0]


@pytest.mark.parametrize(
    ("name", "weight"),
    [("bdia", {"gamma": 1.0}), ("bdia", {"gamma": 0.5}), ("obelm", {}), ("edict", {})],
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_run_clamps_the_clean_estimate_of_every_update(name, weight, prediction_type):
    config = {"prediction_type": prediction_type, **weight}
    scheduler = make(PAIRS[name][0], **CLIPPED, **config)
    sample = normal(2, 3, 4, dtype=torch.float64)
    result = loop(scheduler, sample, overshooting(prediction_type))

    schedule = NoiseSchedule.from_diffusers(DDIMScheduler(**STABLE_DIFFUSION), 6)
    levels = np.array(schedule.alpha), np.array(schedule.sigma)
    times = [int(t) for t in schedule.timesteps[1:]]
    predicting = overshooting("sample")
    if name == "edict":
        expected = coupled(levels, sample, predicting, times)
    else:
        expected = two_step(name, levels, sample, predicting, times, *weight.values())
    unclipped = make(PAIRS[name][0], **config)
    assert (loop(unclipped, sample, overshooting(prediction_type)) - expected).abs().max() > 0.05
    # O-BELM's a is a rational with terms up to 2^16; the rest is float64
    tolerance = 1e-5 if name == "obelm" else 1e-12
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def two_modes(z, t):
    """ε̂ of data at ±0.9 with deviation 0.1, whose x̂ leaves [-1, 1] now and then; float64."""
    bar = DDIMScheduler().alphas_cumprod.double()[int(t)]
    alpha, variance = bar.sqrt(), 0.01 * bar + 1 - bar
    mode = 0.9 * torch.tanh(0.9 * alpha * z / variance)
    clean = mode + 0.01 * alpha / variance * (z - alpha * mode)
    return (z - alpha * clean) / (1 - bar).sqrt()


@pytest.mark.parametrize("cls", FORWARD)
def test_more_steps_come_nearer_to_clipped_ddim(cls):
    sample = normal(16, 3, 8, dtype=torch.float64)

    def result(cls, steps, clip):
        scheduler = cls(clip_sample=clip)
        scheduler.set_timesteps(steps)
        return loop(scheduler, sample, two_modes)

    limit = result(DDIMScheduler, 500, True)
    clamped = (result(DDIMScheduler, 500, False) - limit).abs() > 0.01
    assert 0.05 < clamped.double().mean() < 0.5
    error = [(result(cls, steps, True) - limit)[clamped].abs().mean() for steps in (10, 100)]
    # ten times the steps: order 1, as DDIM's own clamping, with room for 10 steps being few
    assert error[1] < error[0] / 5


@pytest.mark.parametrize("cls", FORWARD)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_range_that_nothing_leaves_changes_no_bit(cls, prediction_type, dtype):
    config = {"prediction_type": prediction_type}
    sample, model = normal(2, 3, 8, dtype=dtype), overshooting(prediction_type)
    plain = make(cls, **config)
    wide = make(cls, clip_sample=True, clip_sample_range=1e6, **config)
    one, other = sample, sample
    for t in plain.timesteps:
        step = plain.step(model(one, t), t, one)
        again = wide.step(model(other, t), t, other)
        assert torch.equal(step.prev_sample, again.prev_sample)
        assert torch.equal(step.pred_original_sample, again.pred_original_sample)
        one, other = step.prev_sample, again.prev_sample


@pytest.mark.parametrize("cls", FORWARD)
def test_a_16_bit_run_keeps_to_the_range(cls):
    scheduler, model = make(cls, 20, **CLIPPED), overshooting("epsilon")
    sample = normal(2, 3, 8, dtype=torch.bfloat16)
    for t in scheduler.timesteps:
        step = scheduler.step(model(sample.float(), t).bfloat16(), t, sample)
        assert step.pred_original_sample.abs().max() <= torch.tensor(0.8).bfloat16()
        assert step.prev_sample.dtype == torch.bfloat16
        sample = step.prev_sample


def test_a_run_from_the_second_call_of_a_pair_clips_too():
    scheduler = make(PAIRS["edict"][0], **CLIPPED)
    sample = 5 * normal(2, 3, 8)
    step = scheduler.step(normal(2, 3, 8, seed=1), scheduler.timesteps[1], sample)
    assert torch.equal(step.prev_sample, sample)
    assert step.pred_original_sample.abs().max() == torch.tensor(0.8)


@pytest.mark.parametrize("cls", FORWARD)
def test_the_config_is_that_of_ddim(cls, tmp_path):
    # as diffusers has it, a default of one class does not become an argument of another
    assert cls().config.clip_sample is cls.from_config(DDIMScheduler().config).config.clip_sample
    assert cls().config.clip_sample is False and cls().config.clip_sample_range == 1.0
    # but what a file says counts
    DDIMScheduler().save_pretrained(tmp_path / "default")
    assert cls.from_pretrained(tmp_path / "default").config.clip_sample is True
    DDIMScheduler(**CLIPPED).save_pretrained(tmp_path / "ddim")
    ours = cls.from_pretrained(tmp_path / "ddim")
    ours.save_pretrained(tmp_path / "ours")
    again = cls.from_pretrained(tmp_path / "ours")
    back = DDIMScheduler.from_config(again.config)
    for scheduler in (ours, again, back):
        assert {key: scheduler.config[key] for key in CLIPPED} == CLIPPED


@pytest.mark.parametrize("cls", INVERSE)
def test_an_inverse_does_not_clip(cls):
    message = r"clip_sample must be False.*no inverse.*from_config\(config, clip_sample=False\)"
    with pytest.raises(ValueError, match=message):
        cls(clip_sample=True)
    with pytest.raises(ValueError, match=message):
        cls.from_config({**STABLE_DIFFUSION, **CLIPPED})
    scheduler = cls.from_config({**STABLE_DIFFUSION, **CLIPPED}, clip_sample=False)
    assert scheduler.config.clip_sample is False


@pytest.mark.parametrize("name", PAIRS)
def test_a_clipped_run_takes_and_leaves_no_state(name):
    forward, inverse, _ = PAIRS[name]
    sample, model = normal(2, 3, 8), overshooting("epsilon")
    scheduler, up = make(forward, **CLIPPED), make(inverse)
    loop(up, sample, model)
    with pytest.raises(ValueError, match=r"state .*clip_sample.*no inverse.*clip_sample=False"):
        scheduler.set_state(up.state)
    assert scheduler.set_state(None) is None and scheduler.state is None
    loop(scheduler, sample, model)
    with pytest.raises(ValueError, match=r"state .*clip_sample.*no inverse.*clip_sample=False"):
        _ = scheduler.state
    with pytest.raises(ValueError, match=r"clip_sample=False.*no inverse"):
        NoiseSchedule.from_diffusers(scheduler, 6)


@pytest.mark.parametrize("cls", FORWARD)
def test_refused_arguments(cls):
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_sample_range must be positive"):
            cls(clip_sample_range=limit)
    scheduler, sample = make(cls, **CLIPPED), normal(2, 3)
    with pytest.raises(ValueError, match="use_clipped_model_output must be False"):
        scheduler.step(sample, scheduler.timesteps[0], sample, use_clipped_model_output=True)
