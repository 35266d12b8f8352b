"""All objectives: value and gradient against their formulas, and what a trainer relies on."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast.losses import OBJECTIVES, dpo_loss, dspo_loss, kto_loss, mapo_loss, smpo_loss
from tests.losses.cases import CASES, LN2, LOG_SIGMOID, PAIRS, PREFERENCE, SHAPE, Case, batch, dspo

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)


def test_every_objective_has_a_case_and_the_registry_says_how_to_call_it():
    assert CASES.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        parameters = inspect.signature(objective.function).parameters
        assert list(parameters)[:3] == ["policy", "reference", "target"]
        assert {"reduction", "impl"} <= parameters.keys()
        required = {
            key
            for key, value in parameters.items()
            if value.kind is value.KEYWORD_ONLY and value.default is value.empty
        }
        # what has no default is an input, or a setting that the registry proposes
        assert required == {*objective.inputs, *(objective.defaults.keys() & {"beta"})}, name
        assert objective.defaults.keys() <= parameters.keys()
        taken = [key for key in ("preference", "label_smoothing") if key in parameters]
        assert taken == ([objective.probability] if objective.probability else [])


def close(value, rival, exact):
    """The error of `value` is at most twice that of plain torch in the same precision, or what one
    rounding of the result would give: both against float64."""
    eps = torch.finfo(value.dtype).eps
    error = (value.double() - exact).abs().max()
    if value.dtype == torch.float64:
        # no more precise oracle: β (20) times the rounding of errors of up to 3, summed in two
        # orders, or T (1000) times that of MaPO's odds
        allowed = 1000 * eps * exact.abs().max()
    else:
        allowed = 2 * ((rival.double() - exact).abs().max() + 2 * eps * exact.abs().max())
    assert error <= allowed, (error, allowed)


@every
@dtypes
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_value_and_gradient_are_those_of_the_formula(case, dtype, impl):
    policy, reference, target = batch(dtype=dtype)
    exact_policy = policy.double().requires_grad_()
    exact = case.plain(exact_policy, reference.double(), target.double())
    weights = torch.linspace(1, 2, len(exact), dtype=torch.float64)
    (exact_gradient,) = torch.autograd.grad((exact * weights).sum(), exact_policy)

    # the rival has float32 residuals too; plain 16-bit arithmetic would be far worse
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rival_policy = policy.clone().requires_grad_()
    rival = case.plain(rival_policy.to(wide), reference.to(wide), target.to(wide))
    (rival_gradient,) = torch.autograd.grad((rival * weights.to(wide)).sum(), rival_policy)

    policy.requires_grad_()
    result = case.loss(policy, reference, target, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad((result.loss * weights.to(wide)).sum(), policy)
    assert result.loss.dtype == wide and gradient.dtype == dtype
    close(result.loss, rival, exact)
    close(gradient, rival_gradient, exact_gradient)


@every
def test_gradcheck(case):
    policy, reference, target = batch(dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    # a slice of the outputs is enough for the elementwise backward, and quick
    small = [value[:, :1, :2, :1].contiguous() for value in (policy, reference, target)]
    weight = torch.rand((), generator=generator, dtype=torch.float64)

    def loss(policy):
        # not the last operation, so that the incoming gradient is not 1
        return case.loss(policy, *small[1:]).loss * weight

    if case.name == "kto":
        # the batch's KL is detached, so finite differences see it only where it is given
        case = Case("kto", case.formula, {**case.settings, "kl": torch.tensor(0.1)}, case.inputs)
    assert torch.autograd.gradcheck(loss, (small[0].requires_grad_(),))


@pytest.mark.parametrize("name", LOG_SIGMOID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_policy_equal_to_its_reference(name, dtype, impl):
    policy, _, target = batch(dtype=dtype)
    for beta in (1.0, 5000.0):
        settings = {**CASES[name].given(torch.float32), "beta": beta}
        result = OBJECTIVES[name].function(policy, policy.clone(), target, impl=impl, **settings)
        assert abs(result.loss.item() - LN2) <= 1e-6
        assert result.accuracy.item() == 0.5 and (result.logits == 0).all()
        metrics = result.metrics()
        assert metrics["margin_mean"] == metrics["margin_std"] == metrics["saturated"] == 0
        assert metrics["policy_winner"] == metrics["reference_winner"]


@pytest.mark.parametrize("name", LOG_SIGMOID)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_policy_equal_to_its_reference_under_autocast(name, dtype):
    """Both branches by one network under autocast, the policy with gradient."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1))
    latents, target = torch.randn(2, 2 * PAIRS, 4, 6, 6)
    with torch.autocast("cpu", dtype):
        policy = network(latents)
        with torch.no_grad():
            reference = network(latents)
        inputs = CASES[name].given(torch.float32)
        result = OBJECTIVES[name].function(policy, reference, target, beta=5000.0, **inputs)
    assert policy.dtype == dtype and result.loss.dtype == torch.float32
    assert abs(result.loss.item() - LN2) <= 1e-6 and result.accuracy.item() == 0.5
    result.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


# DSPO moves the winner along its reference, Inversion-DPO does not look at the target
SIGNED = [name for name in CASES if name not in ("dspo", "inversion-dpo", "smpo")]


@pytest.mark.parametrize("name", SIGNED)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.9))
def test_a_better_winner_lowers_the_loss(name, seed, move):
    case = CASES[name]
    policy, reference, target = batch(dtype=torch.float64, seed=seed)
    # IPO and DMPO have an optimum at a finite margin: stay below it; MaPO's margin, times T = 1000,
    # may leave nothing to gain in float64
    changes = {"ipo": {"beta": 0.05}, "dmpo": {"beta": 0.05}, "mapo": {"num_train_timesteps": 10}}
    settings = {**case.settings, **changes.get(name, {})}
    case = Case(name, case.formula, settings, case.inputs)
    before = case.loss(policy, reference, target, reduction="none").loss
    better = policy.clone()
    if name == "kto":
        # the batch's own KL would move too: hold it
        case = Case(name, case.formula, {**settings, "kl": torch.tensor(0.0)}, case.inputs)
        before = case.loss(policy, reference, target, reduction="none").loss
        good = case.inputs["desirable"]
    else:
        good = torch.arange(2 * PAIRS) < PAIRS
    better[good] += move * (target - policy)[good]
    after = case.loss(better, reference, target, reduction="none").loss
    changed = good if name in ("kto", "sft") else slice(None)
    assert (after[changed] < before[changed]).all()
    if name != "sft":
        worse = policy.clone()
        worse[~good] += move * (target - policy)[~good]
        raised = case.loss(worse, reference, target, reduction="none").loss
        changed = ~good if name == "kto" else slice(None)
        assert (raised[changed] > before[changed]).all()


def test_smpo_follows_the_label_that_the_preference_gives():
    policy, reference, target = batch(dtype=torch.float64)
    better = policy.clone()
    better[:PAIRS] += 0.1 * (target - policy)[:PAIRS]
    options = {"beta": 1.0, "preference": PREFERENCE, "reduction": "none"}
    change = (
        smpo_loss(better, reference, target, **options).loss
        - smpo_loss(policy, reference, target, **options).loss
    )
    assert (change.sign() == -(PREFERENCE - 0.5).sign()).all()
    # p = 0.55 is InPO
    half = smpo_loss(policy, reference, target, beta=1.0, preference=torch.full((6,), 0.55))
    assert half.loss.item() == pytest.approx(
        dpo_loss(policy, reference, target, beta=1.0).loss.item(), rel=1e-7
    )


def test_smpo_official_takes_the_first_preference_for_the_batch():
    policy, reference, target = batch()
    preference = PREFERENCE.float()
    options = {"beta": 5.0, "reduction": "none"}
    official = smpo_loss(
        policy, reference, target, preference=preference, compat="official", **options
    )
    first = smpo_loss(policy, reference, target, preference=preference[:1].expand(6), **options)
    own = smpo_loss(policy, reference, target, preference=preference, **options)
    assert torch.equal(official.loss, first.loss)
    assert torch.equal(official.loss[0], own.loss[0])
    assert not torch.equal(official.loss[1:], own.loss[1:])


@every
def test_reductions(case):
    policy, reference, target = batch(dtype=torch.float64)
    none = case.loss(policy, reference, target, reduction="none").loss
    assert none.shape == ((PAIRS,) if case.objective.needs_pairs else (2 * PAIRS,))
    total = case.loss(policy, reference, target, reduction="sum").loss
    mean = case.loss(policy, reference, target).loss
    assert torch.equal(total, none.sum()) and torch.equal(mean, none.mean())


def gradients_of_micro_batches(case, policy, reference, target):
    """The gradient of the batch, and the mean over its pairs (or samples) one by one."""
    policy = policy.clone().requires_grad_()
    (together,) = torch.autograd.grad(case.loss(policy, reference, target).loss, policy)
    count = PAIRS if case.objective.needs_pairs else 2 * PAIRS
    mean = torch.zeros_like(together)
    for i in range(count):
        rows = [i, PAIRS + i] if case.objective.needs_pairs else [i]

        def pick(length, i=i, rows=rows):
            return rows if length == 2 * PAIRS else [i]

        alone = case.loss(policy[rows], reference[rows], target[rows], rows=pick)
        mean += torch.autograd.grad(alone.loss, policy)[0] / count
    return together, mean


@pytest.mark.parametrize("name", [name for name, o in OBJECTIVES.items() if o.additive])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_has_the_mean_gradient_of_its_pairs(name, dtype):
    case = CASES[name]
    together, mean = gradients_of_micro_batches(case, *batch(dtype=dtype))
    # the errors of a sample do not depend on the batch; what is left are the roundings of the
    # division by the number of pairs and of at most two elementary functions, of weights that
    # DSPO's cancelling sum magnifies (β² e, see its docstring)
    eps = torch.finfo(dtype).eps
    allowed = 16 * eps * together.abs().max() * (25 if name == "dspo" else 1)
    assert (together - mean).abs().max() <= allowed


def test_the_exceptions_depend_on_the_batch():
    policy, reference, target = batch(dtype=torch.float64)
    # KTO compares with the mean gain of the batch, unless it is given
    # a policy that is better than its reference, or the KL is clamped at 0 for all
    policy = policy + 0.2 * (target - policy)
    case = CASES["kto"]
    together, mean = gradients_of_micro_batches(case, policy, reference, target)
    assert (together - mean).abs().max() > 1e-3 * together.abs().max()
    held = Case("kto", case.formula, {**case.settings, "kl": torch.tensor(0.02)}, case.inputs)
    together, mean = gradients_of_micro_batches(held, policy, reference, target)
    assert (together - mean).abs().max() <= 1e-14 * together.abs().max()
    # DSPO's SDXL script looks at the batch mean of d_w: 0.1 lies between these two pairs
    gate = Case("dspo", dspo, {"beta": 5.0, "variant": "sdxl"})
    policy = reference.clone()
    policy[0] += 0.9
    policy[1:] += 0.01
    together, mean = gradients_of_micro_batches(gate, policy, reference, target)
    assert (together - mean).abs().max() > 0.1 * together.abs().max()


@every
def test_one_compilation_without_a_break(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(policy, reference, target):
        return case.loss(policy, reference, target)

    for seed in range(3):
        policy, reference, target = batch(seed=seed)
        compiled, eager = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        result = step(compiled, reference, target)
        result.loss.backward()
        expected = case.loss(eager, reference, target)
        expected.loss.backward()
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(compiled.grad, eager.grad)
        assert torch.equal(result.errors.e_theta, expected.errors.e_theta)
        assert result.metrics().keys() == expected.metrics().keys()
    assert counter.frame_count == 1


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a device: a Python number, or a shape that depends on data."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        return function(*args, **(kwargs or {}))


@every
def test_nothing_waits_for_the_device(case):
    policy, reference, target = batch()
    policy.requires_grad_()
    with NoSynchronisation():
        result = case.loss(policy, reference, target)
        result.loss.backward()
        metrics = result.metrics()
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    with pytest.raises(AssertionError), NoSynchronisation():
        result.loss.item()


def test_metrics():
    policy, reference, target = batch()
    policy[0] = target[0]
    policy[PAIRS] += 40.0
    result = dpo_loss(policy, reference, target, beta=20.0)
    metrics = result.metrics()
    u = result.logits
    assert metrics["margin_mean"] == u.mean() and metrics["margin_std"] == u.std(correction=0)
    # σ(±ln 99) = 0.99 and 0.01
    slope = torch.sigmoid(-u)
    saturated = ((slope < 0.01) | (slope > 0.99)).float().mean()
    assert metrics["saturated"] == saturated and 0 < saturated < 1
    e_theta, e_ref, _ = result.errors
    assert metrics["policy_winner"] == e_theta[:PAIRS].mean()
    assert metrics["reference_loser"] == e_ref[PAIRS:].mean()
    # one pair has no deviation, and it is 0 rather than NaN
    alone = dpo_loss(*(value[[1, 1 + PAIRS]] for value in (policy, reference, target)), beta=1.0)
    assert alone.metrics()["margin_std"] == 0
    single = CASES["sft"].loss(policy, reference, target).metrics()
    assert single.keys() == {"loss", "policy_error", "reference_error"}


def test_label_smoothing_and_soft_ties():
    policy, reference, target = batch(dtype=torch.float64)
    options = {"beta": 5.0, "reduction": "none"}
    right = dpo_loss(policy, reference, target, **options).loss
    order = [*range(PAIRS, 2 * PAIRS), *range(PAIRS)]
    wrong = dpo_loss(policy[order], reference[order], target[order], **options).loss
    smooth = dpo_loss(policy, reference, target, label_smoothing=0.1, **options).loss
    torch.testing.assert_close(smooth, 0.9 * right + 0.1 * wrong, rtol=1e-13, atol=0)
    each = torch.tensor([0, 0.5, 0, 0.5, 1, 0.25], dtype=torch.float64)
    soft = dpo_loss(policy, reference, target, label_smoothing=each, **options).loss
    torch.testing.assert_close(soft, (1 - each) * right + each * wrong, rtol=1e-13, atol=0)
    # a soft tie is the same whichever image is called the winner
    torch.testing.assert_close(soft[1], (right[1] + wrong[1]) / 2, rtol=1e-13, atol=0)


def test_ties_of_the_accuracy_count_half():
    policy, reference, target = batch(4)
    policy[[0, 4, 1, 5]] = reference[[0, 4, 1, 5]]
    policy[2] = target[2]
    policy[6] = reference[6]
    policy[3], policy[7] = reference[3], target[7]
    assert dpo_loss(policy, reference, target, beta=5.0).accuracy.item() == (0.5 + 0.5 + 1 + 0) / 4


def test_mapo_at_a_hopeless_output():
    """Where e^x is infinite in float32."""
    policy, _, target = batch()
    policy = (policy + 1e3).requires_grad_()
    result = mapo_loss(policy, None, target, beta=0.1)
    (gradient,) = torch.autograd.grad(result.loss, policy)
    assert result.loss.isfinite() and gradient.isfinite().all()


def test_mapo_at_a_perfect_output():
    policy, _, target = batch(dtype=torch.float64)
    policy[0] = target[0]
    policy.requires_grad_()
    result = mapo_loss(policy, None, target, beta=0.1)
    (gradient,) = torch.autograd.grad(result.loss, policy)
    assert result.loss.isfinite() and gradient.isfinite().all()
    # e = 0 has no gradient of its own
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: dpo_loss(*a, beta=1.0, reduction="max"), ValueError, "reduction must be one of"),
        (
            lambda a: dpo_loss(*a, beta=1.0, beta_convention="half"),
            ValueError,
            "beta_convention must be one of .* got 'half'",
        ),
        (lambda a: dpo_loss(*a, beta=1.0, anchor=-1.0), ValueError, "anchor must be finite"),
        (
            lambda a: dpo_loss(*a, beta=1.0, label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (
            lambda a: dpo_loss(*a, beta=1.0, label_smoothing=torch.zeros(5)),
            ValueError,
            r"label_smoothing must be \[6\], got \(5,\)",
        ),
        (lambda a: dpo_loss(a[0], None, a[2], beta=1.0), TypeError, "reference must be a tensor"),
        (lambda a: CASES["ipo"].objective.function(*a, beta=0.0), ValueError, "beta must be fin"),
        (
            lambda a: smpo_loss(*a, beta=1.0, preference=[0.5] * 6),
            TypeError,
            "preference must be a tensor, got list",
        ),
        (
            lambda a: smpo_loss(*a, beta=1.0, preference=torch.ones(6), compat="paper"),
            ValueError,
            "compat must be None or 'official', got 'paper'",
        ),
        (
            lambda a: CASES["dmpo"].objective.function(*a, beta=1.0, alpha=1.0),
            ValueError,
            r"alpha must be in \(0, 1\), got 1.0",
        ),
        (lambda a: dspo_loss(*a, beta=1.0, variant="sd3"), ValueError, "variant must be 'sd15'"),
        (
            lambda a: OBJECTIVES["inversion-dpo"].function(
                *a, beta=1.0, alphas_cumprod=torch.ones(12), num_levels=4
            ),
            ValueError,
            "num_levels must divide the 6 rows of the winners, got 4",
        ),
        (
            lambda a: kto_loss(*a, beta=1.0, desirable=torch.ones(6)),
            ValueError,
            r"desirable must be \[12\], got \(6,\)",
        ),
        (
            lambda a: kto_loss(*a, beta=1.0, desirable=torch.ones(12), kl=torch.zeros(12)),
            ValueError,
            r"kl must be a scalar without gradient, got shape \(12,\)",
        ),
        (
            lambda a: kto_loss(*a, beta=1.0, desirable=torch.ones(12), kl=-0.1),
            ValueError,
            "kl must be finite and at least 0, got -0.1",
        ),
        (lambda a: dpo_loss(*a, beta="a"), TypeError, "beta must be a number, got 'a'"),
        (lambda a: mapo_loss(*a, beta=1.0, snr=0.0), ValueError, "snr must be finite and positive"),
        (
            lambda a: CASES["sft"].objective.function(a[0], a[1][:1], a[2]),
            ValueError,
            "^reference must have the shape of policy",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(batch())


def test_ktos_kl_may_be_a_number():
    given, desirable = batch(6), torch.arange(12) % 2
    one, other = (
        kto_loss(*given, beta=1.0, desirable=desirable, kl=kl).loss
        for kl in (0.25, torch.tensor(0.25))
    )
    assert torch.equal(one, other)


def test_inversion_dpo_averages_the_levels_of_a_sample():
    levels = 3
    policy, reference, target = batch(4 * levels, dtype=torch.float64)
    bars = torch.rand(8 * levels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bars = bars + 0.1
    result = OBJECTIVES["inversion-dpo"].function(
        policy,
        reference,
        target,
        beta=20.0,
        alphas_cumprod=bars,
        num_levels=levels,
        reduction="none",
    )
    for p in range(4):
        total = 0.0
        for k in range(levels):
            w, loser = p * levels + k, (4 + p) * levels + k
            distance = {i: ((policy[i] - reference[i]) ** 2).mean() for i in (w, loser)}
            total += (distance[w] / (2 * bars[w]) - distance[loser] / (2 * bars[loser])) / levels
        expected = math.log1p(math.exp(-10.0 * total))
        assert result.loss[p].item() == pytest.approx(expected, rel=1e-12)


def test_shapes_do_not_matter():
    policy, reference, target = batch()
    flat = [value.reshape(2 * PAIRS, -1) for value in (policy, reference, target)]
    for convention in ("dpo/half", "dpo/full", "sum/half"):
        options = {"beta": 0.5, "beta_convention": convention}
        assert torch.equal(
            dpo_loss(policy, reference, target, **options).loss, dpo_loss(*flat, **options).loss
        )
    assert math.prod(SHAPE) == flat[0].shape[1]
