"""The schedulers on a GPU: steps that wait for nothing, runs that repeat, numbers as on the CPU."""

import pytest
import torch

pytest.importorskip("diffusers")

from inpo_fast import State
from tests.schedulers import tiny
from tests.schedulers.cases import CLASSES, FORWARD, PAIRS, STABLE_DIFFUSION, loop, normal

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

STEPS = 6
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def make(cls, device, **config):
    scheduler = cls(**{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(STEPS, device=device)
    return scheduler


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_step_waits_for_the_device(cuda, no_sync, cls, dtype):
    sample = normal(2, 4, 8, 8, dtype=dtype).to(cuda)
    expected = loop(make(cls, cuda), sample)
    # another object, whose tables are not on the device yet
    scheduler = make(cls, cuda)
    with no_sync():
        result = loop(scheduler, sample)
        scheduler.set_begin_index(0)
        again = loop(scheduler, sample)
    assert result.dtype == dtype
    assert result.isfinite().all() and not torch.equal(result, sample)
    assert torch.equal(result, expected) and torch.equal(again, expected)


@pytest.mark.parametrize("cls", FORWARD, ids=lambda cls: cls.__name__)
def test_no_step_of_image_to_image_waits_for_the_device(cuda, no_sync, cls):
    """The loop begins in the middle of the list, as `strength` has it, and blends as inpainting."""
    scheduler = make(cls, cuda)
    sample, noise = normal(2, 4, 8, 8).to(cuda), normal(2, 4, 8, 8, seed=1).to(cuda)
    keep = torch.zeros_like(sample)
    keep[..., :4] = 1
    timesteps = scheduler.timesteps[2 * scheduler.order :]

    def between(z):
        return keep * (sample + noise) + (1 - keep) * z

    expected = loop(scheduler, sample, timesteps=timesteps, between=between)
    scheduler.set_begin_index(2 * scheduler.order)
    with no_sync():
        result = loop(scheduler, sample, timesteps=timesteps, between=between)
    assert torch.equal(result, expected)
    torch.testing.assert_close(result[..., :4], (sample + noise)[..., :4], rtol=0, atol=0)


@every_class
def test_a_scheduler_used_again_gives_the_same_bits(cuda, cls):
    scheduler, sample = make(cls, cuda), normal(2, 4, 8, 8).to(cuda)
    first = loop(scheduler, sample)
    # a run that is broken off leaves nothing behind
    loop(scheduler, normal(2, 4, 8, 8, seed=1).to(cuda), timesteps=scheduler.timesteps[:3])
    assert torch.equal(loop(scheduler, sample), first)
    scheduler.set_timesteps(STEPS, device=cuda)
    assert torch.equal(loop(scheduler, sample), first)
    # timesteps on the CPU and Python numbers are the same steps
    for timesteps in (scheduler.timesteps.cpu(), scheduler.timesteps.tolist()):
        assert torch.equal(loop(scheduler, sample, timesteps=timesteps), first)


@every_class
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_device_computes_what_the_cpu_does(cuda, cls, prediction_type):
    sample = normal(2, 4, 8, 8)
    exact, here, there = (
        loop(make(cls, device, prediction_type=prediction_type), sample.to(device, dtype)).cpu()
        for device, dtype in (
            ("cpu", torch.float64),
            ("cpu", torch.float32),
            (cuda, torch.float32),
        )
    )
    # Both have the float32 error of the run, whatever it magnifies; they differ in the last bit of
    # tanh. Of 512 numbers the largest errors are of one size. 2^-22 is two roundings of the result.
    error = (here - exact).abs().max()
    bound = 4 * error + 2**-22 * exact.abs().max()
    assert (there - exact).abs().max() <= bound
    assert error > 0


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_way_back_from_a_state_that_was_saved(cuda, tmp_path, name, dtype):
    forward, inverse, _ = PAIRS[name]
    up, down = make(inverse, cuda), make(forward, cuda)
    sample = normal(2, 4, 8, 8, dtype=dtype).to(cuda)
    loop(up, sample)
    up.state.save(tmp_path / "state.safetensors")

    def back(device):
        first = down.set_state(State.load(tmp_path / "state.safetensors", device=device))
        return loop(down, first.to(cuda, dtype))

    returned = back(cuda)
    assert returned.device.type == torch.device(cuda).type
    # a state that lies on the CPU goes where the samples are
    assert torch.equal(back("cpu"), returned)
    # without the state the way back has the error of a DDIM step
    down.set_state(None)
    down.set_timesteps(STEPS, device=cuda)
    alone = loop(down, up.state.sample().to(dtype))
    error, inexact = ((z - sample).float().abs().max() for z in (returned, alone))
    assert error < 0.1 * inexact


@pytest.mark.parametrize("cls", FORWARD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pipelines_sample_with_it(cuda, name, cls, dtype):
    pipe = tiny.build(name).to(cuda, dtype)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    first = tiny.call(pipe, name)
    assert first.device.type == torch.device(cuda).type and first.isfinite().all()
    assert torch.equal(tiny.call(pipe, name), first)
    assert not torch.equal(tiny.call(pipe, name, seed=1), first)
