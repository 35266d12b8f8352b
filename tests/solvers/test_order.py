"""Observed order of convergence on a Gaussian, where the probability-flow ODE has a closed form."""

import numpy as np
import pytest

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import bdia, ddim, edict, obelm
from tests.solvers.oracle import GaussianModel, run, sample, start

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


def observed_order(grid, solver, direction) -> tuple[float, int]:
    """The fitted slope of the error at the end over N, and what the program states."""
    errors = []
    for n in STEPS:
        schedule = grid(n)
        program = solver(schedule, direction=direction)
        model = GaussianModel(schedule, MEAN, STD)
        first, last = (n, 0) if direction == "sample" else (0, n)
        end = run(program, model, start(program, model.solution(first, QUANTILE)))
        errors.append(np.linalg.norm(sample(program, end) - model.solution(last, QUANTILE)))
    slope, _ = np.polyfit(np.log(STEPS), np.log(errors), 1)
    return -slope, program.order


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
