"""Whole runs against diffusers' DDIMScheduler and the papers' recurrences, on a nonlinear model."""

import diffusers
import numpy as np
import pytest
import torch

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
from inpo_fast.solvers.one_step import Step, step_update
from inpo_fast.solvers.program import Stages
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


# --- diffusers' other schedulers ----------------------------------------------------------------

FLOAT32 = np.finfo(np.float32).eps


def diffusers_run(scheduler, model, z, scale=lambda z, sigma: z) -> np.ndarray:
    """A whole run of a scheduler in float64 beside its float32 tables, the end."""
    sample = torch.from_numpy(z)
    for index, t in enumerate(scheduler.timesteps):
        seen = scale(sample, float(scheduler.sigmas[index]))
        output = torch.from_numpy(model(seen.numpy(), float(t)))
        sample = scheduler.step(output, t, sample).prev_sample
    return sample.double().numpy()


def program_run(program, schedule, model, z) -> np.ndarray:
    return sample(program, run(program, by_node(schedule, model), start(program, z)))


FLOWS = {
    "plain": ({}, {}),
    "shift": ({"shift": 3.0}, {}),
    "dynamic": ({"use_dynamic_shifting": True}, {"mu": 1.15}),
    "terminal": ({"shift_terminal": 0.1, "use_dynamic_shifting": True}, {"mu": 0.8}),
    "sigmas": ({"shift": 2.0}, {"sigmas": np.linspace(1, 1 / 12, 12).tolist()}),
    "karras": ({"use_karras_sigmas": True}, {}),
}


@pytest.mark.parametrize(("config", "options"), FLOWS.values(), ids=FLOWS)
def test_euler_equals_diffusers_on_a_rectified_flow(config, options):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    count = () if "sigmas" in options else (12,)
    schedule = NoiseSchedule.from_diffusers(scheduler, *count, **options)
    scheduler.set_timesteps(*count, device="cpu", **options)
    np.testing.assert_array_equal(schedule.sigma[::-1], scheduler.sigmas.double().numpy())
    z = np.random.default_rng(1).normal(size=16)
    expected = diffusers_run(scheduler, nonlinear(), z)
    program = ddim(schedule)
    states = list(interpret(program, by_node(schedule, nonlinear()), start(program, z)))
    size = max(np.abs(t).max() for state in states for t in state if t is not None)
    # `step` computes in float32: a rounding of the state and of the time a step, carried by a
    # smooth model
    assert np.abs(sample(program, states[-1]) - expected).max() <= 4 * 12 * FLOAT32 * size
    for solver in (bdia, obelm, edict, mccallum_foster):
        end = program_run(solver(schedule), schedule, nonlinear(), z)
        # other solvers of the same equation: near by, with 12 steps
        assert 1e-6 < np.abs(end - expected).max() < 2.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heun_equals_diffusers(kind):
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )
    scheduler.set_timesteps(10)
    times = [round(float(t)) for t in scheduler.timesteps[1::2]]
    times = [round(float(scheduler.timesteps[0])), *times]
    table = scheduler.alphas_cumprod.double().numpy()
    schedule = NoiseSchedule.from_alphas_cumprod(table, timesteps=times, prediction_type=kind)
    program = heun(schedule)
    assert len(scheduler.timesteps) == program.model_calls == 19
    z = np.random.default_rng(1).normal(size=16)
    # k-diffusion's unit, z/α, which the model sees multiplied by α
    expected = diffusers_run(
        scheduler, nonlinear(), z / schedule.alpha[-1], lambda z, sigma: z / np.hypot(1, sigma)
    )
    got = program_run(program, schedule, nonlinear(), z)
    # float32 tables of σ, up to 15 times z
    assert np.abs(got - expected).max() <= 50 * FLOAT32 * np.abs(z / schedule.alpha[-1]).max()


def coarse_step(schedule, i: int, j: int) -> Step:
    """DPM-Solver++(2S) over the two intervals between the nodes i and j, through the one between
    them, which is not the midpoint: θ = τ_s/(2 r τ_i)."""
    s = (i + j) // 2
    tau, log_snr = schedule.tau, schedule.log_snr
    r = (log_snr[s] - log_snr[i]) / (log_snr[j] - log_snr[i])
    theta, h = tau[s] / (2 * r * tau[i]), tau[j] - tau[i]
    return Step(Stages((i, s), ((), (tau[s] - tau[i],))), ((1 - theta) * h, theta * h))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_dpmpp_2s_equals_diffusers(kind):
    """diffusers takes its second evaluation at the next node of the grid: laid out so that this is
    the midpoint in λ, its step is ours; on its own grid it is our formula with its r."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    table = scheduler.alphas_cumprod.double().numpy()
    z = np.random.default_rng(1).normal(size=16)

    def their_pair(sigmas, times):
        scheduler.set_timesteps(10)
        scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        scheduler.timesteps = torch.tensor(times)
        scheduler.order_list = [1, 2]
        return diffusers_run(scheduler, nonlinear(), z)

    # single steps between two nodes, with the midpoint where `NoiseSchedule.point` has it
    schedule = NoiseSchedule.from_alphas_cumprod(
        table, timesteps=[900, 600, 250, 20], prediction_type=kind
    )
    program = dpmpp_2s(schedule)
    for i in (4, 3, 2):
        points = [schedule.point(node) for node in (i, i - 0.5, i - 1)]
        times = [float(point.timestep) for point in points[:2]]
        expected = their_pair([float(p.sigma / p.alpha) for p in points], times)
        update = program.updates[4 - i]
        first, second = update.stages
        model = nonlinear()
        outputs = [model(first.p * z, times[0])]
        outputs.append(model(second.p * z + second.q[0] * outputs[0], times[1]))
        got = update.b * z + first.c * outputs[0] + second.c * outputs[1]
        assert np.abs(got - expected).max() <= 40 * FLOAT32 * np.abs(z).max()

    # a step over two intervals of the grid, whatever r is
    points = [schedule.point(node) for node in (4, 3, 2)]
    expected = their_pair([float(p.sigma / p.alpha) for p in points], [900, 600])
    update = step_update(schedule, coarse_step, 4, 2)
    model = nonlinear()
    outputs = [model(z, 900)]
    second = update.stages[1]
    outputs.append(model(second.p * z + second.q[0] * outputs[0], 600))
    got = update.b * z + update.c * outputs[0] + second.c * outputs[1]
    assert np.abs(got - expected).max() <= 40 * FLOAT32 * np.abs(z).max()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("count", [8, 25])
def test_dpmpp_2m_equals_diffusers(kind, final, count):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type=final,
    )
    scheduler.set_timesteps(count)
    table = scheduler.alphas_cumprod.double().numpy()
    schedule = NoiseSchedule.from_alphas_cumprod(
        table,
        timesteps=scheduler.timesteps.tolist(),
        prediction_type=kind,
        final_alpha_cumprod=1.0 if final == "zero" else table[0],
    )
    z = np.random.default_rng(1).normal(size=16)
    expected = diffusers_run(scheduler, nonlinear(), z)
    program = dpmpp_2m(schedule)
    assert program.model_calls == count
    got = program_run(program, schedule, nonlinear(), z)
    # float32 tables of λ, whose differences the coefficients are made of, and x̂ up to z/α
    size = np.abs(z / schedule.alpha[-1]).max()
    assert np.abs(got - expected).max() <= 50 * FLOAT32 * size
