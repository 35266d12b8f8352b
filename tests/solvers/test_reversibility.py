"""A program followed by its inverse is the identity, whatever the schedule."""

from fractions import Fraction
from functools import partial
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import bdia, ddim, edict, mccallum_foster, obelm
from inpo_fast.solvers.integrators import IntegratorName
from tests.solvers.oracle import GaussianModel, MixtureModel, interpret, run, sample, start
from tests.solvers.strategies import SCALED_LINEAR, ZERO_SNR, reversible_programs

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

EPS = np.finfo(np.float64).eps
INTEGRATORS = get_args(IntegratorName)


def terms_size(program, model, states) -> float:
    """The largest magnitude, in units of z, of anything that an update adds up."""
    held, worst = list(program.start), 0.0
    for u, before, after in zip(program.updates, states, states[1:], strict=False):
        other = before[1 - u.track]
        terms = [after[u.track], u.b * other]
        outputs = []
        for stage in u.stages:
            point = sum((q * m for q, m in zip(stage.q, outputs, strict=True)), stage.p * other)
            outputs.append(model(point, stage.node))
            terms.append(stage.c * outputs[-1])
        held[u.track] = u.scale
        worst = max(worst, *(float(np.abs(t).max()) * held[u.track] for t in terms))
    return worst


@given(reversible_programs(), st.integers(0, 2**32 - 1))
@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_program_then_inverse_is_the_identity(case, seed):
    schedule, program = case
    inverse = program.inverse()
    # beyond 1/eps nothing of the start is left in float64
    assume(max(program.amplification, inverse.amplification) < 1e12)
    rng = np.random.default_rng(seed)
    model = GaussianModel(schedule, rng.normal(size=8), rng.uniform(0.3, 1.5, 8))
    z = rng.normal(size=8)

    states = list(interpret(program, model, start(program, z)))
    *_, back = interpret(inverse, model, list(states[-1]))
    error = np.abs(sample(inverse, back) - z).max()

    # An update adds at most three terms of size M, each multiplied by a rounded coefficient and
    # a rounded model output: at most 8 roundings of eps/2 · M, and as many on the way back, so
    # 8 eps M. An error made at some moment reaches the end multiplied by at most the amplification
    # (the solver's; the model of the Gaussian adds a factor near 1). The roundings of different
    # updates are independent and hardly add up: 1,000 random cases stayed below 1.5 eps M times
    # the amplification.
    size = max(terms_size(program, model, states), np.abs(z).max())
    bound = 8 * EPS * inverse.amplification * size
    note(f"{program.name}, {error=:.2g}, {bound=:.2g}")
    assert error <= bound


REVERSIBLE = {
    "obelm": obelm,
    "edict": edict,
    **{f"bdia-{name}": partial(bdia, gamma=0.9, integrator=name) for name in INTEGRATORS},
    **{
        f"mccallum-foster-{name}": partial(mccallum_foster, integrator=name) for name in INTEGRATORS
    },
}
GRIDS = {
    "epsilon": NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 10, steps_offset=1),
    "v": NoiseSchedule.from_alphas_cumprod(
        ZERO_SNR, 10, spacing="trailing", prediction_type="v_prediction"
    ),
    "edm": NoiseSchedule.edm(10, sigma_max=20),
    "flow": NoiseSchedule.flow(10, shift=3),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("solver", REVERSIBLE.values(), ids=REVERSIBLE)
@pytest.mark.parametrize("direction", ["sample", "invert"])
def test_round_trips_of_a_nonlinear_model(grid, solver, direction):
    program = solver(grid, direction=direction)
    inverse = program.inverse()
    weight, mean, std = np.array([0.4, 0.6]), np.array([-0.8, 0.9]), np.array([0.5, 0.4])
    model = MixtureModel(grid, weight, mean, std)
    z = np.random.default_rng(0).normal(size=16) * (grid.sigma[-1] if direction == "sample" else 1)
    states = list(interpret(program, model, start(program, z)))
    *_, back = interpret(inverse, model, list(states[-1]))
    error = np.abs(sample(inverse, back) - z).max()
    # as above, with one more term for each further stage, and 10 for the slope of the model, which
    # between two modes is not that of one Gaussian
    stages = max(len(u.stages) for u in program.updates)
    size = max(terms_size(program, model, states), np.abs(z).max())
    assert error <= 10 * (8 + 4 * stages) * EPS * inverse.amplification * size
    assert np.abs(sample(program, states[-1]) - z).max() > 0.1


@pytest.mark.parametrize("gamma", [Fraction(1), Fraction(15, 16)])
def test_every_number_of_steps_up_to_a_hundred(gamma):
    # what Hypothesis may leave out: no N is special
    for n in range(1, 101):
        schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, n)
        program = bdia(schedule, gamma=gamma, direction="invert")
        inverse = program.inverse()
        model = GaussianModel(schedule, np.array([0.3]), np.array([0.8]))
        z = np.array([1.7])
        back = run(inverse, model, list(run(program, model, start(program, z))))
        bound = 8 * EPS * program.amplification * inverse.amplification * 4
        assert abs(sample(inverse, back) - z).item() <= bound


def test_ddim_inversion_does_not_undo_ddim():
    # the baseline that the exact solvers are measured against: first order in the step
    errors = []
    for n in (25, 50, 100):
        schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, n)
        model = GaussianModel(schedule, np.array([0.4]), np.array([0.5]))
        z = np.array([0.9])
        up, down = ddim(schedule, direction="invert"), ddim(schedule)
        noise = sample(up, run(up, model, start(up, z)))
        errors.append(abs(sample(down, run(down, model, start(down, noise))) - z).item())
    assert errors[0] > 1e-2
    # halving the step halves the error, within the higher-order terms
    assert 1.5 < errors[0] / errors[1] < 2.5
    assert 1.5 < errors[1] / errors[2] < 2.5
