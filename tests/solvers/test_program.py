"""Programs as data: amplification, the information buffer, checks, fingerprint, printing."""

import dataclasses
import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo_fast.schedule import NoiseSchedule
from inpo_fast.solvers import (
    SOLVERS,
    AmplificationWarning,
    Program,
    Stage,
    Update,
    bdia,
    ddim,
    dpmpp_2m,
    dpmpp_2s,
    edict,
    heun,
    mccallum_foster,
    obelm,
)
from inpo_fast.solvers.program import AMPLIFICATION_LIMIT
from tests.solvers.oracle import FrozenVelocityModel, interpret
from tests.solvers.strategies import SCALED_LINEAR, ZERO_SNR, reversible_programs
from tests.test_lattice import scale as scale_integers

EPS = np.finfo(np.float64).eps


def stable_diffusion(num_steps, **options):
    return NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR, num_steps, **options)


# --- Amplification ----------------------------------------------------------------------------


def simulated_amplification(program, schedule, seed=0) -> float:
    """Disturb every track at every moment by one, run on, and see what reaches the end."""
    rng = np.random.default_rng(seed)
    model = FrozenVelocityModel(schedule, rng.normal(size=1))
    tracks = list(program.start)
    tracks = [None if s is None else rng.normal(size=1) / s for s in tracks]
    states = list(interpret(program, model, tracks))
    scales = [list(program.start)]
    for u in program.updates:
        scales.append(list(scales[-1]))
        scales[-1][u.track] = u.scale
    end_scales = np.array([0.0 if s is None else s for s in program.end])
    worst = 1.0
    for moment, (state, scale) in enumerate(zip(states, scales, strict=True)):
        columns = []
        for j in (0, 1):
            if scale[j] is None:
                continue
            disturbed = list(state)
            disturbed[j] = disturbed[j] + 1 / scale[j]
            rest = dataclasses.replace(
                program, updates=program.updates[moment:], start=tuple(scale), input=j
            )
            *_, end = interpret(rest, model, disturbed)
            *_, undisturbed = interpret(rest, model, list(state))
            change = [
                0.0 if a is None else (a - b).item() for a, b in zip(end, undisturbed, strict=True)
            ]
            columns.append(np.abs(change * end_scales))
        worst = max(worst, sum(columns).max())
    return worst


@pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")
@pytest.mark.parametrize("direction", ["sample", "invert"])
@pytest.mark.parametrize(
    "schedule",
    [
        stable_diffusion(12),
        stable_diffusion(12, prediction_type="v_prediction", steps_offset=1),
        NoiseSchedule.from_alphas_cumprod(
            ZERO_SNR, 12, spacing="trailing", prediction_type="v_prediction"
        ),
        NoiseSchedule.flow(12, shift=3),
        NoiseSchedule.edm(12),
    ],
    ids=["epsilon", "v", "zero-snr", "flow", "edm"],
)
@pytest.mark.parametrize(
    "solver",
    [
        ddim,
        bdia,
        lambda s, **k: bdia(s, gamma=0.5, **k),
        obelm,
        edict,
        lambda s, **k: edict(s, p=1, **k),
        heun,
        dpmpp_2s,
        lambda s, direction: dpmpp_2m(s),
        *(
            lambda s, solver=solver, name=name, **k: solver(s, integrator=name, **k)
            for solver in (bdia, mccallum_foster)
            for name in ("ddim", "heun", "dpm++2s")
        ),
    ],
    ids=[
        *("ddim", "bdia-1", "bdia-.5", "obelm", "edict", "edict-1", "heun", "2s", "2m"),
        *("bdia-ddim", "bdia-heun", "bdia-2s", "mf-ddim", "mf-heun", "mf-2s"),
    ],
)
def test_amplification_is_what_a_disturbance_grows_to(schedule, solver, direction):
    program = solver(schedule, direction=direction)
    programs = [program, program.inverse()] if program.reversible else [program]
    for p in programs:
        simulated = simulated_amplification(p, schedule)
        # differences of runs of size ~10 lose digits beside the answer
        assert p.amplification == pytest.approx(simulated, rel=1e-9)


def test_the_inversion_of_bdia_grows_like_gamma_to_the_minus_n():
    with pytest.warns(
        AmplificationWarning, match=r"bdia\(gamma=1/2\) inversion over 50 model calls"
    ):
        program = bdia(stable_diffusion(50), gamma=0.5, direction="invert")
    # the parasitic root −1/γ over the 49 two-step updates, times what the first ones add
    assert 0.5**-49 <= program.amplification <= 3 * 0.5**-49
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert program.inverse().amplification < 10
        assert bdia(stable_diffusion(50), gamma=0.5).amplification < 10


@pytest.mark.parametrize("n", [10, 50, 200])
def test_gamma_one_does_not_grow(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for direction in ("sample", "invert"):
            program = bdia(stable_diffusion(n), direction=direction)
            assert program.amplification < 10 and program.inverse().amplification < 10


def test_the_inversion_of_edict_grows_like_p_to_the_minus_2n():
    with pytest.warns(AmplificationWarning):
        fine = edict(stable_diffusion(100), direction="invert").amplification
    coarse = edict(stable_diffusion(50), direction="invert").amplification
    # beside p^−2N, what the model and the change of unit do hardly depends on N
    assert np.log(fine / coarse) == pytest.approx(-100 * np.log(0.93), rel=0.05)


def test_obelm_inversion_grows_with_the_ratio_of_its_steps():
    schedule = stable_diffusion(50, steps_offset=1)
    program = obelm(schedule, direction="invert")
    h = np.diff(schedule.tau)
    # the parasitic root −h_{i+1}²/h_i² multiplies u by (h_N/h_1)² in all; a fixed velocity damps
    # it by exp(−∫ dτ/(1+τ)) and z = α u is smaller
    growth = (h[-1] / h[0]) ** 2 * schedule.alpha[-1] / (1 + schedule.tau[-1])
    assert growth / 3 <= program.amplification <= growth * 3


def test_the_warning_begins_at_the_limit():
    def program(a):
        update = Update(track=0, a=a, b=0.0, inverse=True)
        return Program("test", (update,), (1.0, 1.0), input=0, output=0, order=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(Fraction(1, int(AMPLIFICATION_LIMIT)))
    with pytest.warns(AmplificationWarning, match="magnifies a perturbation up to 1.0e[+]04"):
        program(Fraction(1, int(AMPLIFICATION_LIMIT) + 1))


def test_amplification_beyond_float64_is_infinite():
    with pytest.warns(AmplificationWarning, match="inf times"), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        program = bdia(stable_diffusion(1000), gamma=0.05, direction="invert")
    assert program.amplification == np.inf


# --- Information buffer -----------------------------------------------------------------------


def largest_buffers(program, choose) -> list[int]:
    """The largest buffer of each update; `choose(n, d)` says what the track holds before it."""
    buffers, seen = [0, 0], []
    for u in program.updates:
        if u.starts:
            buffers[u.track] = 0
            continue
        n, d = u.a.as_integer_ratio()
        if u.inverse:
            n, d = d, n
        _, buffers[u.track] = scale_integers(choose(n, d), buffers[u.track], n, d)
        assert buffers[u.track] >= 0
        seen.append(buffers[u.track])
    return seen


@pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")
@given(reversible_programs(), st.randoms(use_true_random=False))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_max_buffer_bounds_the_buffer(case, random):
    _, program = case
    for p in (program, program.inverse()):
        drawn = largest_buffers(p, lambda n, d: random.randint(-(2**31), 2**31 - 1))
        assert all(b <= p.max_buffer for b in drawn)


@pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")
def test_buffer_of_known_programs():
    # 25 steps a track at γ = 15/16 lose 2.3 bits when sampling (worst digits: a geometric sum), and
    # nothing when inverting from an image
    program = bdia(stable_diffusion(50), gamma=Fraction(15, 16))
    assert 2**4 <= program.max_buffer < 225 * (16 / 15) ** 25
    assert bdia(stable_diffusion(50), gamma=Fraction(15, 16), direction="invert").max_buffer == 0
    assert bdia(stable_diffusion(50)).max_buffer == 0 and not bdia(stable_diffusion(50)).scales
    assert program.scales and edict(stable_diffusion(3)).scales
    # every step of γ = 1/2 keeps one bit: 2^24 and 2^25 halvings over the two tracks
    assert bdia(stable_diffusion(50), gamma=0.5).max_buffer == 2**25 - 1


# --- What a program is ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_model_calls_order_and_ends(n):
    schedule = stable_diffusion(n, steps_offset=1)
    for direction, (first, last) in {"sample": (n, 0), "invert": (0, n)}.items():
        for name, solver in SOLVERS.items():
            program = solver(schedule, direction=direction)
            coupled = name in ("edict", "mccallum_foster")
            assert program.model_calls == (2 * n if coupled else n)
            assert program.order == (2 if name == "obelm" else 1)
            assert program.reversible == (name != "ddim" or n == 1)
            scale = 1.0 if name in ("ddim", "bdia") else None
            assert program.start[program.input] == (scale or schedule.scale[first])
            assert program.start[1 - program.input] is None
            assert program.end[program.output] == (scale or schedule.scale[last])
            timesteps = {u.timestep for u in program.updates if u.node is not None}
            called = range(1, n + 1) if direction == "sample" or name == "edict" else range(n)
            # its second call is at the other end of the step
            called = range(n + 1) if name == "mccallum_foster" else called
            assert timesteps == {schedule.timesteps[i] for i in called}


def test_ddim_has_no_inverse():
    with pytest.raises(ValueError, match="ddim is not reversible: update 1 overwrites track 0"):
        ddim(stable_diffusion(2)).inverse()


@pytest.mark.parametrize("direction", ["sample", "invert"])
@pytest.mark.parametrize("solver", [bdia, edict, mccallum_foster, obelm])
def test_inverse_of_inverse(solver, direction):
    program = solver(stable_diffusion(9), direction=direction)
    once, twice = program.inverse(), program.inverse().inverse()
    assert once.name == f"inverse of {program.name}" and twice.name == program.name
    assert once.start == program.end and once.end[once.output] == program.start[program.input]
    # all but the update that started the second track
    assert twice.updates == program.updates[1:]
    assert (twice.start, twice.end) == (once.end, once.start)
    assert twice.inverse() == once and twice.inverse().fingerprint == once.fingerprint


@pytest.mark.parametrize("solver", [ddim, bdia, obelm])
def test_one_step_is_undone_by_doing_nothing(solver):
    program = solver(stable_diffusion(1))
    inverse = program.inverse()
    assert inverse.updates == () and inverse.start == inverse.end == program.end
    assert (inverse.input, inverse.output) == (program.output, program.input)
    assert inverse.amplification == 1 and inverse.max_buffer == 0 and inverse.model_calls == 0
    assert inverse.coefficients().shape == (0, 4)
    assert inverse.coefficients([1.0, 2.0]).shape == (0, 2, 4)
    assert len(str(inverse).splitlines()) == 2


def sample_program(**changes) -> Program:
    update = Update(
        track=0,
        a=Fraction(1, 2),
        b=0.25,
        c=0.125,
        node=3,
        timestep=41,
        model_scale=0.75,
        before=0.5,
        after=0.875,
    )
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(update, name)}
    options = {
        "name": "test",
        "updates": (dataclasses.replace(update, **fields), Update(1, Fraction(1), 0.5)),
        "start": (1.0, 2.0),
        "input": 0,
        "output": 1,
        "order": 1,
    }
    return Program(**{**options, **changes})


STAGE = Stage(0.5, node=2.5, timestep=30.5, p=0.25, q=(0.75,))

CHANGES = [
    {"later": (STAGE,)},
    {"a": Fraction(0), "recall": (0.5, 0.25)},
    {"a": Fraction(0), "recall": (0.5, np.nextafter(0.25, 1))},
    *(
        {"later": (dataclasses.replace(STAGE, **change),)}
        for change in (
            {"c": np.nextafter(0.5, 1)},
            {"node": 2},
            {"timestep": 30},
            {"p": np.nextafter(0.25, 1)},
            {"q": (np.nextafter(0.75, 1),)},
        )
    ),
    {"a": Fraction(1, 3)},
    {"b": np.nextafter(0.25, 1)},
    {"c": np.nextafter(0.125, 1)},
    {"node": 4},
    {"timestep": 42},
    # an integer and a float are different inputs to a model
    {"timestep": 41.0},
    {"model_scale": np.nextafter(0.75, 1)},
    {"before": np.nextafter(0.5, 1)},
    {"after": np.nextafter(0.875, 1)},
    {"inverse": True},
    {"track": 1},
    {"start": (1.0, np.nextafter(2.0, 3))},
    {"input": 1},
    {"output": 0},
]


def test_fingerprint_changes_with_every_number():
    prints = [sample_program(**change).fingerprint for change in [{}, *CHANGES]]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)


def test_fingerprint_is_stable():
    # saved states carry it: a change here makes every saved state foreign
    expected = "39c3810dbe0ff0beb4863473562343f76eb65a76d204b6812894cee386c53947"
    assert sample_program().fingerprint == expected
    assert sample_program(name="other", order=2).fingerprint == expected
    # the same numbers in numpy's types
    assert sample_program(b=np.float64(0.25), c=np.float64(0.125)).fingerprint == expected


def test_solvers_are_deterministic():
    for solver in SOLVERS.values():
        first, second = (solver(stable_diffusion(20)) for _ in range(2))
        assert first == second and first.fingerprint == second.fingerprint
    prints = {
        solver(stable_diffusion(n), direction=d).fingerprint
        for solver, n, d in itertools.product(SOLVERS.values(), (19, 20), ("sample", "invert"))
    }
    assert len(prints) == 4 * len(SOLVERS)


def test_printing():
    text = str(bdia(stable_diffusion(3, steps_offset=1), gamma=0.94))
    head, columns, *rows = text.splitlines()
    assert head.startswith("bdia(gamma=47/50): 3 model calls, order 1, amplification ")
    assert head.endswith(", reversible")
    assert columns.split() == ["#", "track", "op", "a", "b", "c", "timestep"]
    assert [row.split()[-1] for row in rows] == ["667", "334", "1"]
    assert rows[0].split()[:6] == ["0", "x0", "<-", "x1", "update", "0"]
    assert rows[1].split()[:6] == ["1", "x1", "<-", "x0", "update", "47/50"]
    assert "not reversible" in str(ddim(stable_diffusion(3)))
    assert "inverse" in str(bdia(stable_diffusion(3)).inverse()).splitlines()[2]


def staged_program() -> Program:
    third = Stage(0.0625, node=1, timestep=7, p=2.0, q=(0.0, 0.3))
    fourth = Stage(0.03125, node=1, timestep=7, p=3.0, q=(0.0, 0.0, 0.0))
    fifth = Stage(0.1, node=1, timestep=7, p=4.0, q=(0.1, 0.2, 0.0, 0.4))
    return sample_program(later=(STAGE, third, fourth, fifth))


def test_stages_as_rows():
    program = staged_program()
    update, plain = program.updates
    assert [stage.p for stage in update.stages] == [0.75, 0.25, 2.0, 3.0, 4.0]
    assert update.stages[0] == Stage(0.125, 3, 41, 0.75) and plain.stages == ()
    assert program.model_calls == 5
    assert update.sources == ((0,), (1,), (0,), (0, 1, 3))
    adding = [(1.0, 0.0, c) for c in (0.5, 0.0625, 0.03125, 0.1)]
    points = [(0.25, 0.0, 0.75), (2.0, 0.0, 0.3), (3.0, 0.0, 0.0)]
    points += [(4.0, 0.0, 0.1), (1.0, 0.0, 0.2), (1.0, 0.0, 0.4)]
    expected = np.array([(0.5, 0.25, 0.125), *adding, *points, (1.0, 0.5, 0.0)])
    assert list(map(len, (update.rows, plain.rows))) == [11, 1]
    np.testing.assert_array_equal(program.coefficients()[:, :3], expected)
    w = np.array([3.0, 1.0])
    rows = program.coefficients(w)
    assert rows.shape == (12, 2, 4)
    np.testing.assert_array_equal(rows[..., :2], expected[:, None, :2].repeat(2, axis=1))
    np.testing.assert_array_equal(rows[..., 2], expected[:, 2:] * (1 - w))
    np.testing.assert_array_equal(rows[..., 3], expected[:, 2:] * w)


def test_printing_stages():
    lines = str(staged_program()).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert lines[3].split() == ["+", "m_1", "0.50000000", "30.5"]
    assert lines[6].split() == ["+", "m_4", "0.10000000", "7"]
    # under the column of c
    assert lines[3].index("0.50000000") == lines[2].index("0.12500000")


# --- Checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"track": 2}, "track must be 0 or 1, got 2"),
        ({"a": Fraction(-1)}, "a must be a rational"),
        ({"a": Fraction(1, 2**16 + 1)}, "a must be a rational with terms up to 65536"),
        ({"a": Fraction(2**16 + 1, 2)}, "a must be a rational"),
        ({"a": Fraction(0), "inverse": True}, "has no inverse"),
        ({"b": np.nan}, "coefficients must be finite"),
        ({"c": np.inf}, "coefficients must be finite"),
        ({"frozen": (1.0, np.nan)}, "coefficients must be finite"),
        ({"node": None}, "without a model call must have c = 0"),
        ({"frozen": (0.0, 1.0)}, "frozen must scale the track as a does"),
        (
            {"later": (Stage(1.0, 1, 3, p=1.0),)},
            r"stage 1 must have q for each of the 1 .*got \(\)",
        ),
        ({"later": (Stage(1.0, 1, 3, 1.0, (np.nan,)),)}, "coefficients must be finite"),
        ({"later": (Stage(np.inf, 1, 3, 1.0, (1.0,)),)}, "coefficients must be finite"),
        ({"node": None, "c": 0.0, "later": (STAGE,)}, "must have no later stages"),
        ({"recall": (1.0, 0.0)}, r"recall needs a = 0 and a model call, got \(1.0, 0.0\)"),
        ({"a": Fraction(0), "recall": (np.nan, 0.0)}, "coefficients must be finite"),
    ],
)
def test_an_update_checks_itself(fields, message):
    good = Update(0, Fraction(1), 0.5, c=0.5, node=1, timestep=3)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": (None, 1.0)}, "the input track must hold something"),
        ({"start": (1.0, None)}, "update 0 reads track 1, which holds nothing"),
        ({"input": 1, "start": (None, 1.0)}, "update 0 changes track 0, which holds nothing"),
        (
            {"a": Fraction(0), "recall": (1.0, 0.0), "input": 1, "start": (None, 1.0)},
            "update 0 changes track 0, which holds nothing",
        ),
        ({"updates": (), "start": (1.0, None)}, "the output track holds nothing at the end"),
        ({"input": 2}, "input and output must be 0 or 1, got 2 and 1"),
        ({"output": -1}, "input and output must be 0 or 1"),
    ],
)
def test_a_program_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        sample_program(**fields)


def test_without_frozen_the_coefficients_stand_for_themselves():
    update = Update(0, Fraction(1, 4), 0.5)
    assert update.frozen_coefficients == (0.25, 0.5)
    program = Program("test", (update,), (1.0, 1.0), 0, 0, 1)
    assert program.amplification == 1
    # x⁰ ← (x⁰ − x¹/2) · 4
    assert program.inverse().amplification == 6


@pytest.mark.parametrize(
    ("solver", "name"), [(bdia, "gamma"), (edict, "p"), (mccallum_foster, "zeta")]
)
def test_a_weight_that_is_no_number_is_named(solver, name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got 'abc'"):
        solver(stable_diffusion(4), **{name: "abc"})
