"""Registration with torch: opcheck, fake kernels, one compilation, what an import may do."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from inpo_fast import ops
from inpo_fast.lattice import ratio_row
from inpo_fast.ops.registration import OPS, REFERENCE, SCHEMAS
from tests.ops import cases

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def samples(name, dtype, layout):
    """Arguments of the operator of this name, in schema order."""
    rng = cases.generator(0)
    shape = (2, 3, 4, 5)
    wide = F64 if dtype == F64 else F32
    x, y, m1, m2 = (layout(cases.floats(shape, dtype, rng)) for _ in range(4))
    status = ops.new_status(1)[0]
    if name.startswith("affine"):
        yield x, y, m1, m2, cases.rows(None, wide, rng), status
        yield x, y, m1, None, cases.rows(2, wide, rng), None
        yield x, y, None, None, cases.rows(2, wide, rng), None
        return
    if name == "preference_errors":
        yield x, y, m1
        yield x, None, m1
        return
    if name == "preference_backward":
        a, b = (cases.floats((2,), wide, rng) for _ in range(2))
        yield x, y, m1, a, b
        yield x, None, m1, a, b
        return
    if name == "lattice_encode":
        yield x, cases.floats((2,), F32, rng), 20, status
        return
    z, zy = (layout(cases.lattice(shape, rng)) for _ in range(2))
    if name == "lattice_decode":
        yield z, cases.floats((1,), F32, rng), 20, 1, dtype
        yield z, cases.floats((2,), F32, rng), 20, 2, dtype
        return
    if dtype == F64:
        return
    coef = cases.rows(2, F32, rng)
    if "scaled" in name:
        buffer = layout(torch.randint(0, 2**40, shape, generator=rng))
        yield z, buffer, zy, m1, m2, coef, cases.ratios(None, rng), 20, status
        return
    yield z, zy, m1, None, coef, 20, status


@pytest.mark.parametrize(
    ("layout", "dtypes"), [("contiguous", (F64, F32, F16)), ("sliced", (BF16,))]
)
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, layout, dtypes):
    torch.use_deterministic_algorithms(False)  # opcheck compares with uncompiled results
    for dtype in dtypes:
        for arguments in samples(name, dtype, cases.LAYOUTS[layout]):
            torch.library.opcheck(OPS[name], arguments)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_fake_kernel_has_the_layout_of_the_others(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in cases.LAYOUTS.values():
        for arguments in samples(name, BF16, layout):
            real = REFERENCE[name](*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [
                    mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments
                ]
                fake = OPS[name](*fakes)
            if real is None:
                assert fake is None
                continue
            pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
            for one, two in pairs:
                assert one.shape == two.shape and one.dtype == two.dtype
                assert one.stride() == two.stride()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_one_compilation_for_fifty_steps(impl):
    """With new coefficients, ratios, scales and status words in each step, inference."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if impl == "reference" else "aot_eager")

    def step(x, y, m, z, zy, buffer, coef, ratio, scale, status):
        options = {"status": status, "impl": impl}
        x = ops.affine_update(x, y, coef, m, m, **options)
        x = ops.affine_inverse_(x, y, coef, m, **options)
        z = ops.lattice_update(z, zy, coef, m, **options)
        z, buffer = ops.lattice_scaled_update(z, buffer, zy, coef, ratio, m, m, **options)
        ops.lattice_inverse_(z, zy, coef, m, **options)
        decoded = ops.lattice_decode(z, scale, F16, copies=2, impl=impl)
        encoded = ops.lattice_encode(x, scale, **options)
        return x, z, buffer, decoded, encoded, ops.preference_errors(x, y, m, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rng = cases.generator(0)
    status = ops.new_status(100)
    for i in range(50):
        x, y, m = (cases.floats((2, 4, 8, 8), F32, rng) for _ in range(3))
        z, zy = (cases.lattice((2, 4, 8, 8), rng) for _ in range(2))
        buffer = torch.zeros(2, 4, 8, 8, dtype=torch.int64)
        rows = cases.rows(None, F32, rng), torch.from_numpy(ratio_row(93 + i, 100))
        arguments = [x, y, m, z, zy, buffer, *rows, torch.rand((), generator=rng)]
        got = compiled(*arguments, status[i])
        expected = step(*arguments, status[50 + i])
        for one, two in zip(got[:5], expected[:5], strict=True):
            assert torch.equal(one, two)
        for one, two in zip(got[5], expected[5], strict=True):
            torch.testing.assert_close(one, two)
    assert torch.equal(status[:50], status[50:])
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_one_compilation_in_training(impl):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(weight, x, y, m, coef, status):
        x = ops.affine_update(x, y, coef, m * weight, status=status, impl=impl)
        errors = ops.preference_errors(x, y, m, impl=impl)
        return torch.nn.functional.logsigmoid(errors.e_theta - errors.e_ref + errors.d).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    rng = cases.generator(1)
    status = ops.new_status(1)[0]
    for _ in range(12):
        x, y, m = (cases.floats((2, 3, 4, 4), F32, rng) for _ in range(3))
        coef = cases.rows(None, F32, rng)
        weights = [torch.ones((), requires_grad=True) for _ in range(2)]
        compiled(weights[0], x, y, m, coef, status).backward()
        loss(weights[1], x, y, m, coef, status).backward()
        torch.testing.assert_close(weights[0].grad, weights[1].grad)
    assert counter.frame_count == 1


def run_python(code, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_import_needs_torch_and_numpy_only_and_is_silent():
    blocked = "triton diffusers transformers accelerate pybind11 safetensors tqdm"
    code = (
        "import sys\n"
        f"for name in {blocked.split()!r}: sys.modules[name] = None\n"
        "import torch; sys.modules.setdefault('inpo_fast', type(sys)('inpo_fast'))\n"
        "import importlib.util\n"
        "root = importlib.util.find_spec('torch')\n"
        "sys.modules['inpo_fast'].__path__ = [PATH]\n"
        "import inpo_fast.ops\n"
        "assert 'torch._inductor' not in sys.modules\n"
    )
    from pathlib import Path

    package = Path(ops.__file__).parents[1]
    assert run_python(code.replace("PATH", repr(str(package)))) == ""


def test_environment_variable_chooses_what_auto_is():
    code = (
        "import torch, inpo_fast.ops as ops\n"
        "x = torch.zeros(2, 3)\n"
        "try: ops.affine_update(x, x, torch.ones(4)); print('ran')\n"
        "except ValueError as error: print(error)\n"
    )
    assert run_python(code, INPO_FAST_IMPL="reference") == "ran\n"
    said = run_python(code, INPO_FAST_IMPL="fastest")
    assert "INPO_FAST_IMPL must be one of auto, reference" in said and "'fastest'" in said


def test_without_the_extension_the_reference_runs_and_native_says_why():
    code = (
        "import sys; sys.modules['inpo_fast._C'] = None\n"
        "import torch, inpo_fast.ops as ops\n"
        "x = torch.ones(2, 3)\n"
        "assert ops.affine_update(x, x, torch.ones(4)).sum() == 12\n"
        "assert ops.build_info() is None and not ops.backends()['native'].available\n"
        "try: ops.affine_update(x, x, torch.ones(4), impl='native')\n"
        "except ValueError as error: print(error)\n"
    )
    assert "impl='native' is not available: " in run_python(code)


def test_build_info():
    info = ops.build_info()
    if info is None:
        pytest.skip(ops.backends()["native"].reason)
    assert info["torch_target_version"] == "2.11.0"
    assert "cpu" in info["devices"] and "-ffp-contract=off" in info["flags"]
    assert info["cuda_architectures"] == [] or "cuda" in info["devices"]
    assert info["compiler"] and info["torch_version"]
