"""Whole runs against diffusers' DDIMScheduler and the papers' recurrences, on a nonlinear model."""

import diffusers
import numpy as np
import pytest
import torch

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import bdia, ddim, edict, obelm
from tests.solvers.oracle import interpret, raw_output, run, sample, start
from tests.solvers.strategies import SCALED_LINEAR

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def nonlinear(size: int = 16, seed: int = 0):
    """m(z, t): a random smooth network, about as large as its input."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, size, size)) / size**0.5
    phase = rng.normal(size=size)

    def model(z, t):
        return second @ np.tanh(first @ z + np.cos(phase * t / 100)) + 0.3 * z

    return model


def by_node(schedule, model):
    return lambda z, node: model(z, schedule.timesteps[node])


def diffusers_trajectory(scheduler, model, z, num_steps) -> list[np.ndarray]:
    """DDIMScheduler.step over its own timesteps, in float64 from its float32 tables.

    `step` finds the level to go to by subtracting T // num_inference_steps from t, which is not the
    next timestep of a linspace grid nor of a trailing one where N does not divide T. Such steps are
    given the num_inference_steps with the right stride, so that the formula is compared on the
    scheduler's own grid.
    """
    scheduler.set_timesteps(num_steps)
    times = [int(t) for t in scheduler.timesteps]
    total = scheduler.config.num_train_timesteps
    trajectory = [z]
    for t, following in zip(times, [*times[1:], None], strict=True):
        # the last step goes below 0: that is, to the final ᾱ
        stride = t + 1 if following is None else t - following
        fits = [n for n in range(1, total + 1) if total // n == stride]
        if following is None and not fits:
            fits = [n for n in range(1, total + 1) if total // n > t]
        scheduler.num_inference_steps = fits[0]
        sample = torch.from_numpy(trajectory[-1])
        output = torch.from_numpy(model(trajectory[-1], t))
        trajectory.append(scheduler.step(output, t, sample).prev_sample.numpy())
    return trajectory


GRIDS = [
    ("leading", 50, 0),
    ("leading", 50, 1),
    ("leading", 7, 1),
    ("leading", 30, 0),
    ("leading", 999, 1),
    ("trailing", 50, 0),
    ("trailing", 30, 0),
    ("trailing", 1000, 0),
    ("linspace", 50, 0),
    ("linspace", 10, 1),
    ("linspace", 1000, 0),
]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "num_steps", "offset"), GRIDS)
def test_ddim_equals_diffusers(spacing, num_steps, offset, to_one, kind):
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        prediction_type=kind,
    )
    check_against_diffusers(scheduler, num_steps)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_ddim_equals_diffusers_at_zero_snr(num_steps, kind):
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type=kind,
    )
    assert scheduler.alphas_cumprod[-1] == 0
    check_against_diffusers(scheduler, num_steps)


def check_against_diffusers(scheduler, num_steps):
    schedule = NoiseSchedule.from_diffusers(scheduler, num_steps)
    model = nonlinear()
    z = np.random.default_rng(1).normal(size=16)
    expected = diffusers_trajectory(scheduler, model, z, num_steps)
    program = ddim(schedule)
    states = list(interpret(program, by_node(schedule, model), start(program, z)))
    got = [z] + [s[u.track] for u, s in zip(program.updates, states[1:], strict=True)]
    error = max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True))
    # diffusers rounds α, σ and their quotients to float32, a few eps of the state in a step. For
    # ε and x the errors of neighbouring steps cancel (they share α and σ). For v they do not:
    # α² + σ² is 1 only within eps/2, and as v stands for x̂ and ε̂ at once, every step multiplies
    # the state by it.
    steps = num_steps / 2 if schedule.prediction_type == "v_prediction" else 0
    size = max(np.abs(b).max() for b in expected)
    assert error <= (4 + steps) * np.finfo(np.float32).eps * size


def estimates(schedule, model, z, i):
    """x̂ and ε̂ at node i of an ε- or v-predicting model, by the definitions."""
    alpha, sigma = schedule.alpha[i], schedule.sigma[i]
    output = model(z, schedule.timesteps[i])
    if schedule.prediction_type == "epsilon":
        return (z - sigma * output) / alpha, output
    return alpha * z - sigma * output, sigma * z + alpha * output


def ddim_step(schedule, model, z, i, j):
    x, eps = estimates(schedule, model, z, i)
    return schedule.alpha[j] * x + schedule.sigma[j] * eps


def bdia_by_hand(schedule, model, z, gamma, direction):
    """Zhang et al. 2024, sampling and inversion equations, as printed."""
    n, alpha, sigma = schedule.num_steps, schedule.alpha, schedule.sigma
    nodes = {}
    if direction == "sample":
        nodes[n] = z
        nodes[n - 1] = ddim_step(schedule, model, z, n, n - 1)
        for i in range(n - 1, 0, -1):
            x, eps = estimates(schedule, model, nodes[i], i)
            nodes[i - 1] = (
                gamma * nodes[i + 1]
                - gamma * (alpha[i + 1] * x + sigma[i + 1] * eps)
                + (alpha[i - 1] * x + sigma[i - 1] * eps)
            )
        return nodes[0], nodes[1]
    nodes[0] = z
    nodes[1] = ddim_step(schedule, model, z, 0, 1)
    for i in range(1, n):
        x, eps = estimates(schedule, model, nodes[i], i)
        nodes[i + 1] = (
            nodes[i - 1] / gamma
            - (alpha[i - 1] * x + sigma[i - 1] * eps) / gamma
            + (alpha[i + 1] * x + sigma[i + 1] * eps)
        )
    return nodes[n], nodes[n - 1]


def obelm_by_hand(schedule, model, z, ratio, direction):
    """Wang et al. 2024, eq. 18 and 19; `ratio(i)` is h_i²/h_{i+1}²."""
    n, alpha = schedule.num_steps, schedule.alpha
    bar_sigma = schedule.sigma / alpha
    h = [None, *np.diff(bar_sigma)]
    nodes = {}
    if direction == "sample":
        nodes[n] = z
        nodes[n - 1] = ddim_step(schedule, model, z, n, n - 1)
        for i in range(n - 1, 0, -1):
            _, eps = estimates(schedule, model, nodes[i], i)
            a = ratio(i)
            nodes[i - 1] = (
                a * alpha[i - 1] / alpha[i + 1] * nodes[i + 1]
                + (1 - a) * alpha[i - 1] / alpha[i] * nodes[i]
                - (h[i] + a * h[i + 1]) * alpha[i - 1] * eps
            )
        return nodes[0], nodes[1]
    nodes[0] = z
    nodes[1] = ddim_step(schedule, model, z, 0, 1)
    for i in range(1, n):
        _, eps = estimates(schedule, model, nodes[i], i)
        a = ratio(i)
        nodes[i + 1] = (
            1 / a * alpha[i + 1] / alpha[i - 1] * nodes[i - 1]
            + (1 - 1 / a) * alpha[i + 1] / alpha[i] * nodes[i]
            + (h[i] / a + h[i + 1]) * alpha[i + 1] * eps
        )
    return nodes[n], nodes[n - 1]


def edict_by_hand(schedule, model, z, p, direction):
    """Wallace et al. 2023, eq. 14 and 15, the order of the two tracks alternating."""
    n, alpha, sigma = schedule.num_steps, schedule.alpha, schedule.sigma

    def predict(i, y):
        return estimates(schedule, model, y, i)[1]

    def coefficients(i):
        a = alpha[i - 1] / alpha[i]
        return a, sigma[i - 1] - a * sigma[i]

    pair = [z, z]
    if direction == "sample":
        for i in range(n, 0, -1):
            a, b = coefficients(i)
            first = (n - i) % 2
            for j in (first, 1 - first):
                pair[j] = a * pair[j] + b * predict(i, pair[1 - j])
            pair[0] = p * pair[0] + (1 - p) * pair[1]
            pair[1] = p * pair[1] + (1 - p) * pair[0]
        return tuple(pair)
    for i in range(1, n + 1):
        a, b = coefficients(i)
        first = (n - i) % 2
        pair[1] = (pair[1] - (1 - p) * pair[0]) / p
        pair[0] = (pair[0] - (1 - p) * pair[1]) / p
        for j in (1 - first, first):
            pair[j] = (pair[j] - b * predict(i, pair[1 - j])) / a
    return tuple(pair)


def both_ends(program, schedule, model, z):
    """z on the output track and on the other one."""
    tracks = run(program, by_node(schedule, model), start(program, z))
    j = program.output
    return tracks[j] * program.end[j], tracks[1 - j] * program.end[1 - j]


def assert_close(got, expected, program):
    # both are float64 evaluations of one recurrence in different order: they part by roundings,
    # which grow like any other error of the state, and by the Lipschitz constant of the model,
    # some tens over these runs
    size = max(np.abs(e).max() for e in expected)
    bound = 1e3 * np.finfo(np.float64).eps * program.amplification * size
    for a, b in zip(got, expected, strict=True):
        assert np.abs(a - b).max() <= bound


@pytest.fixture(params=["epsilon", "v_prediction"])
def schedule(request):
    return NoiseSchedule.from_alphas_cumprod(
        SCALED_LINEAR, 20, steps_offset=1, prediction_type=request.param
    )


Z = np.random.default_rng(2).normal(size=16)


@pytest.mark.parametrize("direction", ["sample", "invert"])
@pytest.mark.parametrize("gamma", [1, 0.94, 0.5])
def test_bdia_equals_the_papers_recurrence(schedule, gamma, direction):
    program, model = bdia(schedule, gamma=gamma, direction=direction), nonlinear()
    expected = bdia_by_hand(schedule, model, Z, gamma, direction)
    assert_close(both_ends(program, schedule, model, Z), expected, program)


@pytest.mark.parametrize("direction", ["sample", "invert"])
def test_obelm_equals_the_papers_recurrence(schedule, direction):
    program, model = obelm(schedule, direction=direction), nonlinear()
    # the rounded ratio is a property of the lattice; that it is close is tested with the table
    ratios = {u.node: float(u.a) for u in program.updates[1:]}
    expected = obelm_by_hand(schedule, model, Z, ratios.__getitem__, direction)
    assert_close(both_ends(program, schedule, model, Z), expected, program)


@pytest.mark.parametrize("direction", ["sample", "invert"])
def test_obelm_hardly_feels_the_rounding_of_its_ratio(schedule, direction):
    program, model = obelm(schedule, direction=direction), nonlinear()
    h = np.diff(schedule.sigma / schedule.alpha)
    expected = obelm_by_hand(schedule, model, Z, lambda i: (h[i - 1] / h[i]) ** 2, direction)
    got = both_ends(program, schedule, model, Z)
    # continued fractions with terms up to 2^16 leave some 2^-32; this is a step's error times
    # what becomes of it, far below the truncation error of any grid in use
    assert np.abs(got[0] - expected[0]).max() <= 2.0**-28 * program.amplification


@pytest.mark.parametrize("direction", ["sample", "invert"])
@pytest.mark.parametrize("p", [0.93, 0.75, 1])
def test_edict_equals_the_papers_recurrence(schedule, p, direction):
    program, model = edict(schedule, p=p, direction=direction), nonlinear()
    expected = edict_by_hand(schedule, model, Z, p, direction)
    assert_close(both_ends(program, schedule, model, Z), expected, program)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_prediction_type_of_one_model_gives_one_trajectory(kind):
    # the same x̂ and ε̂ told in four languages
    def schedule_of(prediction_type):
        return NoiseSchedule.from_alphas_cumprod(
            SCALED_LINEAR, 20, spacing="trailing", prediction_type=prediction_type
        )

    base, network = schedule_of(kind), nonlinear()
    ends = {}
    for other in ("epsilon", "v_prediction", "sample", "flow"):
        schedule = schedule_of(other)

        def told(z, node, schedule=schedule):
            x, eps = estimates(base, network, z, node)
            return raw_output(schedule, node, z, x, eps)

        for solver in (ddim, bdia, edict, obelm):
            program = solver(schedule)
            end = sample(program, run(program, told, start(program, Z)))
            reference = ends.setdefault(solver, end)
            # roundings of x̂ and ε̂, some eps/α, carried through a smooth model
            assert np.abs(end - reference).max() <= 1e-11 * np.abs(reference).max()
