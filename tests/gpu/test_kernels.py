"""On a GPU: CUDA, Triton and eager kernels give the bits of the CPU, without waiting for it."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from inpo_fast import ops
from inpo_fast.lattice import ratio_row
from inpo_fast.ops.registration import KERNELS, OPS, SCHEMAS
from tests.ops import cases, equality, programs
from tests.ops.equality import BF16, F16, F32, F64
from tests.ops.test_registration import samples

every_layout = pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
every_dtype = pytest.mark.parametrize("dtype", equality.DTYPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory(cuda):
    """Fill new memory with NaN, so that an element that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def assert_same(impl, device, calls):
    """The backend on the device against the reference on the CPU."""
    for call in calls:
        equality.assert_same(call, (KERNELS[impl], device))


@every_layout
@every_dtype
@pytest.mark.parametrize("inverse", [False, True])
def test_affine(impl, cuda, inverse, dtype, layout):
    assert_same(impl, cuda, equality.affine(dtype, layout, inverse))


@every_layout
@pytest.mark.parametrize("m_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_lattice(impl, cuda, inverse, m_dtype, layout):
    assert_same(impl, cuda, equality.lattice(m_dtype, layout, inverse))


@every_layout
@every_dtype
def test_encode_and_decode(impl, cuda, dtype, layout):
    assert_same(impl, cuda, equality.encode_and_decode(dtype, layout))


@every_layout
@every_dtype
def test_preference_backward(impl, cuda, dtype, layout):
    assert_same(impl, cuda, equality.preference_backward(dtype, layout))


def test_operands(impl, cuda):
    assert_same(impl, cuda, equality.different_layouts())
    assert_same(impl, cuda, equality.other_dimensions())
    assert_same(impl, cuda, equality.strided_constants())


@every_dtype
def test_special_values(impl, cuda, dtype):
    assert_same(impl, cuda, equality.special_values(dtype))


def test_every_16_bit_value(impl, cuda):
    assert_same(impl, cuda, equality.every_16_bit_value())


@every_layout
@every_dtype
def test_preference_errors(kernels, cuda, dtype, layout):
    """To one rounding: sums have an order of their own, which is the same in each run."""
    rng = cases.generator(0)
    for shape in [*cases.SHAPES, (3, 4, 113, 97), (2, 1, 800, 700)]:
        theta, ref, target = (layout(cases.floats(shape, dtype, rng)) for _ in range(3))
        for with_ref in (ref, None):
            expected = ops.preference_errors(theta, with_ref, target, impl="reference")
            moved = [t if t is None else t.to(cuda) for t in (theta, with_ref, target)]
            got = ops.preference_errors(*moved, impl=kernels)
            again = ops.preference_errors(*moved, impl=kernels)
            for one, two, three in zip(got, expected, again, strict=True):
                eps = torch.finfo(two.dtype).eps * (theta.numel() if dtype == F64 else 1)
                assert one.dtype == two.dtype
                torch.testing.assert_close(one.cpu(), two, rtol=eps, atol=0, equal_nan=True)
                assert cases.identical(one, three)


@pytest.mark.parametrize("part", range(4))
def test_random_programs(cuda, part):
    """``python -m tests.ops.soak --device cuda`` runs 10,000."""
    torch.use_deterministic_algorithms(False)
    runs = programs.runs_on(cuda)
    for seed in range(50 * part, 50 * part + 50):
        programs.check(programs.random_spec(np.random.default_rng(seed), runs), cuda)


def on(device, arguments):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(cuda, name):
    torch.use_deterministic_algorithms(False)
    for dtype in (F64, F32, F16, BF16):
        for arguments in samples(name, dtype, cases.contiguous):
            torch.library.opcheck(OPS[name], on(cuda, arguments))


def test_the_dispatcher_takes_the_fastest_kernels(cuda):
    """``torch.ops.inpo_fast`` on CUDA tensors gives what "auto" gives."""
    for name in SCHEMAS:
        for arguments in samples(name, F32, cases.contiguous):
            if name != "preference_errors":
                equality.assert_same((name, list(arguments), _mutated(name)), (OPS, cuda))


def _mutated(name):
    """Indices of the operands that an operator changes, from its schema."""
    schema = OPS[name]._schema
    return tuple(
        i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
    )


def test_one_compilation_for_fifty_steps(impl, cuda):
    """With new coefficients, ratios, scales and status words in each step."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def step(x, y, m, z, zy, buffer, coef, ratio, scale, status):
        options = {"status": status, "impl": impl}
        x = ops.affine_update(x, y, coef, m, m, **options)
        x = ops.affine_inverse_(x, y, coef, m, **options)
        z = ops.lattice_update(z, zy, coef, m, **options)
        z, buffer = ops.lattice_scaled_update(z, buffer, zy, coef, ratio, m, m, **options)
        ops.lattice_inverse_(z, zy, coef, m, **options)
        decoded = ops.lattice_decode(z, scale, F16, copies=2, impl=impl)
        return x, z, buffer, decoded, ops.lattice_encode(x, scale, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rng = cases.generator(0)
    status = ops.new_status(100, cuda)
    for i in range(50):
        x, y, m = (cases.floats((2, 4, 8, 8), F32, rng).to(cuda) for _ in range(3))
        z, zy = (cases.lattice((2, 4, 8, 8), rng).to(cuda) for _ in range(2))
        buffer = torch.zeros(2, 4, 8, 8, dtype=torch.int64, device=cuda)
        rows = cases.rows(None, F32, rng).to(cuda), torch.from_numpy(ratio_row(93 + i, 100))
        arguments = [x, y, m, z, zy, buffer, rows[0], rows[1].to(cuda), rows[0][0]]
        got = compiled(*arguments, status[i])
        expected = step(*arguments, status[50 + i])
        for one, two in zip(got, expected, strict=True):
            assert torch.equal(one, two)
    assert torch.equal(status[:50], status[50:])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_captured_graph_replays_with_new_values(kernels, cuda, name):
    torch.use_deterministic_algorithms(False)
    kernel = KERNELS[kernels][name]
    for arguments in samples(name, F32, cases.contiguous):
        static = on(cuda, arguments)
        first = [a.clone() if isinstance(a, torch.Tensor) else a for a in static]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            kernel(*first)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = kernel(*static)
        for round_ in range(2):
            for captured, value in zip(static, arguments, strict=True):
                if isinstance(captured, torch.Tensor):
                    changed = value if value.dtype == torch.int64 else value + round_
                    captured.copy_(changed if value.dim() > 1 or round_ == 0 else value)
            fresh = [a.clone() if isinstance(a, torch.Tensor) else a for a in static]
            graph.replay()
            expected = kernel(*fresh)
            assert cases.identical(_on_cpu(result), _on_cpu(expected))
            for captured, other in zip(static, fresh, strict=True):
                if isinstance(captured, torch.Tensor):
                    assert cases.identical(captured.cpu(), other.cpu())


def _on_cpu(result):
    if isinstance(result, tuple):
        return tuple(r.cpu() for r in result)
    return None if result is None else result.cpu()


@pytest.mark.parametrize("name", SCHEMAS)
def test_nothing_waits_for_the_device(kernels, cuda, no_sync, name):
    torch.use_deterministic_algorithms(False)
    for layout in (cases.contiguous, cases.sliced):
        for arguments in samples(name, F32, layout):
            moved = on(cuda, arguments)
            kernel = KERNELS[kernels][name]
            kernel(*moved)  # compiles
            torch.cuda.synchronize()
            with no_sync():
                kernel(*moved)


def test_public_functions_do_not_wait(kernels, cuda, no_sync):
    torch.use_deterministic_algorithms(False)
    rng = cases.generator(0)
    z, y = (cases.lattice((2, 4, 8, 8), rng).to(cuda) for _ in range(2))
    m, coef = cases.floats((2, 4, 8, 8), BF16, rng).to(cuda), cases.rows(None, F32, rng).to(cuda)
    status = ops.new_status(1, cuda)[0]

    def step():
        out = ops.lattice_update(z, y, coef, m, m, status=status, impl=kernels)
        ops.lattice_decode(out, coef[:1], BF16, copies=2, impl=kernels)
        theta = m.clone().requires_grad_()
        errors = ops.preference_errors(theta, m, m, impl=kernels)
        (errors.e_theta - errors.d).sum().backward()

    step()
    torch.cuda.synchronize()
    with no_sync():
        step()


def test_kernels_run_on_the_current_stream(kernels, cuda):
    """Behind slow work on a stream of its own, which the result depends on."""
    torch.use_deterministic_algorithms(False)
    z = torch.zeros(1 << 20, dtype=torch.int32, device=cuda)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0], device=cuda)
    m = torch.zeros(1 << 20, device=cuda)
    status = ops.new_status(1, cuda)[0]
    ops.lattice_update(z, z, coef, m, status=status, impl=kernels)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        m.fill_(1.0)
        out = ops.lattice_update(z, z, coef, m, status=status, impl=kernels)
    stream.synchronize()
    assert (out == 2**20).all()


def test_tensors_over_two_to_the_31_elements(kernels, cuda):
    """The last elements are right: addresses have 64 bits. It takes about 30 GB."""
    torch.use_deterministic_algorithms(False)
    n = 2**31 + 2**12
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    status = ops.new_status(1, cuda)[0]
    end = cases.floats((1, 2**12), BF16, cases.generator(0)).to(cuda)
    coef = torch.tensor([0.5, -2.0, 1.0, 0.0], device=cuda)

    def large(tail):
        t = torch.zeros(1, n, dtype=tail.dtype, device=cuda)
        t[:, -tail.shape[1] :] = tail
        return t

    x = large(end)
    out = ops.affine_update(x, x, coef, x, status=status, impl=kernels)
    expected = ops.affine_update(end, end, coef, end, status=status, impl="reference")
    assert torch.equal(out[:, -end.shape[1] :], expected)
    assert not out[:, : -end.shape[1]].any()
    by_sample = ops.affine_update(x, x, coef[None], x, status=status, impl=kernels)
    assert torch.equal(by_sample, out)
    del out, by_sample
    got = ops.preference_errors(x, None, torch.zeros_like(x), impl=kernels).e_theta
    exact = end.to(F64).square().sum(1) / n
    assert ((got.to(F64) - exact).abs() <= torch.finfo(F32).eps * exact).all()
    z = ops.lattice_encode(x, coef[:1], status=status, impl=kernels)
    tail = ops.lattice_encode(end, coef[:1], status=status, impl="reference")
    assert torch.equal(z[:, -end.shape[1] :], tail)
    ops.lattice_update_(z, z.clone(), coef, x, status=status, impl=kernels)
    ops.lattice_update_(tail, tail.clone(), coef, end, status=status, impl="reference")
    assert torch.equal(z[:, -end.shape[1] :], tail)
    back = ops.lattice_decode(z, coef[:1], BF16, copies=1, impl=kernels)
    expected = ops.lattice_decode(tail, coef[:1], BF16, copies=1, impl="reference")
    assert torch.equal(back[:, -end.shape[1] :], expected)
    assert status.item() == 0


def test_status_is_raised_from_any_block(kernels, cuda):
    x = torch.zeros(1, 2**18, device=cuda)
    coef = torch.tensor([1.0, 0.0, 1.0, 0.0], device=cuda)
    z = torch.zeros(1, 2**18, dtype=torch.int32, device=cuda)
    for place in (0, 2**17 + 5, 2**18 - 1):
        m = torch.zeros_like(x)
        m[0, place] = torch.inf
        words = ops.new_status(3, cuda)
        ops.affine_update(x, x, coef, m, status=words[0], impl=kernels)
        ops.lattice_update(z, z, coef, m, status=words[1], impl=kernels)
        m[0, place], m[0, place - 7] = 1e9, torch.nan
        ops.lattice_update(z, z, coef, m, status=words[2], impl=kernels)
        assert words.flatten().tolist() == [2, 2, 3]


def test_tensors_on_two_devices_are_refused(cuda):
    x = torch.zeros(2, 3, device=cuda)
    with pytest.raises(ValueError, match="coef must be on the device of x, cuda:0, got cpu"):
        ops.affine_update(x, x, torch.ones(4))
    with pytest.raises(ValueError, match="y must be on the device of x, cuda:0, got cpu"):
        ops.affine_update(x, x.cpu(), torch.ones(4, device=cuda))


def test_another_device_than_the_current_one(kernels, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    z = torch.arange(6, dtype=torch.int32, device="cuda:1").reshape(2, 3)
    coef, status = torch.ones(4, device="cuda:1"), ops.new_status(1, "cuda:1")[0]
    out = ops.lattice_update(z, z, coef, status=status, impl=kernels)
    assert torch.equal(out, 2 * z) and torch.cuda.current_device() == 0
