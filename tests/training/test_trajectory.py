"""Trajectories against the solvers' programs, against recurrences by hand, and as a trainer drives
them."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast import NoiseSchedule, Sampler, bdia, ddim
from inpo_fast.schedule import scaled_linear_alphas_cumprod
from inpo_fast.training import (
    SOURCES,
    bdia_inversion_path,
    ddim_inversion_path,
    noising,
    q_sample,
    renoise_inversion_path,
)
from inpo_fast.training.trajectory import bdia_rows, ddim_rows

TABLE = scaled_linear_alphas_cumprod()
SCHEDULES = {
    "epsilon": NoiseSchedule.from_alphas_cumprod(TABLE, 1000),
    "v_prediction": NoiseSchedule.from_alphas_cumprod(TABLE, 1000, prediction_type="v_prediction"),
    "flow": NoiseSchedule.flow(1000, shift=3.0),
}
EPS = torch.finfo(torch.float32).eps
SHAPE = (3, 4, 5, 2)
GRID = np.array([[0, 40, 300], [6, 260, 620], [10, 700, 800], [31, 998, 999]])  # [4, 3]
kinds = pytest.mark.parametrize("kind", SCHEDULES)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """Smooth, nonlinear, different at every time, the same bits for any batch."""
    y = x + x.roll(1, -1) / 2 + (t / 500).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return y / (1 + y * y) + x / 2


def part(schedule, grid):
    """The schedule of one sample's grid: clean data and the levels that it visits."""
    nodes = [0, *(t + 1 for t in grid)]
    return NoiseSchedule(
        timesteps=schedule.timesteps[nodes],
        alpha=schedule.alpha[nodes],
        sigma=schedule.sigma[nodes],
        kind=schedule.kind,
        prediction_type=schedule.prediction_type,
    )


@kinds
def test_tables_are_those_of_the_solvers(kind):
    schedule = SCHEDULES[kind]
    nodes = np.concatenate([np.zeros_like(GRID[:1]), GRID + 1])
    plain, deviation = ddim_rows(schedule, nodes, 0.0)
    assert (deviation == 0).all()
    for i, grid in enumerate(GRID.T):
        program = ddim(part(schedule, grid), direction="invert").coefficients()
        # the same float64 numbers in another order; a step is a difference of levels, hence the
        # absolute part
        np.testing.assert_allclose(plain[:, i], program, rtol=1e-12, atol=1e-14)
        for gamma in (1.0, 0.9375):
            program = bdia(part(schedule, grid), gamma=gamma, direction="invert").coefficients()
            rows = bdia_rows(schedule, nodes, gamma)
            np.testing.assert_allclose(rows[:, i], program[1:], rtol=1e-12, atol=1e-14)


def calls_and_points(path, model=network):
    """Every call of a path and its training samples, driven as a trainer does."""
    calls, points = [], []
    for call in path:
        calls.append(call)
        if call.target is not None:
            points.append(call)
        path.give(model(call.latents, call.timesteps))
    return calls, points


@kinds
@pytest.mark.parametrize("gamma", [1.0, 0.9375])
def test_bdia_is_the_solver_in_float64(kind, gamma):
    schedule, clean = SCHEDULES[kind], normal(0)
    path = bdia_inversion_path(clean, GRID, schedule, gamma=gamma)
    calls, (point,) = calls_and_points(path)
    assert len(calls) == 5 and [call.target is None for call in calls] == [True] * 4 + [False]
    for i, grid in enumerate(GRID.T):
        program = bdia(part(schedule, grid), gamma=gamma, direction="invert")
        sampler = Sampler(network, program, state="float64", model_dtype=torch.float64)
        exact = sampler.run(clean[i : i + 1].double()).sample()[0]
        # as in test_latents: four roundings a step, carried along by the network's slope and by
        # the solver's own amplification
        size = max(exact.abs().max().item(), clean.abs().max().item())
        error = 4 * 4 * EPS * size * 8 * program.amplification
        assert (point.latents[i].double() - exact).abs().max() <= error
    check_target(point, clean, schedule, GRID[-1])


def check_target(point, clean, schedule, timesteps):
    """τ is what a perfect model returns at x_t = α x_0 + σ ε: it leads back to x_0 and to x_t."""
    shape = (-1, 1, 1, 1)
    alpha = torch.from_numpy(schedule.alpha[np.asarray(timesteps) + 1]).view(shape)
    sigma = torch.from_numpy(schedule.sigma[np.asarray(timesteps) + 1]).view(shape)
    z, x, target = point.latents.double(), clean.double(), point.target.double()
    noise = (z - alpha * x) / sigma
    expected = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x,
        "flow": noise - x,
    }[schedule.prediction_type]
    # two coefficients of size 1/σ and the sum, each rounded to float32
    error = 4 * EPS * (z.abs() + x.abs() + 1) / sigma
    assert ((target - expected).abs() <= error).all()
    assert point.timesteps.tolist() == pytest.approx(
        schedule.timesteps[np.asarray(timesteps) + 1].tolist(), rel=EPS
    )
    assert point.timesteps.dtype == (torch.int64 if schedule.discrete else torch.float32)


def step_by_hand(schedule, x, output, i, j):
    """α_j x̂ + σ_j ε̂ in float64 from the model's output at node i."""
    a, s = schedule.alpha[i], schedule.sigma[i]
    if schedule.prediction_type == "epsilon":
        data, noise = (x - s * output) / a, output
    elif schedule.prediction_type == "v_prediction":
        data, noise = a * x - s * output, s * x + a * output
    else:
        data, noise = x - s * output, x + a * output
    return schedule.alpha[j] * data + schedule.sigma[j] * noise


@kinds
def test_renoise_averages_two_calls_at_one_timestep(kind):
    schedule, clean = SCHEDULES[kind], normal(0)
    calls, (point,) = calls_and_points(renoise_inversion_path(clean, GRID, schedule))
    # two a step, both at the time where the step starts, and the training sample
    assert len(calls) == 9
    for first, second in zip(calls[0:8:2], calls[1:8:2], strict=True):
        assert torch.equal(first.timesteps, second.timesteps)
        assert not torch.equal(first.latents, second.latents)
    for i, grid in enumerate(GRID.T):
        nodes = [0, *(t + 1 for t in grid)]
        x = clean[i : i + 1].double()
        for k in range(4):
            a, b = nodes[k], nodes[k + 1]
            time = torch.tensor([schedule.timesteps[a]])
            first = network(x, time)
            second = network(step_by_hand(schedule, x, first, a, b), time)
            x = step_by_hand(schedule, x, (first + second) / 2, a, b)
        # as for DDIM with one more rounding a step, and the network applied twice
        size = max(x.abs().max().item(), clean.abs().max().item())
        assert (point.latents[i].double() - x[0]).abs().max() <= 5 * 4 * EPS * size * 16
    check_target(point, clean, schedule, GRID[-1])


@kinds
def test_noise_of_eta_keeps_the_level(kind):
    schedule = SCHEDULES[kind]
    nodes = np.concatenate([np.zeros_like(GRID[:1]), GRID + 1])
    i, j = nodes[:-1], nodes[1:]
    a, s = schedule.alpha, schedule.sigma
    for eta in (0.1, 1.0):
        rows, deviation = ddim_rows(schedule, nodes, eta)
        if schedule.kind == "vp":
            # η² (1−ᾱ_i)/(1−ᾱ_j) (1 − ᾱ_j/ᾱ_i), the generative posterior's
            bar_i, bar_j = a[i] ** 2, a[j] ** 2
            variance = eta**2 * (1 - bar_i) / (1 - bar_j) * (1 - bar_j / bar_i)
            np.testing.assert_allclose(deviation**2, variance, rtol=1e-9, atol=1e-15)
        # a step from z = α x + σ ε̂ with a perfect model: what multiplies ε̂ shrinks so that the
        # variances add up to σ_j²
        m_of_noise = {"epsilon": np.ones_like(a[i]), "v_prediction": a[i], "flow": 1}[kind]
        kept = rows[..., 1] * s[i] + rows[..., 2] * m_of_noise
        np.testing.assert_allclose(kept**2 + deviation**2, s[j] ** 2, rtol=1e-9)
        # and x keeps its own coefficient
        m_of_data = {"epsilon": 0, "v_prediction": -s[i], "flow": -1}[kind]
        data = rows[..., 1] * a[i] + rows[..., 2] * m_of_data
        np.testing.assert_allclose(data, a[j], rtol=1e-9)


def test_noise_of_eta_leaves_a_perfect_model_its_target():
    schedule = SCHEDULES["epsilon"]
    clean = torch.zeros(3, 4, 40, 40)
    start = normal(5, clean.shape)

    def perfect(x, t):
        # all data is at 0, so ε̂ = z/σ; at σ = 0, where x is 0 too, any noise will do
        sigma = torch.from_numpy(schedule.sigma[t + 1]).float().view(-1, 1, 1, 1)
        return torch.where(x == 0, start, x / sigma)

    path = ddim_inversion_path(
        clean, GRID, schedule, eta=1.0, generator=torch.Generator().manual_seed(1)
    )
    (point,) = path.run(perfect)
    # τ has variance 1 at every level: 6400 numbers a sample, five standard errors
    spread = point.target.flatten(1).std(1)
    assert ((spread - 1).abs() <= 5 / (2 * 6400) ** 0.5).all()


@pytest.mark.parametrize("make", [ddim_inversion_path, renoise_inversion_path])
def test_noise_of_eta_comes_from_the_generator(make):
    schedule, clean = SCHEDULES["epsilon"], normal(0)

    def run(eta, seed):
        generator = torch.Generator().manual_seed(seed)
        return make(clean, GRID, schedule, eta=eta, generator=generator).run(network)[0].latents

    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert torch.equal(run(0.0, 1), run(0.0, 2))


@kinds
@pytest.mark.parametrize("source", ["ddim", "bdia", "renoise"])
def test_every_visited_level_is_the_end_of_a_path_of_its_own(kind, source):
    """Reuse gives the training samples of separate inversions, to the bit."""
    schedule, clean = SCHEDULES[kind], normal(0)
    calls, points = calls_and_points(SOURCES[source](clean, GRID, schedule, train_at=(4, 1, 3)))
    assert len(points) == 3 and calls[-1].last and not any(call.last for call in calls[:-1])
    for node, point in zip((1, 3, 4), points, strict=True):
        alone = SOURCES[source](clean, GRID[:node], schedule).run(network)[-1]
        assert torch.equal(point.latents, alone.latents)
        assert torch.equal(point.target, alone.target)
        assert torch.equal(point.timesteps, alone.timesteps)
        check_target(point, clean, schedule, GRID[node - 1])
    # the forwards of the training are calls of the path: no more than one path to the end needs
    expected = 9 if source == "renoise" else 5
    assert len(calls) == expected
    # steps after the last training sample are not run
    short, _ = calls_and_points(SOURCES[source](clean, GRID, schedule, train_at=[2]))
    assert len(short) == (5 if source == "renoise" else 3)


def test_the_training_forward_is_the_inversions_call():
    """The output with gradient goes into the loss, its value into the next step."""
    schedule, clean = SCHEDULES["epsilon"], normal(0)
    weight = torch.tensor(0.7, requires_grad=True)
    path = ddim_inversion_path(clean, GRID, schedule, train_at=(2, 3, 4))
    losses = 0.0
    for call in path:
        assert not call.latents.requires_grad
        with torch.set_grad_enabled(call.target is not None):
            output = weight * network(call.latents, call.timesteps)
        if call.target is not None:
            losses = losses + (output - call.target).square().mean()
        if not call.last:
            path.give(output)
    losses.backward()
    # only the direct dependence: x_t and τ are constants, as if from three paths
    expected = 0.0
    for node in (2, 3, 4):
        (point,) = ddim_inversion_path(clean, GRID[:node], schedule).run(
            lambda x, t: 0.7 * network(x, t)
        )
        raw = network(point.latents, point.timesteps)
        expected += (2 * raw * (0.7 * raw - point.target)).mean().item()
    assert weight.grad.item() == pytest.approx(expected, rel=1e-5)


def test_an_output_is_read_when_it_is_given():
    """A compiled model may overwrite its output at the next call."""
    schedule, clean = SCHEDULES["epsilon"], normal(0)
    buffer = torch.empty_like(clean)

    def fresh(x, t):
        return network(x, t).float()

    def reusing(x, t):
        return buffer.copy_(fresh(x, t))

    for source in ("ddim", "bdia", "renoise", "official"):
        options = {"generator": torch.Generator().manual_seed(0)}
        (expected,) = SOURCES[source](clean, GRID, schedule, **options).run(fresh)
        options = {"generator": torch.Generator().manual_seed(0)}
        (got,) = SOURCES[source](clean, GRID, schedule, **options).run(reusing)
        assert torch.equal(got.latents, expected.latents), source


@kinds
def test_noising_is_q_sample_with_shared_noise(kind):
    schedule, clean = SCHEDULES[kind], normal(0, (4, 4, 5, 2))
    grid = np.tile(GRID[:, :2], 2)
    path = noising(
        clean, grid, schedule, train_at=(2, 4), generator=torch.Generator().manual_seed(7)
    )
    points = path.run(network)
    generator = torch.Generator().manual_seed(7)
    for node, point in zip((2, 4), points, strict=True):
        noise = torch.randn(2, 4, 5, 2, generator=generator).repeat(2, 1, 1, 1)
        expected = q_sample(clean, noise, grid[node - 1], schedule)
        assert torch.equal(point.latents, expected.latents)
        assert torch.equal(point.target, expected.target)
        check_target(point, clean, schedule, grid[node - 1])
    own = noising(clean[:3], GRID, schedule, shared=False, generator=torch.Generator())
    assert own.run(network)[0].latents.shape == (3, 4, 5, 2)
    with pytest.raises(ValueError, match=r"clean must be \[2P, …\] for shared noise, got \(3, 4"):
        noising(clean[:3], GRID, schedule)


def test_a_pair_has_its_noise_whatever_else_the_batch_holds():
    schedule, clean = SCHEDULES["epsilon"], normal(0, (6, 4, 5, 2))
    grid = np.tile(GRID, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    for source, options in (("q_sample", {}), ("ddim", {"eta": 0.5}), ("official", {})):
        for generator, seed in zip(generators, (1, 2, 3), strict=True):
            generator.manual_seed(seed)
        (batch,) = SOURCES[source](clean, grid, schedule, generator=generators, **options).run(
            network
        )
        if source == "official":
            continue  # its depth is that of the first sample
        rows = [1, 4]
        own = [torch.Generator().manual_seed(2)]
        (alone,) = SOURCES[source](
            clean[rows], grid[:, rows], schedule, generator=own, **options
        ).run(network)
        assert torch.equal(batch.latents[rows], alone.latents)


def test_a_forgotten_output():
    path = ddim_inversion_path(normal(0), GRID, SCHEDULES["epsilon"])
    with pytest.raises(RuntimeError, match="give the output of a call before asking for the next"):
        for _ in path:
            pass
    # the last call needs none, and then nothing is left
    path = ddim_inversion_path(normal(0), GRID[:1], SCHEDULES["epsilon"])
    for call in path:
        if not call.last:
            path.give(network(call.latents, call.timesteps))
    assert list(path) == []


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a device: a Python number, or a shape that depends on data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_nothing_waits_for_the_device(source, form):
    clean = normal(0, (6, 4, 5, 2))
    grid = form(np.tile(GRID, 2).tolist())
    generator = torch.Generator().manual_seed(0)
    with NoSynchronisation():
        calls, points = calls_and_points(
            SOURCES[source](clean, grid, SCHEDULES["epsilon"], generator=generator)
        )
    assert len(points) == 1 and calls[-1].last


def test_no_loop_over_the_batch():
    """The same number of tensor operations whatever the size of the batch."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += 1
            return function(*args, **(kwargs or {}))

    for source in SOURCES:
        numbers = []
        for size in (2, 128):
            grid = np.tile(GRID[:, :2], size // 2)
            clean = torch.zeros(size, 1)
            with Count() as count:
                calls_and_points(SOURCES[source](clean, grid, SCHEDULES["epsilon"]), network)
            numbers.append(count.number)
        assert numbers[0] == numbers[1], source


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grid": GRID[0]},
            ValueError,
            r"grid must be \[n, B\] with n ≥ 1 steps, got shape \(3,\)",
        ),
        (
            {"grid": GRID[:, :2]},
            ValueError,
            r"grid must have one entry a sample, 3, got shape \(4,",
        ),
        ({"grid": GRID[::-1]}, ValueError, "grid must rise from node to node for every sample"),
        ({"grid": GRID + 1}, ValueError, "grid must be integers in 0 … 999"),
        ({"grid": GRID / 2}, ValueError, "grid must be integers in 0 … 999"),
        ({"train_at": ()}, ValueError, r"train_at must be different nodes in 1 … 4, got \(\)"),
        ({"train_at": (1, 1)}, ValueError, "train_at must be different nodes in 1 … 4"),
        ({"train_at": (0, 4)}, ValueError, "train_at must be different nodes in 1 … 4"),
        ({"train_at": (5,)}, ValueError, "train_at must be different nodes in 1 … 4"),
        ({"schedule": TABLE}, TypeError, "schedule must be a NoiseSchedule, got ndarray"),
        ({"clean": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "clean must be a floating t"),
        (
            {"schedule": NoiseSchedule.from_alphas_cumprod(TABLE, 1000, prediction_type="sample")},
            ValueError,
            "prediction_type must be epsilon, v_prediction or flow, got 'sample'",
        ),
        (
            {"grid": torch.zeros(4, 3, dtype=torch.int64, device="meta")},
            ValueError,
            "grid must be on the host, so that nothing waits for the device, got a tensor on meta",
        ),
    ],
)
@pytest.mark.parametrize("make", [ddim_inversion_path, bdia_inversion_path, renoise_inversion_path])
def test_wrong_arguments(make, change, error, message):
    arguments = {"clean": normal(0), "grid": GRID, "schedule": SCHEDULES["epsilon"], **change}
    with pytest.raises(error, match=message):
        make(**arguments)


def test_wrong_options():
    arguments = (normal(0), GRID, SCHEDULES["epsilon"])
    for make in (ddim_inversion_path, renoise_inversion_path):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
            make(*arguments, eta=1.5)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\], got 0"):
        bdia_inversion_path(*arguments, gamma=0)
