"""The Triton kernels in Triton's interpreter, on the CPU, against the reference.

Triton decides at its import whether kernels are interpreted, so these tests have a process of their
own: test_triton_interpreter.py starts it, with TRITON_INTERPRET=1.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from inpo_fast import ops
from inpo_fast.ops.registration import KERNELS
from tests.ops import cases, equality, programs, test_autograd, test_preference, test_semantics
from tests.ops.equality import BF16, F16, F32, F64

# The interpreter computes with numpy, which warns where a test means to overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

LAYOUTS = [cases.contiguous, cases.sliced, cases.batch_inside]


@pytest.fixture
def impl():
    return "triton"


def assert_same(calls, stride=1):
    """Compare every ``stride``-th call; the strides here are no divisors of how calls repeat."""
    for call in itertools.islice(calls, 0, None, stride):
        equality.assert_same(call, (KERNELS["triton"], "cpu"))


def test_the_backend_says_that_it_is_interpreted():
    available, reason = ops.backends()["triton"]
    assert available and reason.endswith("in its interpreter")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", equality.DTYPES, ids=str)
def test_kernels(dtype, layout):
    stride = 19 if layout is cases.contiguous else 7
    for inverse in (False, True):
        assert_same(equality.affine(dtype, layout, inverse), stride)
        if dtype != F64:
            assert_same(equality.lattice(dtype, layout, inverse), stride)
    assert_same(equality.encode_and_decode(dtype, layout), 7)
    assert_same(equality.preference_backward(dtype, layout), 3)


def test_operands():
    assert_same(equality.different_layouts(stride=20))
    assert_same(equality.other_dimensions())
    assert_same(equality.strided_constants())


def test_values():
    for dtype in equality.DTYPES:
        assert_same(equality.special_values(dtype), 29)
    assert_same(equality.every_16_bit_value(stride=23))


test_the_edges_of_int32 = test_semantics.test_the_edges_of_int32
test_scale_at_the_edges = test_semantics.test_scale_at_the_edges
test_rounding_is_half_to_even = test_semantics.test_rounding_is_half_to_even
test_encode_flags = test_semantics.test_encode_flags
test_decode_rounds = test_semantics.test_decode_rounds_to_float32_before_the_model_dtype
test_a_backward_refuses = test_autograd.test_a_backward_refuses_what_an_operator_has_changed
test_errors_against_float64 = test_preference.test_errors_against_float64
test_without_a_reference = test_preference.test_without_a_reference_its_errors_are_zero
test_empty_samples_have_no_mean = test_preference.test_empty_samples_have_no_mean
test_nan_stays_in_its_sample = test_preference.test_nan_stays_in_its_sample
test_the_margin = test_preference.test_the_margin_is_that_of_the_errors
test_errors_of_a_sample = test_preference.test_errors_of_a_sample_do_not_depend_on_its_batch


def test_several_blocks_of_sums():
    """More partial sums than are added side by side, in two ways of splitting a sample."""
    shape = (1, 129 * 4096 + 17)
    theta, ref, target = (cases.floats(shape, BF16, cases.generator(i)) for i in range(3))
    got = ops.preference_errors(theta, ref, target, impl="triton")
    expected = ops.preference_errors(theta, ref, target, impl="reference")
    for one, two in zip(got, expected, strict=True):
        # Both are exact to far below the one rounding to float32.
        assert ((one - two).abs() <= torch.finfo(F32).eps * two).all()


def test_bits_return():
    runs = [("triton", "reference"), ("reference", "triton"), ("triton", "triton")]
    for seed in range(200):
        spec = programs.random_spec(np.random.default_rng(seed), runs)
        # Long programs test no more of a kernel, and the interpreter is slow.
        programs.check(dataclasses.replace(spec, updates=1 + spec.updates // 40))


def test_one_compilation():
    torch.use_deterministic_algorithms(False)
    counter = CompileCounterWithBackend("aot_eager")

    def step(z, y, m, coef, status):
        z = ops.lattice_update(z, y, coef, m, status=status, impl="triton")
        ops.lattice_inverse_(y, z, coef, m, m, status=status, impl="triton")
        return z, ops.lattice_decode(z, coef[:1], F16, copies=2, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rng = cases.generator(0)
    for _ in range(12):
        z, y = (cases.lattice((2, 3, 4), rng) for _ in range(2))
        m, coef = cases.floats((2, 3, 4), BF16, rng), cases.rows(None, F32, rng)
        words = ops.new_status(2)
        ys = y.clone(), y.clone()
        got = compiled(z, ys[0], m, coef, words[0])
        assert cases.identical(got, step(z, ys[1], m, coef, words[1]))
        assert torch.equal(*ys) and torch.equal(words[0], words[1])
    assert counter.frame_count == 1
