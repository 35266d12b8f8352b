"""Noise schedules: grids, prediction types, and what diffusers' schedulers become."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo_fast.schedule import (
    NoiseSchedule,
    scaled_linear_alphas_cumprod,
    spaced_timesteps,
)
from inpo_fast.solvers import ddim

EPS = np.finfo(np.float64).eps
TABLE = scaled_linear_alphas_cumprod()

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

SPACINGS = ["leading", "trailing", "linspace"]


def ddim_scheduler(**options) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **options})


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# --- Timesteps --------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1000, 37])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers(spacing, offset, total):
    scheduler = ddim_scheduler(
        timestep_spacing=spacing, steps_offset=offset, num_train_timesteps=total
    )
    for n in range(1, total + 1):
        got = spaced_timesteps(total, n, spacing, offset)
        assert got.dtype == np.int64 and len(got) == n
        scheduler.set_timesteps(n)
        expected = scheduler.timesteps.numpy()[::-1]
        if spacing == "linspace" and n == 1:
            # numpy's linspace puts its only point at t = 0, where there is no noise
            assert expected.tolist() == [0] and got.tolist() == [total - 1]
        elif spacing == "leading" and expected[-1] >= total:
            # the offset leaves the table, and diffusers fails in its first step
            assert (n, offset) == (total, 1)
            assert got.tolist() == list(range(total))
        elif len(expected) == n + 1:
            # 0.1 + 0.1 + …: numpy's arange runs one stride too far, to the timestep −1
            assert (spacing, expected[0]) == ("trailing", -1)
            assert (got == expected[1:]).all()
        else:
            assert (got == expected).all()


def test_an_offset_that_does_not_fit_is_cut_to_the_table():
    # 50 steps of 20: from 0 … 980, so that 19 fits and no more
    assert spaced_timesteps(1000, 50, "leading", 19)[-1] == 999
    assert (spaced_timesteps(1000, 50, "leading", 30) == np.arange(50) * 20 + 19).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1000, 0, "leading"), ValueError, "num_steps must be at least 1, got 0"),
        ((1000, 1001, "leading"), ValueError, "num_steps must be at most the 1000 timesteps"),
        ((1000, 2.5, "leading"), TypeError, "num_steps must be an integer, got float"),
        ((1000, True, "leading"), TypeError, "num_steps must be an integer, got bool"),
        ((1000, 10, "even"), ValueError, "spacing must be one of .*, got 'even'"),
        ((1000, 10, "leading", -1), ValueError, "steps_offset must be at least 0, got -1"),
        ((1000, 10, "leading", 0.5), TypeError, "steps_offset must be an integer, got float"),
    ],
)
def test_wrong_grids(arguments, error, message):
    with pytest.raises(error, match=message):
        spaced_timesteps(*arguments)


@pytest.mark.parametrize("final", [1.0, TABLE[0]])
def test_explicit_timesteps(final):
    grid = [999, 700, 650, 3, 1]
    schedule = NoiseSchedule.from_alphas_cumprod(TABLE, timesteps=grid, final_alpha_cumprod=final)
    assert schedule.num_steps == 5
    assert schedule.timesteps.tolist() == [0, 1, 3, 650, 700, 999]
    bar = np.array([final, *TABLE[[1, 3, 650, 700, 999]]])
    assert (schedule.alpha == np.sqrt(bar)).all() and (schedule.sigma == np.sqrt(1 - bar)).all()
    # tensors and arrays are lists of integers too
    for same in (np.array(grid), torch.tensor(grid), [float(t) for t in grid]):
        other = NoiseSchedule.from_alphas_cumprod(TABLE, timesteps=same, final_alpha_cumprod=final)
        assert (other.tau == schedule.tau).all()


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "timesteps must be a non-empty list"),
        ([3, 2.5], "timesteps must be a non-empty list of integers"),
        ([[3, 2]], "timesteps must be a non-empty list"),
        ([1, 2], "timesteps must fall strictly within 0 … 999"),
        ([5, 5], "timesteps must fall strictly"),
        ([1000, 5], "timesteps must fall strictly"),
        ([5, -1], "timesteps must fall strictly"),
    ],
)
def test_wrong_explicit_timesteps(timesteps, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(TABLE, timesteps=timesteps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of num_steps and timesteps"),
        ({"num_steps": 3, "timesteps": [3, 2, 1]}, "give exactly one of num_steps and timesteps"),
        ({"num_steps": 3, "prediction_type": "noise"}, "prediction_type must be one of"),
        ({"num_steps": 3, "prediction_type": "edm"}, "edm prediction is defined for z = x"),
        ({"num_steps": 3, "final_alpha_cumprod": 0.5}, "noise must grow from node to node"),
    ],
)
def test_wrong_arguments_of_a_table(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(TABLE, **arguments)


@pytest.mark.parametrize("table", [[], [[0.9, 0.5]], [0.9, 1.1], [0.9, -0.1], [0.9, np.nan], 0.5])
def test_wrong_tables(table):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] with values in \[0, 1\]"):
        NoiseSchedule.from_alphas_cumprod(table, 1)


def test_epsilon_says_nothing_of_pure_noise():
    table = TABLE.copy()
    table[-1] = 0
    with pytest.raises(ValueError, match=r"epsilon prediction is undefined at node 4 \(alpha = 0"):
        NoiseSchedule.from_alphas_cumprod(table, 4, spacing="trailing")
    for kind in ("v_prediction", "sample", "flow"):
        schedule = NoiseSchedule.from_alphas_cumprod(
            table, 4, spacing="trailing", prediction_type=kind
        )
        assert schedule.velocity_form and schedule.tau[-1] == 1


# --- The schedule itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vq"}, "kind must be one of .*, got 'vq'"),
        ({"prediction_type": "x0"}, "prediction_type must be one of"),
        ({"sigma_data": 0}, "sigma_data must be positive, got 0"),
        ({"sigma_data": np.nan}, "sigma_data must be positive"),
        ({"alpha": [1.0, 0.8]}, r"must be \[N\+1\] with N >= 1, got shapes \(3,\), \(2,\)"),
        ({"alpha": [1.0], "sigma": [0.0], "timesteps": [0]}, r"must be \[N\+1\] with N >= 1"),
        ({"timesteps": [[0, 1, 2]]}, "got shapes"),
        ({"alpha": [1.0, np.nan, 0.0]}, "alpha and sigma must be finite"),
        ({"sigma": [0.0, -0.6, 1.0]}, "alpha and sigma must not be negative"),
        ({"sigma": [0.0, 0.7, 1.0]}, "a vp schedule needs alpha² [+] sigma² = 1 at every node"),
        ({"kind": "flow"}, "a flow schedule needs alpha [+] sigma = 1"),
        ({"kind": "ve"}, "a ve schedule needs alpha = 1"),
        (
            {"alpha": [0.8, 1.0, 0.6], "sigma": [0.6, 0.0, 0.8]},
            "noise must grow from node to node",
        ),
        (
            {"alpha": [1.0, 0.8, 0.8], "sigma": [0.0, 0.6, 0.6]},
            r"only the first step may be flat.*sigma/alpha = 0.7\d* at node 1 \(timestep 1\)",
        ),
        ({"timesteps": [0, np.nan, 2]}, "undefined at node 1"),
    ],
)
def test_a_schedule_checks_itself(fields, message):
    good = {
        "timesteps": [0, 1, 2],
        "alpha": [1.0, 0.8, 0.6],
        "sigma": [0.0, 0.6, 0.8],
    }
    NoiseSchedule(**good)
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**{**good, **fields})


def test_a_schedule_cannot_be_changed():
    alpha = np.array([1.0, 0.8])
    schedule = NoiseSchedule([0, 1], alpha, [0.0, 0.6])
    alpha[0] = 5
    assert schedule.alpha[0] == 1
    for name in ("timesteps", "alpha", "sigma", "scale", "tau", "field_z", "field_m"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(schedule, name)[0] = 0
    with pytest.raises(AttributeError):
        schedule.kind = "ve"


def test_the_first_step_may_have_no_length():
    # leading without offset and with final ᾱ_0: nodes 0 and 1 are both at t = 0
    schedule = NoiseSchedule.from_alphas_cumprod(TABLE, 10, final_alpha_cumprod=TABLE[0])
    assert schedule.tau[0] == schedule.tau[1]


def levels():
    yield NoiseSchedule.from_alphas_cumprod(TABLE, 9, steps_offset=1)
    yield NoiseSchedule.flow(9, shift=3)
    yield NoiseSchedule.edm(9, sigma_data=0.7)


@pytest.mark.parametrize("base", list(levels()), ids=lambda s: s.kind)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_the_field_of_a_known_pair(base, kind):
    """From z = α x + σ ε and the output's definition, F is ε, or ε − x in the velocity form."""
    if kind == "edm" and base.kind != "ve":
        with pytest.raises(ValueError, match="edm prediction is defined for"):
            NoiseSchedule(base.timesteps, base.alpha, base.sigma, base.kind, kind)
        return
    x, eps = 0.8, -1.7
    nodes = slice(1, None if kind != "epsilon" or base.kind != "flow" else -1)
    alpha, sigma = base.alpha[nodes], base.sigma[nodes]
    if kind == "epsilon" and base.kind == "flow":
        with pytest.raises(ValueError, match="undefined at node 9"):
            NoiseSchedule(base.timesteps, base.alpha, base.sigma, base.kind, kind)
        return
    timesteps = np.arange(10)
    schedule = NoiseSchedule(timesteps, base.alpha, base.sigma, base.kind, kind, base.sigma_data)
    z = alpha * x + sigma * eps
    data = base.sigma_data
    output = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x,
        "sample": x,
        "flow": eps - x,
        # Karras et al. 2022, eq. 7: D = c_skip z + c_out F
        "edm": (x - data**2 / (sigma**2 + data**2) * z)
        / (sigma * data / np.sqrt(sigma**2 + data**2)),
    }[kind]
    field = schedule.field_z[nodes] * z + schedule.field_m[nodes] * output
    expected = eps - x if schedule.velocity_form else eps
    # ε̂ = (z − α x̂)/σ where σ is small beside α
    np.testing.assert_allclose(field, expected, rtol=8 * EPS * (alpha / sigma).max())
    # and u = z/ℓ is x + τ ε, or (1−τ) x + τ ε
    u, tau = z / schedule.scale[nodes], schedule.tau[nodes]
    line = (1 - tau) * x + tau * eps if schedule.velocity_form else x + tau * eps
    np.testing.assert_allclose(u, line, rtol=1e-14, atol=1e-14)


def test_where_the_model_can_be_called():
    table = {"spacing": "trailing", "num_steps": 5}
    assert NoiseSchedule.from_alphas_cumprod(TABLE, **table).first_callable == 0
    clean = NoiseSchedule.from_alphas_cumprod(TABLE, **table, prediction_type="sample")
    assert clean.first_callable == 1
    noisy = NoiseSchedule.from_alphas_cumprod(
        TABLE, **table, prediction_type="sample", final_alpha_cumprod=TABLE[0]
    )
    assert noisy.first_callable == 0
    # ln 0 is no time to give to a network
    assert NoiseSchedule.edm(5).first_callable == 1
    assert NoiseSchedule.flow(5).first_callable == 0


# --- Analytic schedules -----------------------------------------------------------------------


@given(st.integers(1, 200), st.floats(1e-3, 1e3))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_flow(num_steps, shift):
    schedule = NoiseSchedule.flow(num_steps, shift=shift)
    s = np.arange(num_steps + 1) / num_steps
    expected = shift * s / (1 + (shift - 1) * s)
    np.testing.assert_allclose(schedule.sigma, expected, rtol=1e-12)
    assert (schedule.alpha == 1 - schedule.sigma).all()
    assert schedule.sigma[0] == 0
    np.testing.assert_allclose(schedule.sigma[-1], 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigma, rtol=1e-15)
    assert (schedule.kind, schedule.prediction_type) == ("flow", "flow")
    assert (schedule.scale == 1).all() and not schedule.discrete


def test_edm():
    schedule = NoiseSchedule.edm(18)
    i = np.arange(18)
    # eq. 5 of Karras et al. 2022 counts from the noise end
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule.sigma[1:], expected[::-1], rtol=1e-12)
    assert schedule.sigma[0] == 0 and (schedule.alpha == 1).all()
    np.testing.assert_allclose(schedule.timesteps[1:], np.log(schedule.sigma[1:]) / 4, rtol=1e-15)
    c_in = 1 / np.sqrt(schedule.sigma**2 + 0.25)
    np.testing.assert_allclose(schedule.input_scale, c_in, rtol=1e-15)
    assert NoiseSchedule.edm(1).sigma.tolist() == [0, pytest.approx(80)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseSchedule.flow(0), ValueError, "num_steps must be at least 1"),
        (lambda: NoiseSchedule.flow(2.0), TypeError, "num_steps must be an integer"),
        (lambda: NoiseSchedule.flow(5, shift=0), ValueError, "shift must be positive, got 0"),
        (lambda: NoiseSchedule.flow(5, shift=np.inf), ValueError, "shift must be positive"),
        (lambda: NoiseSchedule.flow(5, shift=np.nan), ValueError, "shift must be positive"),
        (lambda: NoiseSchedule.edm(0), ValueError, "num_steps must be at least 1"),
        (lambda: NoiseSchedule.edm(5, sigma_min=0), ValueError, "need 0 < sigma_min"),
        (lambda: NoiseSchedule.edm(5, sigma_min=2, sigma_max=1), ValueError, "need 0 < sigma_min"),
        (lambda: NoiseSchedule.edm(5, rho=-1), ValueError, "rho > 0"),
        (lambda: NoiseSchedule.edm(5, sigma_data=-1), ValueError, "sigma_data must be positive"),
    ],
)
def test_wrong_analytic_schedules(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_scaled_linear_table():
    table = ddim_scheduler().alphas_cumprod.double().numpy()
    # diffusers multiplies a thousand float32 factors
    np.testing.assert_allclose(TABLE, table, rtol=1000 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [7, 10, 30, 50, 999, 1000])
@pytest.mark.parametrize("final", [1.0, TABLE[0]])
def test_a_constant_epsilon_comes_back(spacing, offset, num_steps, final):
    """Where ε̂ does not depend on z, DDIM is exact, and inversion and sampling undo each other."""
    schedule = NoiseSchedule.from_alphas_cumprod(
        TABLE, num_steps, spacing=spacing, steps_offset=offset, final_alpha_cumprod=final
    )
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(2, 8))
    ends = {}
    for direction in ("invert", "sample"):
        z = ends.get("invert", schedule.alpha[0] * x + schedule.sigma[0] * eps)
        for update in ddim(schedule, direction=direction).updates:
            z = update.b * z + update.c * eps
        ends[direction] = z
    noisy = schedule.alpha[-1] * x + schedule.sigma[-1] * eps
    np.testing.assert_allclose(ends["invert"], noisy, atol=1e-12)
    clean = schedule.alpha[0] * x + schedule.sigma[0] * eps
    np.testing.assert_allclose(ends["sample"], clean, atol=1e-12)


# --- diffusers --------------------------------------------------------------------------------


SCHEDULERS = [
    ddim_scheduler(),
    ddim_scheduler(steps_offset=1, set_alpha_to_one=False),
    ddim_scheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
    ddim_scheduler(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    ddim_scheduler(timestep_spacing="linspace", prediction_type="sample"),
    diffusers.PNDMScheduler(**STABLE_DIFFUSION, steps_offset=1, skip_prk_steps=True),
    diffusers.PNDMScheduler(**STABLE_DIFFUSION, set_alpha_to_one=True),
    diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION),
    diffusers.DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION),
    diffusers.EulerDiscreteScheduler(
        **STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1
    ),
    diffusers.EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"),
    diffusers.DDPMScheduler(**STABLE_DIFFUSION, clip_sample=False),
]


def scheduler_id(scheduler) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=scheduler_id)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_a_scheduler_becomes_the_grid_of_ddim_with_its_options(scheduler, num_steps):
    config = scheduler.config
    schedule = NoiseSchedule.from_diffusers(scheduler, num_steps)
    bar = scheduler.alphas_cumprod.double().numpy()
    # from_config would replace the default spacing of one class by that of the other
    twin = diffusers.DDIMScheduler.from_config(config, timestep_spacing=config.timestep_spacing)
    twin.set_timesteps(num_steps)
    if config.timestep_spacing == "linspace" and num_steps == 1:
        times = [999]
    else:
        times = twin.timesteps.tolist()[::-1]
    assert schedule.timesteps.tolist() == [0, *times]
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    levels = np.array([float(final), *bar[times]])
    # the float32 ᾱ exactly, and everything after it in float64
    assert (schedule.alpha == np.sqrt(levels)).all()
    assert (schedule.sigma == np.sqrt(1 - levels)).all()
    assert schedule.kind == "vp" and schedule.discrete
    assert schedule.prediction_type == config.prediction_type


def test_explicit_timesteps_of_a_scheduler():
    schedule = NoiseSchedule.from_diffusers(ddim_scheduler(), timesteps=[900, 500, 20])
    assert schedule.timesteps.tolist() == [0, 20, 500, 900]


def flow_schedulers():
    make = diffusers.FlowMatchEulerDiscreteScheduler
    yield make(), None
    yield make(shift=3.0), None
    yield make(use_dynamic_shifting=True), 0.8
    yield make(use_dynamic_shifting=True, time_shift_type="linear"), 1.5
    yield make(shift_terminal=0.1), None
    yield make(use_karras_sigmas=True), None


@pytest.mark.parametrize(("scheduler", "mu"), list(flow_schedulers()))
@pytest.mark.parametrize("num_steps", [2, 4, 28])
def test_a_flow_matching_scheduler(scheduler, mu, num_steps):
    schedule = NoiseSchedule.from_diffusers(scheduler, num_steps, mu=mu)
    twin = type(scheduler).from_config(scheduler.config)
    twin.set_timesteps(num_steps, mu=mu)
    assert (schedule.sigma == twin.sigmas.double().numpy()[::-1]).all()
    assert (schedule.alpha == 1 - schedule.sigma).all()
    # as the model is given them, in float32
    times = schedule.timesteps[1:].astype(np.float32)[::-1]
    assert (times == twin.timesteps.numpy()).all()
    assert schedule.kind == schedule.prediction_type == "flow"


def test_a_flow_scheduler_whose_float32_begins_above_1():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.32)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0] > 1
    schedule = NoiseSchedule.from_diffusers(scheduler, 4)
    assert (schedule.sigma[-1], schedule.alpha[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_schedule_of_the_paper_and_diffusers_ends_elsewhere(shift):
    """With sigmas s = i/N, shifted once: what pipelines pass as `sigmas`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28).tolist())
    expected = scheduler.sigmas.double().numpy()[::-1]
    got = NoiseSchedule.flow(28, shift=shift).sigma
    np.testing.assert_allclose(got, expected, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    "scheduler", [*SCHEDULERS, *(s for s, mu in flow_schedulers() if mu is None)], ids=scheduler_id
)
def test_the_scheduler_is_left_as_it_was(scheduler):
    def contents(s):
        return {k: copy.deepcopy(v) for k, v in vars(s).items() if k != "_internal_dict"}

    scheduler.set_timesteps(5)
    before, config = contents(scheduler), dict(scheduler.config)
    NoiseSchedule.from_diffusers(scheduler, 7)
    after = contents(scheduler)
    assert dict(scheduler.config) == config and before.keys() == after.keys()
    for name, value in before.items():
        same = (
            torch.equal(value, after[name])
            if isinstance(value, torch.Tensor)
            else np.array_equal(value, after[name])
        )
        assert same, name


@pytest.mark.parametrize(
    ("scheduler", "arguments", "error", "message"),
    [
        (object(), {"num_inference_steps": 5}, TypeError, "must be a diffusers scheduler, got obj"),
        (
            diffusers.EDMEulerScheduler(),
            {"num_inference_steps": 5},
            ValueError,
            "must define alphas_cumprod or be a flow-matching scheduler, got EDMEulerScheduler",
        ),
        (ddim_scheduler(), {}, ValueError, "give exactly one of num_steps and timesteps"),
        (
            ddim_scheduler(),
            {"num_inference_steps": 2, "timesteps": [3, 2]},
            ValueError,
            "give exactly one",
        ),
        (ddim_scheduler(), {"num_inference_steps": 1001}, ValueError, "num_steps must be at most"),
        (
            ddim_scheduler(),
            {"num_inference_steps": 5, "mu": 0.5},
            ValueError,
            "mu needs a scheduler with use_dynamic_shifting, got DDIMScheduler",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"num_inference_steps": 5, "mu": 0.5},
            ValueError,
            "mu needs a scheduler with use_dynamic_shifting",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            {"num_inference_steps": 5},
            ValueError,
            "a scheduler with use_dynamic_shifting needs mu",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"timesteps": [3, 2]},
            ValueError,
            "a flow-matching schedule takes sigmas, not timesteps",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"num_inference_steps": 5, "sigmas": [1.0, 0.5]},
            ValueError,
            "needs exactly one of num_inference_steps and sigmas",
        ),
        (ddim_scheduler(), {"sigmas": [1.0, 0.5]}, ValueError, "sigmas needs a flow-matching"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            {"num_inference_steps": 5},
            ValueError,
            "must have stochastic_sampling=False",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            {"num_inference_steps": 5},
            ValueError,
            "must have invert_sigmas=False",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"num_inference_steps": 0},
            ValueError,
            "num_steps must be at least 1",
        ),
    ],
)
def test_wrong_schedulers(scheduler, arguments, error, message):
    with pytest.raises(error, match=message):
        NoiseSchedule.from_diffusers(scheduler, **arguments)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=False"):
        NoiseSchedule.from_diffusers(ddim_scheduler(**{option: True}), 10)


# --- Levels between the nodes -------------------------------------------------------------------


def between() -> dict[str, NoiseSchedule]:
    table = scaled_linear_alphas_cumprod()
    angle = np.linspace(0.1, 1.4, 7)
    return {
        "table": NoiseSchedule.from_alphas_cumprod(table, 6, steps_offset=1),
        "flow": NoiseSchedule.flow(6, shift=3),
        "edm": NoiseSchedule.edm(6),
        "by-hand": NoiseSchedule(angle, np.cos(angle), np.sin(angle)),
    }


@pytest.mark.parametrize("schedule", between().values(), ids=between())
def test_a_midpoint_is_a_node_of_a_finer_grid(schedule):
    """Everything but the time of a table follows from α and σ, as at a node."""
    for i in range(schedule.num_steps):
        if not np.isfinite(schedule.log_snr[i : i + 2]).all():
            with pytest.raises(ValueError, match="between levels of infinite log"):
                schedule.point(i + 0.5)
            continue
        ends, middle = [schedule.point(i), schedule.point(i + 1)], schedule.point(i + 0.5)
        log_snr = [np.log(p.alpha / p.sigma) for p in (*ends, middle)]
        assert log_snr[2] == pytest.approx((log_snr[0] + log_snr[1]) / 2, rel=1e-12, abs=1e-12)
        finer = NoiseSchedule(
            [p.timestep for p in (ends[0], middle, ends[1])],
            [p.alpha for p in (ends[0], middle, ends[1])],
            [p.sigma for p in (ends[0], middle, ends[1])],
            schedule.kind,
            schedule.prediction_type,
            schedule.sigma_data,
        )
        # kinds by their constraint, times between, and all that is derived
        np.testing.assert_allclose(middle, finer.point(1), rtol=1e-12)
        assert ends[0].timestep < middle.timestep < ends[1].timestep


def test_points_at_nodes_are_the_arrays():
    schedule = between()["edm"]
    for node in range(1, 7):
        point = schedule.point(node)
        assert point.timestep == schedule.timesteps[node]
        for name in point._fields[1:]:
            assert getattr(point, name) == getattr(schedule, name)[node]


@pytest.mark.parametrize("node", [-1, -0.5, 7, 6.5, 2.25])
def test_no_such_point(node):
    with pytest.raises(ValueError, match="node must be in 0 … 6 or halfway between two nodes"):
        between()["edm"].point(node)


def test_the_time_of_a_midpoint():
    schedules = between()
    for i in range(1, 6):
        # exact where time is a function of the level
        point = schedules["edm"].point(i + 0.5)
        assert point.timestep == pytest.approx(np.log(point.sigma) / 4, abs=1e-14)
    for i in range(1, 5):
        point = schedules["flow"].point(i + 0.5)
        assert point.timestep == pytest.approx(1000 * point.sigma, rel=1e-14)
        # by the table: between the entries that enclose it
        point = schedules["table"].point(i + 0.5)
        bar = scaled_linear_alphas_cumprod()
        low = int(point.timestep)
        assert bar[low] >= point.alpha**2 >= bar[low + 1] and point.timestep != low


def test_the_time_of_a_midpoint_without_a_table_is_right_to_second_order():
    errors = []
    for n in (32, 64, 128):
        angle = np.linspace(0.1, 1.4, n + 1)
        schedule = NoiseSchedule(angle, np.cos(angle), np.sin(angle))
        points = [schedule.point(i + 0.5) for i in range(n)]
        errors.append(max(abs(p.timestep - np.arctan2(p.sigma, p.alpha)) for p in points))
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_the_clean_part_of_a_grid():
    whole = NoiseSchedule.from_diffusers(ddim_scheduler(), 10)
    part = whole.fraction(0.8)
    assert part.timesteps.tolist() == whole.timesteps[:9].tolist()
    assert part.alpha.tolist() == whole.alpha[:9].tolist()
    assert part.kind == whole.kind and part.prediction_type == whole.prediction_type
    assert whole.fraction(0.01).num_steps == 1
    assert whole.fraction(1).fingerprint == whole.fingerprint != part.fingerprint
    assert whole.cleanest(8).fingerprint == part.fingerprint
    for strength in (0, 1.5, "half"):
        with pytest.raises(ValueError, match=r"strength must be in \(0, 1\]"):
            whole.fraction(strength)
    with pytest.raises(ValueError, match="at most the 10 of the grid, got 11"):
        whole.cleanest(11)
    with pytest.raises(ValueError, match="at least 1"):
        whole.cleanest(0)


def test_a_fingerprint_is_of_the_grid_and_of_the_prediction_type():
    grids = [
        NoiseSchedule.from_diffusers(ddim_scheduler(), 10),
        NoiseSchedule.from_diffusers(ddim_scheduler(), 11),
        NoiseSchedule.from_diffusers(ddim_scheduler(prediction_type="v_prediction"), 10),
        NoiseSchedule.from_diffusers(ddim_scheduler(beta_end=0.02), 10),
        NoiseSchedule.flow(10),
    ]
    assert len({grid.fingerprint for grid in grids}) == len(grids)
    again = NoiseSchedule.from_diffusers(ddim_scheduler(), 10)
    assert again.fingerprint == grids[0].fingerprint


def test_a_scheduler_must_say_what_the_model_predicts():
    class Silent:
        config = type("Config", (), {})()
        alphas_cumprod = ddim_scheduler().alphas_cumprod

    for scheduler, found in (
        (Silent(), "None"),
        (ddim_scheduler(prediction_type="flow_prediction"), "'flow_prediction'"),
    ):
        with pytest.raises(ValueError, match=f"model was trained with.* got {found}"):
            NoiseSchedule.from_diffusers(scheduler, 10)
