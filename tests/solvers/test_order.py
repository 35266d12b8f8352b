"""Observed order of convergence where the probability-flow ODE has a closed form: Gaussian data,
whose model is affine, and a mixture of Gaussians, whose model is not."""

from functools import partial

import numpy as np
import pytest

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import (
    bdia,
    ddim,
    dpmpp_2m,
    dpmpp_2s,
    edict,
    heun,
    mccallum_foster,
    obelm,
)
from tests.solvers.oracle import GaussianModel, MixtureModel, run, sample, start

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

STEPS = [32, 64, 128, 256, 512]

# data of several means, widths and quantiles: no accidental zero of one error decides
MEAN, STD, QUANTILE = (
    a.ravel() for a in np.meshgrid([-1.0, 0.7], [0.4, 0.8, 1.3], [-1.5, 0.2, 1.1])
)


def cosine(num_steps: int) -> NoiseSchedule:
    """A grid that is a smooth function of i/N, α = cos, σ = sin, up to an SNR of 0.025."""
    angle = np.linspace(0, 0.9, num_steps + 1) * np.pi / 2
    return NoiseSchedule(angle, np.cos(angle), np.sin(angle))


def cosine_to_zero_snr(num_steps: int) -> NoiseSchedule:
    angle = np.linspace(0, 1, num_steps + 1) * np.pi / 2
    alpha, sigma = np.cos(angle), np.sin(angle)
    alpha[-1] = 0
    return NoiseSchedule(angle, alpha, sigma, prediction_type="v_prediction")


GRIDS = [cosine, cosine_to_zero_snr, NoiseSchedule.flow]


def even_in_log_snr(num_steps: int) -> NoiseSchedule:
    """Equal steps of λ = ln(α/σ) from 4 to −3."""
    log_snr = np.linspace(4, -3, num_steps + 1)
    norm = np.hypot(1, np.exp(-log_snr))
    return NoiseSchedule(-log_snr, 1 / norm, np.exp(-log_snr) / norm)


def observed_order(grid, solver, direction, steps=STEPS) -> tuple[float, int]:
    """The fitted slope of the error at the end over N, and what the program states."""
    errors = []
    for n in steps:
        schedule = grid(n)
        program = solver(schedule, direction=direction)
        model = GaussianModel(schedule, MEAN, STD)
        first, last = (n, 0) if direction == "sample" else (0, n)
        end = run(program, model, start(program, model.solution(first, QUANTILE)))
        errors.append(np.linalg.norm(sample(program, end) - model.solution(last, QUANTILE)))
    return slope(steps, errors), program.order


def slope(steps, errors) -> float:
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize("solver", [ddim, obelm, edict], ids=lambda s: s.__name__)
def test_sampling_converges_at_the_stated_order(grid, solver):
    order, stated = observed_order(grid, solver, "sample")
    assert stated == {ddim: 1, obelm: 2, edict: 1}[solver]
    assert abs(order - stated) < 0.25


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize(("gamma", "expected"), [(1, 2), (0.5, 1)])
def test_bdia_converges_at_least_at_the_stated_order(grid, gamma, expected):
    # γ = 1 is a midpoint rule wherever neighbouring steps are nearly equal; the program states
    # what holds on every grid
    order, stated = observed_order(grid, lambda s, **k: bdia(s, gamma=gamma, **k), "sample")
    assert stated == 1
    assert abs(order - expected) < 0.25


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
def test_bdia_is_first_order_on_a_jagged_grid(grid):
    # every second node moved by a third of a step: the midpoint rule is lost, the order is not
    def jagged(n):
        schedule = grid(3 * n)
        nodes = np.sort(np.concatenate([np.arange(0, 3 * n + 1, 6), np.arange(2, 3 * n, 6)]))
        return NoiseSchedule(
            schedule.timesteps[nodes],
            schedule.alpha[nodes],
            schedule.sigma[nodes],
            schedule.kind,
            schedule.prediction_type,
        )

    order, _ = observed_order(jagged, lambda s, **k: bdia(s, gamma=0.9, **k), "sample")
    assert order > 0.75


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize(
    ("solver", "expected"), [(ddim, 1), (bdia, 2), (obelm, 2)], ids=["ddim", "bdia", "obelm"]
)
def test_inversion_converges_where_it_does_not_amplify(grid, solver, expected):
    # γ < 1 and p < 1 magnify rounding and truncation errors by γ^−N and p^−2N instead
    order, _ = observed_order(grid, solver, "invert")
    assert abs(order - expected) < 0.25


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
def test_the_oracle_solves_the_ode(grid):
    # du/dτ = F along the closed form, by central differences on a fine grid
    schedule = grid(2000)
    model = GaussianModel(schedule, MEAN, STD)
    nodes = np.arange(100, 1900, 150)
    for i in nodes:
        z = [model.solution(j, QUANTILE) for j in (i - 1, i, i + 1)]
        u = [value / schedule.scale[j] for value, j in zip(z, (i - 1, i, i + 1), strict=True)]
        below, above = np.diff(schedule.tau[i - 1 : i + 2])
        # second order for unequal steps
        slope = ((u[2] - u[1]) * below / above + (u[1] - u[0]) * above / below) / (below + above)
        field = schedule.field_z[i] * z[1] + schedule.field_m[i] * model(z[1], i)
        np.testing.assert_allclose(slope, field, atol=2e-5 * np.abs(field).max())


# --- Integrators of higher order and what is built on them -------------------------------------

SHORT = [32, 64, 128, 256]
WITH_EDM = [*GRIDS, NoiseSchedule.edm]

ONE_STEP = {
    "heun": heun,
    "dpm++2s": dpmpp_2s,
    "bdia-heun": partial(bdia, integrator="heun"),
    "bdia-heun-.5": partial(bdia, integrator="heun", gamma=0.5),
    "bdia-2s": partial(bdia, integrator="dpm++2s"),
    "bdia-2s-.5": partial(bdia, integrator="dpm++2s", gamma=0.5),
    "mccallum-foster-2s": partial(mccallum_foster, integrator="dpm++2s"),
}
COUPLED = {
    "mccallum-foster": mccallum_foster,
    "mccallum-foster-heun": partial(mccallum_foster, integrator="heun"),
}


@pytest.mark.parametrize("grid", WITH_EDM, ids=lambda g: g.__name__)
@pytest.mark.parametrize("solver", ONE_STEP.values(), ids=ONE_STEP)
def test_second_order_solvers(grid, solver):
    order, stated = observed_order(grid, solver, "sample", SHORT)
    assert stated == 2
    assert abs(order - stated) < 0.25


@pytest.mark.parametrize("grid", WITH_EDM, ids=lambda g: g.__name__)
@pytest.mark.parametrize("solver", COUPLED.values(), ids=COUPLED)
def test_mccallum_foster_keeps_the_order_of_its_integrator(grid, solver):
    # at least: where steps are long the two tracks part, and how far falls faster than the error
    order, stated = observed_order(grid, solver, "sample", SHORT)
    assert stated == (1 if solver is mccallum_foster else 2)
    assert order > stated - 0.25


def dpmpp_2m_sampling(schedule, direction):
    assert direction == "sample"
    return dpmpp_2m(schedule)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [(even_in_log_snr, 2), (NoiseSchedule.edm, 2), (cosine, 1.5), (NoiseSchedule.flow, 1.5)],
    ids=["even", "edm", "cosine", "flow"],
)
def test_dpmpp_2m(grid, expected):
    # A multistep method in λ: on grids whose last steps do not get short in λ (σ falls to 0 in even
    # steps) it is of second order on most of the grid and of first order at its end.
    order, stated = observed_order(grid, dpmpp_2m_sampling, "sample", SHORT)
    assert stated == 2
    assert abs(order - expected) < 0.25


MIXTURE = (np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.7, 1.5]), np.array([0.4, 0.5, 0.3]))
PLACES = np.array([-2.0, -1.1, -0.4, 0.1, 0.6, 1.3, 2.1])


@pytest.fixture(scope="module")
def mixture():
    """By grid and N: the model, where its sample starts and where the ODE takes it."""
    cases = {}
    for grid in (cosine, even_in_log_snr, NoiseSchedule.flow, NoiseSchedule.edm):
        for n in SHORT:
            schedule = grid(n)
            model = MixtureModel(schedule, *MIXTURE)
            z = PLACES * np.hypot(schedule.alpha[-1], schedule.sigma[-1])
            cases[grid, n] = model, z, model.solution(n, 0, z)
    return cases


@pytest.mark.parametrize(
    "grid", [cosine, NoiseSchedule.flow, NoiseSchedule.edm], ids=["cosine", "flow", "edm"]
)
@pytest.mark.parametrize(
    "solver",
    [*ONE_STEP.values(), *COUPLED.values(), ddim, obelm],
    ids=[*ONE_STEP, *COUPLED, "ddim", "obelm"],
)
def test_orders_on_a_mixture(mixture, grid, solver):
    errors = []
    for n in SHORT:
        model, z, end = mixture[grid, n]
        program = solver(model.schedule)
        got = sample(program, run(program, model, start(program, z)))
        errors.append(np.linalg.norm(got - end))
    order = slope(SHORT, errors)
    # the nonlinear model is further from its limit at these N
    assert order > program.order - 0.3
    if solver not in COUPLED.values():
        assert order < program.order + 0.3


def test_dpmpp_2m_on_a_mixture(mixture):
    errors = []
    for n in SHORT:
        model, z, end = mixture[even_in_log_snr, n]
        program = dpmpp_2m(model.schedule)
        got = sample(program, run(program, model, start(program, z)))
        errors.append(np.linalg.norm(got - end))
    assert abs(slope(SHORT, errors) - 2) < 0.25


def test_the_mixture_solves_the_ode(mixture):
    """Its closed form against Heun's method over 256 steps, and its model against finite
    differences of the log density."""
    model, z, end = mixture[NoiseSchedule.flow, 256]
    program = heun(model.schedule)
    assert np.abs(sample(program, run(program, model, start(program, z))) - end).max() < 1e-4

    schedule = cosine(8)
    weight, mean, std = MIXTURE
    alpha, sigma = schedule.alpha[5], schedule.sigma[5]

    def log_density(z):
        variance = alpha**2 * std**2 + sigma**2
        parts = (
            weight / np.sqrt(variance) * np.exp(-((z[:, None] - alpha * mean) ** 2) / 2 / variance)
        )
        return np.log(parts.sum(axis=1))

    score = (log_density(PLACES + 1e-5) - log_density(PLACES - 1e-5)) / 2e-5
    noise = MixtureModel(schedule, *MIXTURE)(PLACES, 5)
    np.testing.assert_allclose(noise, -sigma * score, rtol=1e-8)
