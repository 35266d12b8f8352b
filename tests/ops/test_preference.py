"""The preference reduction and its gradient."""

import itertools

import pytest
import torch

from inpo_fast import ops
from tests.ops import cases

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = [(2, 4, 8, 8), (3, 5, 7, 11), (1, 4, 64, 64), (2, 3, 113, 97), (4,), (5, 1), (0, 3)]


def operands(shape, dtype, target_dtype=None, seed=0):
    rng = cases.generator(seed)
    theta, ref = (cases.floats(shape, dtype, rng) for _ in range(2))
    return theta, ref, cases.floats(shape, target_dtype or dtype, rng)


def mean_square(first, second):
    return (
        (first.to(F64) - second.to(F64)).square().flatten(1).mean(1)
        if first.dim() > 1
        else ((first.to(F64) - second.to(F64)).square())
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_errors_against_float64(impl, dtype, shape):
    """A priori: a residual has one rounding in float32, its square twice that, the mean one more.

    Squares and sums are exact to float64, which adds the length of the sum times its epsilon.
    """
    wide = F64 if dtype == F64 else F32
    for target_dtype in {dtype, wide}:
        theta, ref, target = operands(shape, dtype, target_dtype)
        got = ops.preference_errors(theta, ref, target, impl=impl)
        pairs = [(theta, target), (ref, target), (theta, ref)]
        count = theta.numel() // max(shape[0], 1)
        unit = torch.finfo(wide).eps / 2
        bound = 3.1 * unit + (count + 3) * torch.finfo(F64).eps
        for value, (first, second) in zip(got, pairs, strict=True):
            exact = mean_square(first, second)
            assert value.dtype == wide and value.shape == shape[:1]
            assert ((value.to(F64) - exact).abs() <= bound * exact).all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_native_sums_are_those_of_the_reference_to_one_rounding(native, dtype):
    for shape, (name, layout) in itertools.product(SHAPES[:4], cases.LAYOUTS.items()):
        theta, ref, target = (layout(t) for t in operands(shape, dtype))
        for with_ref in (ref, None):
            got = ops.preference_errors(theta, with_ref, target, impl=native)
            expected = ops.preference_errors(theta, with_ref, target, impl="reference")
            eps = torch.finfo(got.d.dtype).eps
            bound = eps if dtype != F64 else theta.numel() * eps
            for one, two in zip(got, expected, strict=True):
                assert ((one - two).abs() <= bound * two).all(), name


def test_errors_do_not_depend_on_threads_or_on_the_processor(native):
    from inpo_fast import _C

    theta, ref, target = operands((3, 4, 113, 197), BF16, F32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads, simd in itertools.product((1, 2, 3), (True, False)):
            torch.set_num_threads(threads)
            _C.allow_simd(simd)
            results.append(ops.preference_errors(theta, ref, target, impl=native))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert cases.identical(tuple(result), tuple(results[0]))


def test_errors_of_a_sample_do_not_depend_on_its_batch(impl):
    theta, ref, target = operands((4, 4, 33, 31), F32)
    whole = ops.preference_errors(theta, ref, target, impl=impl)
    for i in range(4):
        alone = ops.preference_errors(*(t[i : i + 1] for t in (theta, ref, target)), impl=impl)
        for one, two in zip(alone, whole, strict=True):
            assert torch.equal(one[0], two[i])


def test_without_a_reference_its_errors_are_zero(impl):
    theta, _, target = operands((3, 4, 5, 5), F32)
    errors = ops.preference_errors(theta, None, target, impl=impl)
    assert errors.e_ref.tolist() == errors.d.tolist() == [0.0, 0.0, 0.0]
    assert (errors.e_theta > 0).all()


def test_empty_samples_have_no_mean(impl):
    theta = torch.empty(2, 0)
    errors = ops.preference_errors(theta, theta, theta, impl=impl)
    assert all(e.isnan().all() and e.shape == (2,) for e in errors)


def test_nan_stays_in_its_sample(impl):
    theta, ref, target = operands((3, 4, 9, 9), F32)
    theta[1, 2, 3, 4] = torch.nan
    errors = ops.preference_errors(theta, ref, target, impl=impl)
    assert errors.e_theta.isnan().tolist() == [False, True, False]
    assert not errors.e_ref.isnan().any()


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("with_ref", [True, False])
def test_gradient_is_that_of_plain_torch(impl, dtype, with_ref):
    """Error at most twice that of the same gradient in the dtype itself, plus its epsilon."""
    theta, ref, target = operands((3, 4, 9, 9), dtype)
    ref = ref if with_ref else None
    weights = cases.floats((2, 3), F64 if dtype == F64 else F32, cases.generator(9))

    def gradient(t, square):
        t = t.detach().requires_grad_()
        e_theta, d = square(t)
        (weights[0].to(e_theta.dtype) * e_theta).sum().add(
            (weights[1].to(d.dtype) * d).sum()
        ).backward()
        return t.grad

    def plain(wide):
        def square(t):
            pairs = [target, ref if with_ref else t.detach()]
            return [(t - p.to(wide)).square().flatten(1).mean(1) for p in pairs]

        return gradient(theta.to(wide), square)

    def ours(t):
        errors = ops.preference_errors(t, ref, target, impl=impl)
        return errors.e_theta, errors.d

    exact, rival, got = plain(F64), plain(dtype), gradient(theta, ours)
    assert got.dtype == dtype and torch.isfinite(got).all()
    error = (got.to(F64) - exact).abs().max()
    rival_error = (rival.to(F64) - exact).abs().max()
    assert error <= 2 * (rival_error + torch.finfo(dtype).eps * exact.abs().max())


def test_gradcheck(impl):
    theta, ref, target = operands((2, 3, 2, 2), F64)
    theta.requires_grad_()

    def scalar_functions(t):
        errors = ops.preference_errors(t, ref, target, impl=impl)
        return errors.e_theta.sin(), errors.d.exp()

    assert torch.autograd.gradcheck(scalar_functions, (theta,))


def test_the_reference_error_has_no_gradient(impl):
    theta, ref, target = operands((2, 3), F32)
    errors = ops.preference_errors(theta.requires_grad_(), ref, target, impl=impl)
    assert errors.e_theta.requires_grad and errors.d.requires_grad
    assert not errors.e_ref.requires_grad


def test_an_unused_error_contributes_nothing(impl):
    """Its incoming gradient is None or zero: the gradient is that of the other alone."""
    theta, ref, target = operands((2, 3, 4, 4), F64)
    theta.requires_grad_()
    ops.preference_errors(theta, ref, target, impl=impl).d.sum().backward()
    expected = 2 / 48 * (theta.detach() - ref)
    torch.testing.assert_close(theta.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_the_margin_is_that_of_the_errors(impl, dtype):
    """To the bit, with and without gradient: one order of operations in one dtype."""
    theta, ref, target = operands((6, 4, 5), dtype)
    for t in (theta, theta.clone().requires_grad_()):
        errors, margin = ops.preference_margin(t, ref, target, scale=-1000.0, impl=impl)
        plain = ops.preference_errors(theta, ref, target, impl=impl)
        assert cases.identical(tuple(e.detach() for e in errors), tuple(plain))
        winner, loser = (plain.e_theta - plain.e_ref).chunk(2)
        assert torch.equal(margin.detach(), (winner - loser) * -1000.0)
        assert margin.requires_grad == errors.e_theta.requires_grad == t.requires_grad
    _, margin = ops.preference_margin(ref, ref, target, scale=-1000.0, impl=impl)
    assert (margin == 0).all()


@pytest.mark.parametrize("differentiate_d", [True, False])
def test_gradcheck_of_the_margin(impl, differentiate_d):
    """Alone, where no other gradient comes in, and beside the gradients of the errors."""
    theta, ref, target = operands((4, 3, 2), F64)
    theta.requires_grad_()

    def alone(t):
        return ops.preference_margin(
            t, ref, target, scale=-3.0, differentiate_d=differentiate_d, impl=impl
        )[1].tanh()

    def beside(t):
        errors, margin = ops.preference_margin(
            t, ref, target, scale=-3.0, differentiate_d=differentiate_d, impl=impl
        )
        differentiable = (errors.e_theta, errors.d)[: 1 + differentiate_d]
        return *(e.sin() for e in differentiable), margin.tanh() + errors.e_theta[:2]

    assert torch.autograd.gradcheck(alone, (theta,))
    assert torch.autograd.gradcheck(beside, (theta,))


@pytest.mark.parametrize("differentiate_d", [True, False])
def test_the_compiled_margin_has_the_same_gradient(impl, differentiate_d):
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    theta, ref, target = operands((4, 3, 2), F32)
    theta.requires_grad_()

    def loss(t):
        errors, margin = ops.preference_margin(
            t, ref, target, scale=-3.0, differentiate_d=differentiate_d, impl=impl
        )
        return margin.sum() + (errors.d.sum() if differentiate_d else 0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(theta), theta)
    (got,) = torch.autograd.grad(compiled(theta), theta)
    assert torch.equal(got, expected)


def test_a_margin_needs_pairs_a_reference_and_a_number():
    theta, ref, target = operands((3, 2), F32)
    with pytest.raises(ValueError, match=r"theta must have an even batch, got \[3, 2\]"):
        ops.preference_margin(theta, ref, target, scale=1.0)
    with pytest.raises(TypeError, match=r"ref must be a torch.Tensor, got NoneType"):
        ops.preference_margin(theta[:2], None, target[:2], scale=1.0)
    with pytest.raises(TypeError, match=r"theta must be a torch.Tensor, got NoneType"):
        ops.preference_margin(None, ref, target, scale=1.0)
    with pytest.raises(TypeError, match="scale must be a number, got a tensor"):
        ops.preference_margin(theta[:2], ref[:2], target[:2], scale=torch.ones(()))
    errors, margin = ops.preference_margin(*(t[:0] for t in (theta, ref, target)), scale=1.0)
    assert errors.d.shape == margin.shape == (0,)
