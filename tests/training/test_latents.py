"""Noisy latents for training, against their definitions in float64."""

import numpy as np
import pytest
import torch

from inpo_fast import NoiseSchedule
from inpo_fast.schedule import scaled_linear_alphas_cumprod
from inpo_fast.training import ddim_inversion, inversion_depth, q_sample

TABLE = scaled_linear_alphas_cumprod()
VP = {
    kind: NoiseSchedule.from_alphas_cumprod(TABLE, len(TABLE), prediction_type=kind)
    for kind in ("epsilon", "v_prediction")
}
SCHEDULE = VP["epsilon"]
SHAPE = (3, 4, 5, 2)
EPS = torch.finfo(torch.float32).eps


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """Smooth, nonlinear, different at every time, the same bits for any batch."""
    y = x + x.roll(1, -1) / 2 + (t / 500).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return y / (1 + y * y) + x / 2


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, x, t):
        self.calls.append((x.dtype, t.dtype, tuple(t.shape), t.tolist()))
        return network(x, t)


def levels(timesteps):
    bar = torch.from_numpy(TABLE[list(timesteps)]).reshape(-1, 1, 1, 1)
    return bar.sqrt(), (1 - bar).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_q_sample(kind):
    clean, noise, timesteps = normal(0), normal(1), [0, 420, 999]
    got = q_sample(clean, noise, timesteps, VP[kind])
    alpha, sigma = levels(timesteps)
    x, eps = clean.double(), noise.double()
    latents = alpha * x + sigma * eps
    target = eps if kind == "epsilon" else alpha * eps - sigma * x
    for value, exact in ((got.latents, latents), (got.target, target)):
        assert value.dtype == torch.float32
        # α and σ rounded once, two products and a sum: 5 roundings of eps/2 of the larger term
        assert (value.double() - exact).abs().max() <= 2.5 * EPS * max(
            x.abs().max(), eps.abs().max()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_q_sample_computes_in_float32(dtype):
    clean, noise = normal(0).to(dtype), normal(1).to(dtype)
    got = q_sample(clean, noise, [5, 50, 500], SCHEDULE)
    expected = q_sample(clean.float(), noise.float(), [5, 50, 500], SCHEDULE)
    assert torch.equal(got.latents, expected.latents) and got.latents.dtype == torch.float32
    assert torch.equal(got.target, expected.target) and got.target.dtype == torch.float32


def inversion_by_hand(clean, t, num_steps, kind):
    """x̄_j = x̄_i + (σ̄_j − σ̄_i) ε(x_i, i) with x̄ = x/α from x̄ = x_0 to t, in float64."""
    # level t is the (t+1)-th of the table, and clean data the 0-th
    grid = [0, *(round((t + 1) * k / num_steps) - 1 for k in range(1, num_steps + 1))]
    bar = [1.0, *TABLE[grid[1:]]]
    x = clean.double()
    for i in range(num_steps):
        alpha, sigma = np.sqrt(bar[i]), np.sqrt(1 - bar[i])
        following = np.sqrt(bar[i + 1]), np.sqrt(1 - bar[i + 1])
        output = network(x, torch.full((len(x),), grid[i], dtype=torch.int64))
        eps = output if kind == "epsilon" else sigma * x + alpha * output
        x = following[0] * (x / alpha + (following[1] / following[0] - sigma / alpha) * eps)
    return x


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_ddim_inversion(kind, num_steps, impl):
    clean, timesteps = normal(0), [10, 437, 999]
    got = ddim_inversion(network, clean, timesteps, VP[kind], num_steps=num_steps, impl=impl)
    assert got.latents.dtype == got.target.dtype == torch.float32
    for i, t in enumerate(timesteps):
        exact = inversion_by_hand(clean[i : i + 1], t, num_steps, kind)
        # a step rounds its coefficients, the model's output and the sum, 4 eps of the state in
        # all; the network's slope of at most 2 carries it along, ∫ dσ̄ α < 2.7 in u = x/α
        size = max(exact.abs().max().item(), clean.abs().max().item())
        error = 4 * num_steps * EPS * size * 4
        assert (got.latents[i].double() - exact[0]).abs().max() <= error
        alpha, sigma = (value.item() for value in levels([t]))
        x = clean[i].double()
        noise = (exact[0] - alpha * x) / sigma
        target = noise if kind == "epsilon" else alpha * noise - sigma * x
        # τ = (x_t − α x_0)/σ divides the error of x_t
        assert (got.target[i].double() - target).abs().max() <= error / sigma


@pytest.mark.parametrize("timestep", [0, 1, 7, 100, 101, 777, 999])
def test_the_grid_starts_clean_and_ends_at_t(timestep):
    for num_steps in {1, min(2, timestep + 1), inversion_depth(timestep), min(10, timestep + 1)}:
        recorder = Recorder()
        got = ddim_inversion(recorder, normal(0), [timestep] * 3, SCHEDULE, num_steps=num_steps)
        assert len(recorder.calls) == num_steps
        times = [call[3] for call in recorder.calls]
        assert times[0] == [0, 0, 0]
        nodes = [round((timestep + 1) * k / num_steps) for k in range(num_steps)]
        expected = [max(node - 1, 0) for node in nodes]
        assert times == [[t] * 3 for t in expected]
        # never before the data, never the end itself, no level twice
        assert nodes == sorted(set(nodes)) and nodes[-1] < timestep + 1
        assert {call[:3] for call in recorder.calls} == {(torch.float32, torch.int64, (3,))}
        # the level is that of t: the target says how far x_t is from α_t x_0
        alpha, sigma = levels([timestep] * 3)
        back = alpha * normal(0).double() + sigma * got.target.double()
        assert (back - got.latents.double()).abs().max() <= 4 * EPS * back.abs().max()


def test_a_constant_noise_is_the_target():
    """If the policy always answers ε, the inverted x_t is α x_0 + σ ε whatever the grid."""
    eps, timesteps = normal(3), [3, 500, 999]
    got = ddim_inversion(lambda x, t: eps, normal(0), timesteps, SCHEDULE, num_steps=3)
    direct = q_sample(normal(0), eps, timesteps, SCHEDULE)
    _, sigma = levels(timesteps)
    assert (got.latents - direct.latents).abs().max() <= 16 * EPS * direct.latents.abs().max()
    assert ((got.target - eps) * sigma).abs().max() <= 16 * EPS * direct.latents.abs().max()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_sample_of_a_batch_has_its_own_grid(kind):
    clean, timesteps = normal(0), [31, 500, 998]
    together = ddim_inversion(network, clean, timesteps, VP[kind], num_steps=5)
    for i, t in enumerate(timesteps):
        alone = ddim_inversion(network, clean[i : i + 1], [t], VP[kind], num_steps=5)
        assert torch.equal(alone.latents[0], together.latents[i])
        assert torch.equal(alone.target[0], together.target[i])


def test_a_pair_is_inverted_as_one_batch():
    # winner and loser share t, and a tensor of timesteps is a list of them
    clean = normal(0, (2, 4, 5, 2))
    listed = ddim_inversion(network, clean, [600, 600], SCHEDULE, num_steps=6)
    tensor = ddim_inversion(network, clean, torch.tensor([600, 600]), SCHEDULE, num_steps=6)
    assert torch.equal(listed.latents, tensor.latents)
    noise = normal(1, (2, 4, 5, 2))
    assert torch.equal(
        q_sample(clean, noise, [600, 600], SCHEDULE).latents,
        q_sample(clean, noise, torch.tensor([600, 600]), SCHEDULE).latents,
    )


def test_no_gradient_and_no_change_of_the_input():
    weight = torch.ones((), requires_grad=True)
    clean = normal(0).requires_grad_()
    got = ddim_inversion(lambda x, t: weight * x, clean, [9, 90, 900], SCHEDULE, num_steps=3)
    assert not got.latents.requires_grad and not got.target.requires_grad
    assert torch.equal(clean.detach(), normal(0))


def test_a_16_bit_policy_and_16_bit_latents():
    def half(x, t):
        assert x.dtype == torch.float32
        return network(x, t).to(torch.bfloat16)

    clean = normal(0).half()
    got = ddim_inversion(half, clean, [9, 90, 900], SCHEDULE, num_steps=3)
    exact = ddim_inversion(network, clean, [9, 90, 900], SCHEDULE, num_steps=3)
    assert got.latents.dtype == torch.float32
    difference = (got.latents - exact.latents).abs().max()
    # outputs rounded to bfloat16 (2^-9 of some 3), carried through three steps
    assert 0 < difference <= 0.1


@pytest.mark.parametrize(
    ("timestep", "depth"),
    [(0, 1), (1, 1), (99, 1), (100, 2), (499, 5), (500, 6), (899, 9), (900, 10), (999, 10)],
)
def test_inversion_depth(timestep, depth):
    assert inversion_depth(timestep) == depth


def test_mean_inversion_depth():
    # ten steps for T = 1000: mean 5.5, what a training step costs on average
    depths = [inversion_depth(t) for t in range(1000)]
    assert np.bincount(depths).tolist() == [0] + 10 * [100]
    assert inversion_depth(40, 100, max_steps=5) == 3
    # every depth is possible at its timestep
    assert all(inversion_depth(t, 10) == t + 1 for t in range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [5, 5]}, r"timesteps must have one entry a sample, 3, got shape \(2,\)"),
        ({"timesteps": [5, 5, 1000]}, r"integers in 0 … 999, got \[5, 5, 1000\]"),
        ({"timesteps": [5, -1, 7]}, "timesteps must be integers in 0 … 999"),
        ({"timesteps": [5, 5.5, 7]}, "timesteps must be integers in 0 … 999"),
        (
            {"schedule": NoiseSchedule.from_alphas_cumprod(TABLE, 999, prediction_type="sample")},
            "prediction_type must be epsilon, v_prediction or flow, got 'sample'",
        ),
    ],
)
def test_wrong_arguments_of_both(change, message):
    recorder = Recorder()
    common = {"timesteps": [5, 50, 500], "schedule": SCHEDULE, **change}
    with pytest.raises(ValueError, match=message):
        q_sample(normal(0), normal(1), **common)
    with pytest.raises(ValueError, match=message):
        ddim_inversion(recorder, normal(0), num_steps=2, **common)
    assert not recorder.calls


def test_wrong_noise():
    with pytest.raises(ValueError, match="noise must have the shape of clean"):
        q_sample(normal(0), normal(1)[:1], [5, 50, 500], SCHEDULE)


@pytest.mark.parametrize("num_steps", [0, -1, 7])
def test_wrong_number_of_steps(num_steps):
    with pytest.raises(
        ValueError, match=rf"num_steps must be in 1 … 6 for the timestep 5.*{num_steps}"
    ):
        ddim_inversion(network, normal(0), [5, 50, 500], SCHEDULE, num_steps=num_steps)


def test_a_policy_with_another_shape():
    with pytest.raises(ValueError, match="m1 must have the shape of x"):
        ddim_inversion(lambda x, t: x[:1], normal(0), [5, 50, 500], SCHEDULE, num_steps=1)
