"""Runs: what a scheduler computes, what it remembers between steps, and how a run is undone."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast import NoiseSchedule, Sampler, State
from tests.schedulers.cases import (
    CLASSES,
    FORWARD,
    INVERSE,
    PAIRS,
    STABLE_DIFFUSION,
    loop,
    model,
    normal,
)

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def make(cls, steps=6, **config):
    scheduler = cls(**{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def grid(steps=6, **config):
    return NoiseSchedule.from_diffusers(DDIMScheduler(**{**STABLE_DIFFUSION, **config}), steps)


def recorded(scheduler, sample):
    """The result of the loop, and what the model saw and returned."""
    seen, outputs = [], []

    def recording(z, t):
        seen.append(z)
        outputs.append(model(z, t))
        return outputs[-1]

    return loop(scheduler, sample, recording), seen, outputs


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("direction", ["sample", "invert"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("one", [True, False])
def test_a_run_is_that_of_a_sampler(name, direction, prediction_type, one):
    # The sampler gets the outputs that the loop got, so every bit must be the same. (Its model sees
    # z = ℓu after rounding u, where a pipeline calls the model on z itself.)
    config = {"prediction_type": prediction_type, "set_alpha_to_one": one}
    cls = PAIRS[name][0 if direction == "sample" else 1]
    scheduler = make(cls, **config)
    sample = normal(2, 3, 4, 5)
    result, shown, outputs = recorded(scheduler, sample)

    program = PAIRS[name][2](grid(**config), direction=direction)
    times, seen = [], []

    def replay(z, t):
        times.append(int(t[0]))
        seen.append(z)
        return outputs[len(times) - 1]

    expected = Sampler(replay, program, state="float32").run(sample)
    assert times == scheduler.timesteps.tolist()
    for mine, theirs in zip(shown, seen, strict=True):
        # a scale and a product, each rounded on either side
        torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo().eps, atol=0)
    assert scheduler.state.equal(expected)
    assert scheduler.state.program == expected.program
    assert scheduler.state.inverse == expected.inverse
    # one more rounding where the result is scaled
    torch.testing.assert_close(result, expected.sample(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("cls", FORWARD)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_first_step_is_ddim(cls, prediction_type, spacing):
    # the timesteps and strides at which DDIMScheduler's fixed stride is right
    ddim = DDIMScheduler(
        **{**STABLE_DIFFUSION, "prediction_type": prediction_type, "timestep_spacing": spacing}
    )
    ours = cls.from_config(ddim.config)
    ddim.set_timesteps(10)
    grid = ddim.timesteps
    # linspace: 999, 888, …, where DDIMScheduler goes on to 899
    ours.set_timesteps(timesteps=grid if spacing != "linspace" else [999, 899, 799])
    sample = normal(2, 3)
    output = 0.1 * sample.roll(1, -1)
    mine = ours.step(output, ours.timesteps[0], sample)
    theirs = ddim.step(output, grid[0], sample)
    torch.testing.assert_close(mine.prev_sample, theirs.prev_sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_x0_is_that_of_ddim(cls, prediction_type):
    scheduler = make(cls, prediction_type=prediction_type)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(6)
    sample = normal(2, 3)
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, t), t)
        step = scheduler.step(output, t, sample)
        expected = ddim.step(output, int(t), sample).pred_original_sample
        torch.testing.assert_close(step.pred_original_sample, expected, rtol=1e-4, atol=1e-4)
        sample = step.prev_sample


def test_a_small_gamma_is_nearly_ddim():
    cls = PAIRS["bdia"][0]
    ddim = DDIMScheduler(**STABLE_DIFFUSION)
    ddim.set_timesteps(10)
    sample = normal(2, 3)
    expected = loop(ddim, sample)
    distance = [
        (loop(make(cls, 10, gamma=gamma), sample) - expected).abs().max().item()
        for gamma in (2**-8, 2**-12)
    ]
    # linear in γ, up to the float32 rounding of DDIMScheduler
    assert distance[0] < 0.1
    assert distance[1] == pytest.approx(distance[0] / 16, rel=0.2, abs=2e-6)


LIPSCHITZ = 0.8
"""Of `cases.model`: 0.5 of the hyperbolic tangent and at most 0.3 of the sample itself."""


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("one", [True, False])
def test_the_state_makes_the_way_back_exact(name, prediction_type, dtype, one):
    config = {"prediction_type": prediction_type, "set_alpha_to_one": one}
    forward, inverse, _ = PAIRS[name]
    down, up = make(forward, **config), make(inverse, **config)
    for there, back in ((up, down), (down, up)):
        sample = normal(2, 3, 5, dtype=dtype)
        end, seen, _ = recorded(there, sample)
        state = there.state
        first = back.set_state(state)
        assert first.dtype == dtype
        # as a pipeline does
        back.set_timesteps(6)
        returned = loop(back, first)
        # Both ways use the same rounded coefficients and compute in float64, so an update only
        # rounds the track that it changes, and where z = ℓu the sample that the model sees: eps/2
        # of the largest |z|, the second times the gain of the model, 2 U updates in all. Each
        # error reaches the end times the amplification, which holds the model fixed; the model
        # answers to it once more, times its gain.
        plan = back._run.plan
        largest = max(z.abs().max().item() for z in (*seen, end))
        gain = 1 + LIPSCHITZ * max(abs(u.c) * u.after for u in plan.program.updates)
        eps = torch.finfo(dtype).eps / 2
        updates = 2 * len(plan.program.updates)
        bound = updates * eps * plan.rest.amplification * largest * gain**2
        error = (returned - sample).abs().max().item()
        assert error <= bound
        # without the state the way back is another one
        if name != "edict":
            back.set_timesteps(6)
            inexact = (loop(back, end) - sample).abs().max().item()
            assert inexact > 10 * error


@pytest.mark.parametrize("name", PAIRS)
def test_states_of_schedulers_and_samplers_are_the_same_thing(name, tmp_path):
    forward, inverse, solver = PAIRS[name]
    sample = normal(2, 3)
    scheduler = make(inverse)
    loop(scheduler, sample)
    scheduler.state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    undo = solver(grid(), direction="invert").inverse()
    back = Sampler(lambda z, t: model(z, t[0]), undo, state="float32").run(loaded)
    torch.testing.assert_close(back.sample(), sample, rtol=0, atol=1e-5)

    invert = Sampler(
        lambda z, t: model(z, t[0]), solver(grid(), direction="invert"), state="float32"
    )
    down = make(forward)
    returned = loop(down, down.set_state(invert.run(sample)))
    torch.testing.assert_close(returned, sample, rtol=0, atol=1e-5)


def test_states_that_do_not_fit_are_refused():
    forward, inverse, solver = PAIRS["bdia"]
    up = make(inverse)
    sample = normal(2, 3)
    loop(up, sample, timesteps=up.timesteps[:3])
    down = make(forward)
    with pytest.raises(ValueError, match="must be that of a finished run, got one after 3 updates"):
        down.set_state(up.state)
    up.set_timesteps(6)
    loop(up, sample)
    for other in (
        make(forward, 7),
        make(forward, gamma=0.5),
        make(forward, prediction_type="v_prediction"),
        make(forward, beta_end=0.013),
        make(PAIRS["obelm"][0]),
        make(inverse),
    ):
        with pytest.raises(ValueError, match="must come from the other direction of this solver"):
            other.set_state(up.state)
    with pytest.raises(TypeError, match=r"state must be an inpo_fast\.State, got Tensor"):
        down.set_state(sample)
    lattice = Sampler(lambda z, t: model(z, t[0]), solver(grid(), direction="invert")).run(sample)
    with pytest.raises(ValueError, match="floating tracks"):
        down.set_state(lattice)
    with pytest.raises(ValueError, match="set_timesteps must be called first"):
        forward().set_state(up.state)

    # a run that it does not fit is refused too, until the state is taken back
    down.set_state(up.state)
    with pytest.raises(ValueError, match="shape"):
        down.step(sample[:1], down.timesteps[0], sample[:1])
    with pytest.raises(ValueError, match="other direction"):
        down.step(sample, down.timesteps[1], sample)
    down.set_timesteps(7)
    with pytest.raises(ValueError, match=r"other direction.*set_state\(None\) takes"):
        down.step(sample, down.timesteps[0], sample)
    assert down.set_state(None) is None
    assert torch.equal(loop(down, sample), loop(make(forward, 7), sample))


def test_a_state_is_used_once():
    forward, inverse, _ = PAIRS["bdia"]
    up, down = make(inverse), make(forward)
    noise = loop(up, normal(2, 3))
    first = down.set_state(up.state)
    exact = loop(down, first)
    down.set_timesteps(6)
    assert torch.equal(loop(down, noise), loop(make(forward), noise))
    assert not torch.equal(loop(down, noise), exact)


def test_a_refused_step_does_not_use_the_state_up():
    forward, inverse, _ = PAIRS["obelm"]
    up, down = make(inverse), make(forward)
    sample = normal(2, 3)
    loop(up, sample)
    first = down.set_state(up.state)
    with pytest.raises(ValueError, match="m1 must have the shape"):
        down.step(first[:1], down.timesteps[0], first)
    torch.testing.assert_close(loop(down, first), sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_keeps_its_precision_under_16_bit_latents(name):
    forward, inverse, _ = PAIRS[name]
    up, down = make(inverse), make(forward)
    loop(up, normal(2, 3))
    first = down.set_state(up.state)
    outputs = [normal(2, 3, seed=seed) for seed in range(len(down.timesteps))]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        down.set_state(up.state)
        left = iter(outputs)
        loop(down, first.to(dtype), lambda z, t: next(left))  # noqa: B023
        results.append(down.state)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("name", PAIRS)
def test_part_of_the_way_and_back(name):
    # img2img's latents, inverted instead of noised
    forward, inverse, _ = PAIRS[name]
    down, up = make(forward, 8), make(inverse, 8)
    part = down.timesteps[:: down.order][5:]
    up.set_timesteps(timesteps=part)
    sample = normal(2, 3)
    loop(up, sample)
    down.set_timesteps(timesteps=part)
    returned = loop(down, down.set_state(up.state))
    torch.testing.assert_close(returned, sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("as_number", [False, True])
def test_aborted_and_repeated_runs(cls, as_number):
    scheduler = make(cls)
    times = [int(t) for t in scheduler.timesteps] if as_number else list(scheduler.timesteps)
    first, second = normal(2, 3), normal(2, 3, seed=1)
    expected = loop(make(cls), second)
    # one object, twice, without set_timesteps
    loop(scheduler, first, timesteps=times)
    assert torch.equal(loop(scheduler, second, timesteps=times), expected)
    # after a run that was left in the middle, between two timesteps
    loop(scheduler, first, timesteps=times[: 2 * scheduler.order])
    assert torch.equal(loop(scheduler, second, timesteps=times), expected)
    # and within one: by number the second call of a pair looks like the first
    loop(scheduler, first, timesteps=times[:1])
    if as_number:
        scheduler.set_begin_index(0)
    assert torch.equal(loop(scheduler, second, timesteps=times), expected)
    # another pipeline's batch, after set_timesteps
    loop(scheduler, first, timesteps=times[:3])
    scheduler.set_timesteps(6)
    larger = normal(5, 2, 2)
    assert torch.equal(loop(scheduler, larger), loop(make(cls), larger))
    # on another grid with the same first timestep
    scheduler = make(cls, timestep_spacing="trailing")
    loop(scheduler, first)
    scheduler.set_timesteps(3)
    assert torch.equal(
        loop(scheduler, first), loop(make(cls, 3, timestep_spacing="trailing"), first)
    )
    # and on one that begins where the run before was left
    loop(scheduler, first, timesteps=scheduler.timesteps[: scheduler.order])
    rest = scheduler.timesteps[scheduler.order :: scheduler.order].tolist()
    if scheduler.direction == "sample":
        fresh = make(cls, timestep_spacing="trailing")
        for one in (scheduler, fresh):
            one.set_timesteps(timesteps=rest)
        # by number a step could be the next one of either
        numbers = scheduler.timesteps.tolist()
        expected = loop(fresh, second, timesteps=numbers)
        assert torch.equal(loop(scheduler, second, timesteps=numbers), expected)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_with_the_run(cls, duplicate):
    scheduler = make(cls)
    half = len(scheduler.timesteps) // 2
    sample = loop(scheduler, normal(2, 3), timesteps=scheduler.timesteps[:half])
    other = duplicate(scheduler)
    results = [loop(s, sample, timesteps=s.timesteps[half:]) for s in (scheduler, other)]
    assert torch.equal(*results)
    # both went on, neither began anew
    fresh = loop(make(cls), sample, timesteps=scheduler.timesteps[half:])
    assert not torch.equal(results[0], fresh)


@pytest.mark.parametrize("cls", FORWARD)
def test_a_run_may_begin_anywhere(cls):
    scheduler = make(cls)
    sample = normal(2, 3)
    times = scheduler.timesteps
    # in the middle, as img2img does
    start = 2 * scheduler.order
    scheduler.set_begin_index(start)
    assert scheduler.begin_index == start and scheduler.step_index is None
    part = loop(scheduler, sample, timesteps=times[start:])
    assert scheduler.step_index == len(times)
    alone = cls(**STABLE_DIFFUSION)
    alone.set_timesteps(timesteps=times[start :: scheduler.order])
    assert torch.equal(part, loop(alone, sample))
    # between two timesteps
    off = int(times[start]) + 3
    sequence = [off] * scheduler.order + times[start:].tolist()
    between = loop(scheduler, sample, timesteps=sequence)
    alone.set_timesteps(timesteps=sequence[:: scheduler.order])
    assert torch.equal(between, loop(alone, sample))


@pytest.mark.parametrize("cls", INVERSE)
def test_an_inversion_may_begin_anywhere(cls):
    scheduler = make(cls)
    sample = normal(2, 3)
    times = scheduler.timesteps
    start = 2 * scheduler.order
    loop(scheduler, sample, timesteps=times[start:])
    plan = scheduler._run.plan
    assert plan.times == times[start:].tolist()
    # from node 2 on the levels are those of the whole grid
    assert plan.schedule.alpha.tolist() == grid().alpha[2:].tolist()
    # between two timesteps the run goes on to the next level
    loop(scheduler, sample, timesteps=[400] * scheduler.order + times[times > 400].tolist())
    assert scheduler._run.finished and 400 in scheduler._run.plan.schedule.timesteps
    if scheduler.order == 1:
        with pytest.raises(ValueError, match="must be below the noisiest one, 831, got 900"):
            scheduler.step(sample, 900, sample)


@pytest.mark.parametrize("cls", PAIRS["edict"][:2])
def test_edict_may_begin_within_a_pair(cls):
    # SDXL's denoising_start adds one call for schedulers of order 2; its latents are at the level
    # that the pair goes to
    scheduler, sample = make(cls), normal(2, 3)
    times = scheduler.timesteps
    scheduler.set_begin_index(3)
    step = scheduler.step(model(sample, times[3]), times[3], sample)
    assert torch.equal(step.prev_sample, sample) and step.prev_sample is not sample
    assert scheduler.step_index == 4
    rest = loop(scheduler, step.prev_sample, timesteps=times[4:])
    assert torch.equal(rest, loop(make(cls), sample, timesteps=times[4:]))
    other = make(PAIRS["edict"][1 if cls is PAIRS["edict"][0] else 0])
    loop(other, sample)
    scheduler.set_state(other.state)
    with pytest.raises(ValueError, match="must be the first one of the list to begin from a state"):
        scheduler.step(sample, times[1], sample)


@pytest.mark.parametrize("cls", CLASSES)
def test_changed_latents_are_the_state(cls):
    # a two-step solver continues from the latents that the pipeline used, in both places
    scheduler = make(cls)
    change = normal(2, 3, seed=1)
    calls = []

    def shift(z):
        calls.append(z)
        return z + 0.1 * change

    def in_place(z):
        return z.add_(0.1 * change)

    sample = normal(2, 3)
    changed = loop(scheduler, sample, between=shift)
    assert len(calls) == len(scheduler.timesteps)
    assert torch.equal(loop(scheduler, sample, between=in_place), changed)
    assert torch.equal(loop(scheduler, sample, between=torch.clone), loop(make(cls), sample))
    # linear in the change: nothing of the unchanged latents is left behind
    if cls is PAIRS["bdia"][0]:
        program = PAIRS["bdia"][2](grid())
        tracks = [sample.double(), sample.double()]
        z, before = sample.double(), None
        for update, t in zip(program.updates, scheduler.timesteps, strict=True):
            m = model(z.float(), t).double()
            other = torch.zeros_like(z) if before is None else before
            tracks = float(update.a) * other + update.b * z + update.c * m
            z, before = tracks + 0.1 * change, z
        torch.testing.assert_close(changed, z.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_buffer_that_is_written_over_and_over(cls):
    scheduler = make(cls)
    sample = normal(2, 3)
    buffer = sample.clone()
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(buffer, t), t)
        buffer.copy_(scheduler.step(output, t, buffer).prev_sample)
        output.zero_()
    assert torch.equal(buffer, loop(make(cls), sample))
    state = scheduler.state
    before = copy.deepcopy(state)
    buffer.zero_()
    assert state.equal(before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_samples_do_not_add_their_rounding_up(cls, dtype):
    sample = normal(2, 3, 8).to(dtype)
    scheduler = make(cls, 10)
    result, _, outputs = recorded(scheduler, sample)
    assert result.dtype == dtype
    state = scheduler.state
    assert {t.dtype for t in state.tracks} == {torch.float32}
    # a sampler with float32 tracks and the same outputs has the same bits
    name = next(n for n, pair in PAIRS.items() if cls in pair)
    direction = "sample" if cls in FORWARD else "invert"
    program = PAIRS[name][2](grid(10), direction=direction)
    left = iter(outputs)
    options = {"state": "float32", "model_dtype": dtype}
    expected = Sampler(lambda z, t: next(left), program, **options).run(sample.float())
    assert state.equal(expected)
    assert torch.equal(result, scheduler._run.shown(dtype))


@pytest.mark.parametrize("cls", CLASSES)
def test_no_step_reads_the_device(cls):
    # a meta tensor has no values, so a step that read one would raise
    scheduler = cls(**STABLE_DIFFUSION)
    for _ in range(2):
        scheduler.set_timesteps(5, device="meta")
        sample = torch.empty(2, 3, device="meta")
        for t in scheduler.timesteps:
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(torch.empty_like(sample), t, sample).prev_sample
        assert scheduler._run.finished and sample.device.type == "meta"


@pytest.mark.parametrize("cls", CLASSES)
def test_devices_and_shapes_within_a_run(cls):
    scheduler = make(cls)
    sample = normal(2, 3)
    times = scheduler.timesteps
    sample = scheduler.step(sample, times[0], sample).prev_sample
    for bad in (sample[:1], sample.double()):
        with pytest.raises(ValueError, match=r"sample must have the shape \[2, 3\] of the run"):
            scheduler.step(bad, times[1], bad)
    # the tracks follow the sample
    moved = sample.to("meta")
    result = scheduler.step(moved, times[1], moved).prev_sample
    assert result.device.type == "meta"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_gradients_and_modes(cls, mode):
    context = {
        "grad": nullcontext(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
    }[mode]
    sample = normal(2, 3, dtype=torch.float64)
    leaf = sample.clone().requires_grad_(mode == "grad")
    with context:
        result = loop(make(cls), leaf)
    assert torch.equal(result.detach(), loop(make(cls), sample))
    if mode != "grad":
        return
    result.sum().backward()
    # central differences in float64: error h² plus eps/h
    direction = normal(2, 3, seed=2, dtype=torch.float64)
    h = 1e-4
    with torch.no_grad():
        high, low = (loop(make(cls), sample + s * h * direction).sum() for s in (1, -1))
    slope = ((high - low) / (2 * h)).item()
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("cls", FORWARD)
def test_zero_snr(cls):
    # α = 0 at the first step
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = make(cls, **config, timestep_spacing="trailing")
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(6)
    sample = normal(2, 3)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    t = scheduler.timesteps[0]
    mine = scheduler.step(model(sample, t), t, sample)
    theirs = ddim.step(model(sample, t), t, sample)
    torch.testing.assert_close(mine.pred_original_sample, theirs.pred_original_sample)
    scheduler.set_timesteps(6)
    assert loop(scheduler, sample).isfinite().all()
