"""Updates with several stages against the formulas of the papers in 50 digits.

As in `test_coefficients`: the formulas are written in the letters of the papers, z, λ, x̂ and ε̂,
and know nothing of the coordinate u = z/ℓ of the library.
"""

from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import bdia, ddim, dpmpp_2m, dpmpp_2s, heun, mccallum_foster
from inpo_fast.solvers.bdia import bdia_update
from inpo_fast.solvers.dpmpp_2s import dpmpp_2s_step
from inpo_fast.solvers.heun import heun_step
from inpo_fast.solvers.mccallum_foster import mccallum_foster_updates
from inpo_fast.solvers.one_step import euler_step, step_update
from tests.solvers.strategies import LINEAR, SCALED_LINEAR

TOLERANCE = 1e-13

pytestmark = [
    pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning"),
    pytest.mark.usefixtures("fifty_digits"),
]


@pytest.fixture
def fifty_digits():
    with mp.workdps(50):
        yield


def form(**entries) -> np.ndarray:
    """A linear form of (own, z, m_0, m_1, m_2) as an array of mpf."""
    names = ("own", "z", "m0", "m1", "m2")
    return np.array([mp.mpf(entries.get(name, 0)) for name in names], dtype=object)


OWN, Z = form(own=1), form(z=1)
OUTPUTS = [form(m0=1), form(m1=1), form(m2=1)]


class Level:
    """α, σ and the estimates of a model of some prediction type there."""

    def __init__(self, alpha, sigma, kind, data=None):
        self.alpha, self.sigma, self.kind, self.data = alpha, sigma, kind, data

    def x(self, z, m):
        alpha, sigma = self.alpha, self.sigma
        match self.kind:
            case "epsilon":
                return (z - sigma * m) / alpha
            case "sample":
                return m
            case "v_prediction":
                return alpha * z - sigma * m
            case "flow":
                return z - sigma * m
            case "edm":
                total = sigma**2 + self.data**2
                return self.data**2 / total * z + sigma * self.data / mp.sqrt(total) * m

    def eps(self, z, m):
        return (z - self.alpha * self.x(z, m)) / self.sigma

    @property
    def log_snr(self):
        return mp.log(self.alpha / self.sigma)

    @property
    def input_scale(self):
        return 1 / mp.sqrt(self.sigma**2 + self.data**2) if self.kind == "edm" else mp.mpf(1)

    def midpoint(self, other, family):
        ratio = mp.exp(-(self.log_snr + other.log_snr) / 2)
        norm = {"vp": mp.sqrt(1 + ratio**2), "ve": mp.mpf(1), "flow": 1 + ratio}[family]
        return Level(1 / norm, ratio / norm, self.kind, self.data)


def ddim_increment(levels, i, j, outputs, family):
    here, there = levels[i], levels[j]
    return there.alpha * here.x(Z, outputs[0]) + there.sigma * here.eps(Z, outputs[0]), [Z], [here]


def heun_increment(levels, i, j, outputs, family):
    """Karras et al. 2022, algorithm 1, in their variables z/s = z/α and σ/α."""
    here, there = levels[i], levels[j]
    if family == "flow":
        # as flow matching states it: dz/ds = ε̂ − x̂
        def slope(level, z, m):
            return level.eps(z, m) - level.x(z, m)

        step = there.sigma - here.sigma
        point = Z + step * slope(here, Z, outputs[0])
        average = (slope(here, Z, outputs[0]) + slope(there, point, outputs[1])) / 2
        return Z + step * average, [Z, point], [here, there]
    step = there.sigma / there.alpha - here.sigma / here.alpha
    first = here.eps(Z, outputs[0])
    point = there.alpha * (Z / here.alpha + step * first)
    average = (first + there.eps(point, outputs[1])) / 2
    return there.alpha * (Z / here.alpha + step * average), [Z, point], [here, there]


def dpmpp_2s_increment(levels, i, j, outputs, family):
    """Lu et al. 2022, algorithm 1, with r = 1/2."""
    here, there = levels[i], levels[j]
    middle = here.midpoint(there, family)
    h = there.log_snr - here.log_snr
    first = here.x(Z, outputs[0])
    point = middle.sigma / here.sigma * Z - middle.alpha * (mp.exp(-h / 2) - 1) * first
    data = middle.x(point, outputs[1])
    end = there.sigma / here.sigma * Z - there.alpha * (mp.exp(-h) - 1) * data
    return end, [Z, point], [here, middle]


INTEGRATORS = {
    "ddim": (euler_step, ddim_increment),
    "heun": (heun_step, heun_increment),
    "dpm++2s": (dpmpp_2s_step, dpmpp_2s_increment),
}
integrators = pytest.mark.parametrize("name", ["heun", "dpm++2s"])


def grids():
    for table, label in ((SCALED_LINEAR, "sd"), (LINEAR, "linear")):
        for kind in ("epsilon", "v_prediction", "sample"):
            options = {"prediction_type": kind, "steps_offset": 1}
            schedule = NoiseSchedule.from_alphas_cumprod(table, 10, **options)
            bar = [mp.mpf(1), *(mp.mpf(v) for v in table[schedule.timesteps[1:].astype(int)])]
            levels = [Level(mp.sqrt(b), mp.sqrt(1 - b), kind) for b in bar]
            yield f"{label}-{kind}", schedule, levels
    for name, schedule in (
        ("edm", NoiseSchedule.edm(10)),
        ("flow", NoiseSchedule.flow(10, shift=3)),
    ):
        data = mp.mpf(schedule.sigma_data)
        sigmas = [mp.mpf(float(s)) for s in schedule.sigma]
        alphas = [1 - s if name == "flow" else mp.mpf(1) for s in sigmas]
        kind = schedule.prediction_type
        levels = [Level(a, s, kind, data) for a, s in zip(alphas, sigmas, strict=True)]
        yield name, schedule, levels


@pytest.fixture(
    params=[
        "sd-epsilon",
        "sd-v_prediction",
        "sd-sample",
        "linear-epsilon",
        "linear-v_prediction",
        "linear-sample",
        "edm",
        "flow",
    ]
)
def grid(request, fifty_digits):
    [(schedule, levels)] = [(s, levels) for name, s, levels in grids() if name == request.param]
    return schedule, levels


def assert_is(update, expected, points, levels, units=(1, 1, 1)):
    """The update against the form that it should add, and its stages against their points.

    Args:
        units: z per unit of the track that changes, before and after, and of the one that is read.
    """
    before, after, read = units
    got = [mp.mpf(float(update.a)) * after / before, mp.mpf(update.b) * after / read]
    got += [mp.mpf(stage.c) * after for stage in update.stages]
    size = max(1, *(abs(v) for v in expected))
    for value, want in zip(got, expected, strict=False):
        assert abs(value - want) <= TOLERANCE * size, (value, want)
    assert all(v == 0 for v in expected[len(got) :])
    for stage, point, level in zip(update.stages, points, levels, strict=True):
        seen = [mp.mpf(stage.p) / read, *map(mp.mpf, stage.q)]
        want = level.input_scale * point[1:]
        size = max(1, *(abs(v) for v in want))
        for value, expected_value in zip(seen, want, strict=False):
            assert abs(value - expected_value) <= TOLERANCE * size
        assert all(v == 0 for v in want[len(seen) :])


def inner_nodes(schedule):
    """Nodes whose neighbours all have finite λ."""
    return [
        i
        for i in range(1, schedule.num_steps)
        if np.isfinite(schedule.log_snr[i - 1 : i + 2]).all()
    ]


@integrators
def test_one_step(grid, name):
    schedule, levels = grid
    step, increment = INTEGRATORS[name]
    for i in inner_nodes(schedule):
        for j in (i - 1, i + 1):
            expected, points, at = increment(levels, i, j, OUTPUTS, schedule.kind)
            assert_is(step_update(schedule, step, i, j), expected, points, at)


@integrators
@pytest.mark.parametrize("gamma", [Fraction(1), Fraction(47, 50)])
def test_bdia(grid, name, gamma):
    """γ z_{i+1} + (1−γ) z_i − γ Δ(i→i+1 | z_i) + Δ(i→i−1 | z_i), the first call in common."""
    schedule, levels = grid
    step, increment = INTEGRATORS[name]
    weight = mp.mpf(gamma.numerator) / gamma.denominator
    for i in inner_nodes(schedule):
        up, above, at_above = increment(levels, i, i + 1, OUTPUTS, schedule.kind)
        down, below, at_below = increment(levels, i, i - 1, [OUTPUTS[0], OUTPUTS[2]], schedule.kind)
        expected = weight * OWN + (1 - weight) * Z - weight * (up - Z) + (down - Z)
        update = bdia_update(schedule, i, gamma, step)
        assert len(update.stages) == 3
        assert_is(update, expected, [*above, *below[1:]], [*at_above, *at_below[1:]])


@pytest.mark.parametrize("name", INTEGRATORS)
def test_mccallum_foster(grid, name):
    """y ← ζ y + (1−ζ) w + Ψ_h(w); w ← w − Ψ_{−h}(y), all in u = z/ℓ."""
    schedule, levels = grid
    step, increment = INTEGRATORS[name]
    zeta = Fraction(999, 1000)
    weight = mp.mpf(999) / 1000
    flow = schedule.kind == "flow"
    unit = [level.alpha + level.sigma if flow else level.alpha for level in levels]
    for i in inner_nodes(schedule):
        first, second = mccallum_foster_updates(schedule, i, zeta, step)
        for update, a, source, target, sign in (
            (first, weight, i, i - 1, 1),
            (second, mp.mpf(1), i - 1, i, -1),
        ):
            end, points, at = increment(levels, source, target, OUTPUTS, schedule.kind)
            change = end / unit[target] - Z / unit[source]  # of u
            below = unit[i - 1]
            expected = below * (a * OWN / unit[i] + (1 - a) * Z / unit[source] + sign * change)
            read = mp.mpf(float(schedule.scale[source]))
            assert_is(update, expected, points, at, (unit[i], below, read))


def test_dpmpp_2m(grid):
    """Lu et al. 2022, algorithm 2, on forms of (z_N, x̂_N, x̂_{N−1}, …) run for three steps."""
    schedule, levels = grid
    program = dpmpp_2m(schedule)
    n = schedule.num_steps
    rng = np.random.default_rng(0)
    data = {i: mp.mpf(float(rng.normal())) for i in range(n + 1)}
    z = mp.mpf(0.8)
    tracks = [z / mp.mpf(program.start[0]), None]
    previous, h_previous = None, None
    updates = iter(program.updates)
    for i in range(n, 0, -1):
        here, there = levels[i], levels[i - 1]
        predict, step = next(updates), next(updates)
        # what the model sees is z_i, however it is split over the tracks
        recall = predict.recall or (0.0, 0.0)
        seen = predict.model_scale * tracks[0] + recall[1] * (tracks[1] or 0)
        assert abs(seen / here.input_scale - z) <= 1e-11 * max(1, abs(z))
        # the output of a model whose data prediction is data[i]
        one, zero = here.x(mp.mpf(0), mp.mpf(1)), here.x(z, mp.mpf(0))
        output = (data[i] - zero) / one
        tracks[1] = predict.b * tracks[0] + recall[0] * (tracks[1] or 0) + predict.c * output
        tracks[0] = float(step.a) * tracks[0] + step.b * tracks[1]
        # the paper's step
        if there.sigma == 0:
            z, h = there.alpha * data[i], None
        else:
            last = here.alpha == 0 or previous is None
            h = None if here.alpha == 0 else there.log_snr - here.log_snr
            plain = last or h_previous is None
            r = None if plain else h_previous / h
            mixed = data[i] if plain else (1 + 1 / (2 * r)) * data[i] - 1 / (2 * r) * previous
            factor = there.alpha - here.alpha * there.sigma / here.sigma
            z = there.sigma / here.sigma * z + factor * mixed
        previous, h_previous = data[i], h
    assert abs(tracks[0] * program.end[0] - z) <= 1e-11


# --- Where the integrators step back to Euler ---------------------------------------------------


def calls(program) -> list[int]:
    return [len(u.stages) for u in program.updates if u.stages]


def test_model_calls_per_step():
    clean = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 6, steps_offset=1)
    noisy = NoiseSchedule.from_alphas_cumprod(
        SCALED_LINEAR, 6, steps_offset=1, final_alpha_cumprod=SCALED_LINEAR[0]
    )
    for solver, short in ((heun, 1), (dpmpp_2s, 1)):
        assert calls(solver(clean)) == [2] * 5 + [short]
        assert calls(solver(noisy)) == [2] * 6
    # the model is defined at node 0, but λ is infinite there
    assert calls(heun(clean, direction="invert")) == [2] * 6
    assert calls(dpmpp_2s(clean, direction="invert")) == [1] + [2] * 5
    for name in ("heun", "dpm++2s"):
        assert calls(bdia(noisy, integrator=name)) == [2] + [3] * 5
        assert calls(bdia(clean, integrator=name)) == [2] + [3] * 4 + [2]
        assert calls(mccallum_foster(noisy, integrator=name)) == [2] * 12
    assert calls(mccallum_foster(clean, integrator="heun")) == [2] * 10 + [1, 2]
    assert calls(mccallum_foster(clean, integrator="dpm++2s")) == [2] * 10 + [1, 1]
    assert calls(bdia(clean)) == [1] * 6 and calls(mccallum_foster(clean)) == [1] * 12
    # EDM's network is undefined at σ = 0, the flow's pure noise has λ = −∞
    edm, flow = NoiseSchedule.edm(4), NoiseSchedule.flow(4)
    assert calls(heun(edm)) == [2, 2, 2, 1] and calls(heun(edm, direction="invert")) == [1, 2, 2, 2]
    assert calls(dpmpp_2s(flow)) == [1, 2, 2, 1] and calls(heun(flow)) == [2, 2, 2, 1]
    assert calls(dpmpp_2m(clean)) == [1] * 6


def test_a_step_of_no_length_costs_one_call():
    schedule = NoiseSchedule.from_alphas_cumprod(
        SCALED_LINEAR, 5, final_alpha_cumprod=SCALED_LINEAR[0]
    )
    assert schedule.tau[0] == schedule.tau[1]
    for solver in (heun, dpmpp_2s):
        assert solver(schedule).updates[-1] == ddim(schedule).updates[-1]


def test_bdia_on_ddim_is_bdia():
    schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 9)
    for direction in ("sample", "invert"):
        plain, named = (
            bdia(schedule, gamma=0.9, direction=direction, **options)
            for options in ({}, {"integrator": "ddim"})
        )
        assert plain == named and plain.name == named.name


@pytest.mark.parametrize("solver", [bdia, mccallum_foster])
def test_unknown_integrator(solver):
    with pytest.raises(ValueError, match=r"integrator must be one of .* got 'rk4'"):
        solver(NoiseSchedule.flow(3), integrator="rk4")


@pytest.mark.parametrize("zeta", [0, -1, 1.01, np.nan])
def test_mccallum_foster_refuses_zeta(zeta):
    with pytest.raises(ValueError, match=r"zeta must be in \(0, 1\]"):
        mccallum_foster(NoiseSchedule.flow(3), zeta=zeta)


@pytest.mark.parametrize("solver", [heun, dpmpp_2s, mccallum_foster])
def test_unknown_direction(solver):
    with pytest.raises(ValueError, match="direction must be one of"):
        solver(NoiseSchedule.flow(3), direction="sideways")


def test_dpmpp_2m_samples_only():
    schedule = NoiseSchedule.flow(3)
    with pytest.raises(ValueError, match=r"direction must be 'sample', got 'invert': .* not rev"):
        dpmpp_2m(schedule, direction="invert")
    program = dpmpp_2m(schedule)
    assert not program.reversible and "not reversible" in str(program)
    with pytest.raises(ValueError, match=r"dpm\+\+2m is not reversible: update 2 overwrites"):
        program.inverse()
    table = [1.0, *SCALED_LINEAR]
    with pytest.raises(ValueError, match="sigma > 0 at every node but 0"):
        dpmpp_2m(NoiseSchedule.from_alphas_cumprod(table, timesteps=[500, 0]))
