"""Program tables against the papers' own formulas in 50 digits.

The formulas below are typed from the papers in their letters, x̂ and ε̂ from the definition of each
prediction type, and know nothing of the coordinate u = z/ℓ in which the library derives its tables.
"""

from fractions import Fraction
from typing import NamedTuple

import mpmath as mp
import numpy as np
import pytest

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import Update, bdia, ddim, edict, obelm
from inpo_fast.solvers.bdia import bdia_update
from inpo_fast.solvers.ddim import ddim_update
from inpo_fast.solvers.edict import edict_updates
from inpo_fast.solvers.obelm import obelm_update
from tests.solvers.strategies import LINEAR, SCALED_LINEAR, ZERO_SNR

# the difference of two neighbouring σ/α costs up to two digits, and then some rounding
TOLERANCE = 1e-13

pytestmark = [
    pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning"),
    pytest.mark.usefixtures("fifty_digits"),
]


@pytest.fixture
def fifty_digits():
    with mp.workdps(50):
        yield


class Linear(NamedTuple):
    """A linear form of (x^j, x^{1−j}, m): the right-hand side of an update, in units of z."""

    own: mp.mpf
    other: mp.mpf
    output: mp.mpf

    def __add__(self, more):
        return Linear(*(a + b for a, b in zip(self, more, strict=True)))

    def __rmul__(self, factor):
        return Linear(*(factor * a for a in self))

    def size(self):
        return Linear(*(abs(a) for a in self))


OWN = Linear(mp.mpf(1), mp.mpf(0), mp.mpf(0))
Z = Linear(mp.mpf(0), mp.mpf(1), mp.mpf(0))
M = Linear(mp.mpf(0), mp.mpf(0), mp.mpf(1))


class Exact:
    """α_i, σ_i and the estimates x̂, ε̂ at node i of a schedule, in 50 digits."""

    def __init__(self, schedule: NoiseSchedule, bar):
        # ᾱ is the datum; α and σ of the schedule are its rounded square roots
        self.alpha = [mp.sqrt(mp.mpf(float(v))) for v in bar]
        self.sigma = [mp.sqrt(1 - mp.mpf(float(v))) for v in bar]
        self.kind = schedule.prediction_type

    def estimates(self, i):
        """x̂ and ε̂ as linear forms of (z, m)."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        match self.kind:
            case "epsilon":
                return 1 / alpha * (Z + -sigma * M), M
            case "sample":
                return M, 1 / sigma * (Z + -alpha * M)
            case "v_prediction":
                return alpha * Z + -sigma * M, sigma * Z + alpha * M

    def ddim(self, i, j):
        """z_j = α_j x̂ + σ_j ε̂ (Song et al. 2021, eq. 12), and the size of its terms."""
        x, eps = self.estimates(i)
        parts = self.alpha[j] * x, self.sigma[j] * eps
        return parts[0] + parts[1], parts[0].size() + parts[1].size()


def in_z(update: Update) -> tuple[float, float, float]:
    """The update's coefficients in units of z."""
    before, after = update.before, update.after
    # the track that the model reads holds z / other, and it sees z except for `edm`
    other = update.model_scale
    return float(update.a) * after / before, update.b * after / other, update.c * after


def assert_close(update: Update, exact: Linear, size: Linear):
    got = Linear(*map(mp.mpf, in_z(update)))
    # a multiplier of z may cancel to nothing (x̂ of a `sample` model ignores z): its error is then
    # to be judged beside the 1 of z itself
    size = size + Z
    for name, value, expected, scale in zip(Linear._fields, got, exact, size, strict=True):
        assert abs(value - expected) <= TOLERANCE * scale, (name, value, expected)


def grids():
    for table, types in (
        (SCALED_LINEAR, ("epsilon", "v_prediction", "sample")),
        (LINEAR, ("epsilon", "v_prediction", "sample")),
        (ZERO_SNR, ("v_prediction", "sample")),
    ):
        for kind in types:
            for options in (
                {"num_steps": 50, "spacing": "leading", "steps_offset": 1},
                {"num_steps": 50, "spacing": "trailing"},
                {"num_steps": 10, "spacing": "linspace", "final_alpha_cumprod": table[0]},
                {"timesteps": [999, 990, 500, 480, 20, 3, 1]},
            ):
                yield table, kind, options


def name_of(grid) -> str:
    table, kind, options = grid
    return f"{table[-1]:.1g}-{kind}-{options.get('spacing', 'explicit')}"


def make(grid) -> tuple[NoiseSchedule, Exact]:
    table, kind, options = grid
    schedule = NoiseSchedule.from_alphas_cumprod(table, prediction_type=kind, **options)
    bar = [options.get("final_alpha_cumprod", 1.0), *table[schedule.timesteps[1:].astype(int)]]
    return schedule, Exact(schedule, bar)


@pytest.fixture(params=grids(), ids=name_of)
def grid(request):
    return make(request.param)


# the papers divide by α, which is 0 at the noise end of a zero-SNR table: those have own tests
@pytest.fixture(params=[g for g in grids() if g[0][-1] > 0], ids=name_of)
def positive_alpha(request):
    return make(request.param)


def test_ddim(grid):
    schedule, exact = grid
    for i in range(1, schedule.num_steps + 1):
        assert_close(ddim_update(schedule, i, i - 1), *exact.ddim(i, i - 1))
        assert_close(ddim_update(schedule, i, i - 1, in_u=True), *exact.ddim(i, i - 1))
    first = schedule.first_callable
    for i in range(first, schedule.num_steps):
        assert_close(ddim_update(schedule, i, i + 1), *exact.ddim(i, i + 1))


@pytest.mark.parametrize("gamma", [Fraction(1), Fraction(47, 50), Fraction(1, 2), Fraction(0)])
def test_bdia(grid, gamma):
    """Zhang et al. 2024, eq. 15, with α_j x̂ + σ_j ε̂ the DDIM step from i to j:

    z_{i−1} = γ z_{i+1} − γ (α_{i+1} x̂ + σ_{i+1} ε̂) + (α_{i−1} x̂ + σ_{i−1} ε̂).
    """
    schedule, exact = grid
    weight = mp.mpf(gamma.numerator) / gamma.denominator
    for i in range(1, schedule.num_steps):
        (up, up_size), (down, down_size) = exact.ddim(i, i + 1), exact.ddim(i, i - 1)
        expected = weight * OWN + -weight * up + down
        assert_close(bdia_update(schedule, i, gamma), expected, OWN + weight * up_size + down_size)


def test_bdia_without_the_backward_step_is_ddim(grid):
    schedule, _ = grid
    for i in range(1, schedule.num_steps):
        without, plain = bdia_update(schedule, i, Fraction(0)), ddim_update(schedule, i, i - 1)
        assert without == plain


def test_obelm_with_the_rounded_ratio(positive_alpha):
    """Eq. 18 of Wang et al. 2024 with any a in place of h_i²/h_{i+1}²: consistent for every a."""
    schedule, exact = positive_alpha
    bar_sigma = [sigma / a for sigma, a in zip(exact.sigma, exact.alpha, strict=True)]
    for i in range(1, schedule.num_steps):
        h, h_next = bar_sigma[i] - bar_sigma[i - 1], bar_sigma[i + 1] - bar_sigma[i]
        update = obelm_update(schedule, i)
        ratio, got = (h / h_next) ** 2, mp.mpf(update.a.numerator) / update.a.denominator
        # fractions with terms up to 2^16 lie at most 2^-16 (times the ratio above 1) apart, none
        # is 0, and a step of no length has the ratio of a first-order step
        if h == 0:
            assert got == 1
        elif ratio < mp.mpf(1) / 2**16:
            assert got == mp.mpf(1) / 2**16
        else:
            assert abs(got - ratio) <= max(1, ratio) / 2**17 * (1 + mp.mpf(1) / 2**10)
        alpha = exact.alpha
        _, eps = exact.estimates(i)
        terms = [
            (got * alpha[i - 1] / alpha[i + 1]) * OWN,
            ((1 - got) * alpha[i - 1] / alpha[i]) * Z,
            -(alpha[i - 1] * (h + got * h_next)) * eps,
        ]
        expected, size = terms[0] + terms[1] + terms[2], Linear(*[mp.mpf(0)] * 3)
        for term in terms:
            size = size + term.size()
        # 1 − a near a = 1 is exact in the library, and what it is multiplied by is rounded
        size = size + (alpha[i - 1] / alpha[i]) * Z
        assert_close(update, expected, size)


def test_obelm_is_equation_18_where_the_ratio_is_rational():
    """With σ/α = 0, 1, 2, 4, 8 … every h_i²/h_{i+1}² is 1 or 1/4 and no rounding is left."""
    tau = np.array([0, 1, 2, 4, 8, 16, 18, 19])
    bar = 1 / (1 + tau**2.0)
    schedule = NoiseSchedule(np.arange(8), np.sqrt(bar), np.sqrt(1 - bar))
    for i in range(1, 7):
        h, h_next = mp.mpf(int(tau[i] - tau[i - 1])), mp.mpf(int(tau[i + 1] - tau[i]))
        alpha = [1 / mp.sqrt(1 + mp.mpf(int(t)) ** 2) for t in tau]
        expected = Linear(
            h**2 / h_next**2 * alpha[i - 1] / alpha[i + 1],
            (h_next**2 - h**2) / h_next**2 * alpha[i - 1] / alpha[i],
            -h * (h + h_next) / h_next * alpha[i - 1],
        )
        update = obelm_update(schedule, i)
        assert update.a == Fraction(int(h) ** 2, int(h_next) ** 2)
        assert_close(update, expected, expected.size() + alpha[i - 1] / alpha[i] * Z)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_obelm_at_zero_snr(kind):
    """In u = z/(α+σ), τ = σ/(α+σ), F = ε̂ − x̂ the ODE is du/dτ = F: the same two-step scheme."""
    schedule = NoiseSchedule.from_alphas_cumprod(
        ZERO_SNR, 20, spacing="trailing", prediction_type=kind
    )
    bar = [1.0, *ZERO_SNR[schedule.timesteps[1:].astype(int)]]
    exact = Exact(schedule, bar)
    scale = [a + s for a, s in zip(exact.alpha, exact.sigma, strict=True)]
    tau = [sigma / level for sigma, level in zip(exact.sigma, scale, strict=True)]
    for i in range(1, 20):
        update = obelm_update(schedule, i)
        a = mp.mpf(update.a.numerator) / update.a.denominator
        x, eps = exact.estimates(i)
        gain = -scale[i - 1] * ((tau[i] - tau[i - 1]) + a * (tau[i + 1] - tau[i]))
        terms = [
            a * scale[i - 1] / scale[i + 1] * OWN,
            (1 - a) * scale[i - 1] / scale[i] * Z,
            gain * eps,
            -gain * x,
        ]
        expected = terms[0] + terms[1] + terms[2] + terms[3]
        size = scale[i - 1] / scale[i] * Z
        for term in terms:
            size = size + term.size()
        assert_close(update, expected, size)


def test_edict(positive_alpha):
    """Wallace et al. 2023, eq. 14: x ← a x + b ε(y), a = α_{i−1}/α_i, b = σ_{i−1} − a σ_i."""
    schedule, exact = positive_alpha
    p = Fraction(93, 100)
    for i in range(1, schedule.num_steps + 1):
        *moves, mix_x, mix_y = edict_updates(schedule, i, p)
        a = exact.alpha[i - 1] / exact.alpha[i]
        b = exact.sigma[i - 1] - a * exact.sigma[i]
        _, eps = exact.estimates(i)
        expected = a * OWN + b * eps
        size = a * OWN + (exact.sigma[i - 1] + a * exact.sigma[i]) * eps.size()
        assert {move.track for move in moves} == {0, 1}
        assert moves[0].track == (schedule.num_steps - i) % 2
        for move in moves:
            assert_close(move, expected, size)
        assert mix_x.track == 0 and mix_y.track == 1
        for mix in (mix_x, mix_y):
            # both tracks hold z at the same node: the mixing weights have no unit
            assert mix.a == p and mix.b == 1 - float(p) and mix.node is None
            assert mix.before == mix.after == schedule.scale[i - 1]


def test_edict_at_zero_snr():
    schedule = NoiseSchedule.from_alphas_cumprod(
        ZERO_SNR, 20, spacing="trailing", prediction_type="v_prediction"
    )
    exact = Exact(schedule, [1.0, *ZERO_SNR[schedule.timesteps[1:].astype(int)]])
    for i in range(1, 21):
        for move, level in zip(edict_updates(schedule, i, Fraction(1)), (i, i - 1), strict=True):
            # the velocity-form step from z, with F = ε̂ − x̂ as the model at node i reads z
            scale = [a + s for a, s in zip(exact.alpha, exact.sigma, strict=True)]
            x, eps = exact.estimates(i)
            gain = scale[i - 1] * (exact.sigma[i - 1] / scale[i - 1] - exact.sigma[i] / scale[i])
            expected = scale[i - 1] / scale[i] * OWN + gain * eps + -gain * x
            size = expected.size() + scale[i - 1] * (eps.size() + x.size())
            assert_close(move, expected, size)
            assert move.model_scale == schedule.scale[level]


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_flow_and_edm_read_the_model_as_defined(kind):
    schedule = NoiseSchedule.flow(12, shift=3) if kind == "flow" else NoiseSchedule.edm(12)
    exact = Exact.__new__(Exact)
    exact.alpha = [mp.mpf(float(v)) for v in schedule.alpha]
    exact.sigma = [mp.mpf(float(v)) for v in schedule.sigma]

    def estimates(i):
        alpha, sigma = exact.alpha[i], exact.sigma[i]
        if kind == "flow":
            # m = ε − x and z = (1−s) x + s ε
            return Z + -sigma * M, Z + alpha * M
        # Karras et al. 2022, table 1, for the raw network F: D = c_skip z + c_out F
        data = mp.mpf(schedule.sigma_data)
        total = sigma**2 + data**2
        denoised = data**2 / total * Z + sigma * data / mp.sqrt(total) * M
        return denoised, 1 / sigma * (Z + -1 * denoised)

    exact.estimates = estimates
    for i in range(1, 12):
        (up, up_size), (down, down_size) = exact.ddim(i, i + 1), exact.ddim(i, i - 1)
        update = bdia_update(schedule, i, Fraction(1))
        assert update.model_scale == schedule.input_scale[i]
        got = Linear(mp.mpf(float(update.a)), mp.mpf(update.b), mp.mpf(update.c))
        expected, size = OWN + -1 * up + down, OWN + up_size + down_size
        for value, want, scale in zip(got, expected, size, strict=True):
            assert abs(value - want) <= TOLERANCE * scale
        if kind == "edm":
            expected_scale = 1 / mp.sqrt(exact.sigma[i] ** 2 + mp.mpf(schedule.sigma_data) ** 2)
            assert abs(update.model_scale - expected_scale) <= 1e-15 * expected_scale
            assert abs(update.timestep - mp.log(exact.sigma[i]) / 4) <= 1e-15


@pytest.mark.parametrize("solver", [ddim, bdia, edict, obelm])
def test_programs_are_made_of_these_updates(solver):
    schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 9)
    sample, invert = solver(schedule), solver(schedule, direction="invert")
    if solver is ddim:
        assert sample.updates == tuple(ddim_update(schedule, i, i - 1) for i in range(9, 0, -1))
        assert invert.updates == tuple(ddim_update(schedule, i, i + 1) for i in range(9))
    elif solver is edict:
        body = [u for i in range(9, 0, -1) for u in edict_updates(schedule, i, Fraction(93, 100))]
        assert sample.updates[1:] == tuple(body)
        assert invert.updates[1:] == tuple(u.inverted() for u in reversed(body))
        for program in (sample, invert):
            first = program.updates[0]
            assert first.starts and first.node is None and (first.b, first.track) == (1, 1)
    else:
        in_u = solver is obelm
        step = (
            (lambda i: obelm_update(schedule, i))
            if in_u
            else (lambda i: bdia_update(schedule, i, Fraction(1)))
        )
        assert sample.updates == (
            ddim_update(schedule, 9, 8, in_u=in_u),
            *(step(i) for i in range(8, 0, -1)),
        )
        assert invert.updates == (
            ddim_update(schedule, 0, 1, in_u=in_u),
            *(step(i).inverted() for i in range(1, 9)),
        )


def test_guidance_is_folded_into_the_rows():
    schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 5)
    program = bdia(schedule)
    plain = program.coefficients()
    c = np.array([u.c for u in program.updates])
    assert plain.shape == (5, 4) and (plain[:, 2] == c).all() and (plain[:, 3] == 0).all()
    guided = program.coefficients(7.5)
    assert (guided[:, :2] == plain[:, :2]).all()
    # ε = ε_u + w (ε_c − ε_u)
    np.testing.assert_allclose(guided[:, 2], c * -6.5, rtol=1e-15)
    np.testing.assert_allclose(guided[:, 3], c * 7.5, rtol=1e-15)
    rows = program.coefficients([1.0, 7.5, 0.0])
    assert rows.shape == (5, 3, 4)
    assert (rows[:, 1] == guided).all()
    assert (rows[:, 0, 2] == 0).all() and (rows[:, 0, 3] == c).all()
    assert (rows[:, 2, 2] == c).all() and (rows[:, 2, 3] == 0).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf, [[1.0, 2.0]], [1.0, np.nan]])
def test_guidance_must_be_finite_numbers(scale):
    program = bdia(NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, 5))
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        program.coefficients(scale)


@pytest.mark.parametrize("gamma", [0, -0.1, 1.0001, 2, np.nan])
def test_bdia_refuses_gamma(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        bdia(NoiseSchedule.flow(4), gamma=gamma)


@pytest.mark.parametrize("p", [0, 0.5, 1.01, np.nan])
def test_edict_refuses_p(p):
    with pytest.raises(ValueError, match=r"p must be in \(1/2, 1\]"):
        edict(NoiseSchedule.flow(4), p=p)


@pytest.mark.parametrize("solver", [ddim, bdia, edict, obelm])
def test_unknown_direction(solver):
    with pytest.raises(ValueError, match="direction must be one of"):
        solver(NoiseSchedule.flow(4), direction="sideways")


def test_obelm_refuses_steps_of_very_different_length():
    schedule = NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, timesteps=[500, 499, 20])
    with pytest.raises(ValueError, match=r"at most 65536, got 74804 at timestep 499"):
        obelm(schedule)
