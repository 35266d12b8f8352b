"""Wrong arguments: TypeError or ValueError that names the argument and says what came."""

import pytest
import torch

from inpo_fast import ops
from inpo_fast.ops.registration import EAGER, OPS
from tests.ops import cases

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def valid(name):
    shape = (2, 3, 4, 4)
    x, z = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    status = ops.new_status(1)[0]
    coef, ratio = torch.ones(4), cases.ratios(None, cases.generator(0))
    if name == "affine_update":
        return {"x": x, "y": x, "coef": coef, "m1": x, "m2": x, "status": status}
    if name == "lattice_encode":
        return {"x": x, "scale": torch.ones(()), "status": status}
    if name == "lattice_decode":
        return {"z": z, "scale": torch.ones(()), "dtype": F32}
    if name == "preference_errors":
        return {"theta": x, "ref": x, "target": x}
    if name == "preference_backward":
        weights = {"a": torch.ones(2), "b": torch.ones(2)}
        return {"theta": x, "ref": x, "target": x, **weights}
    made = {"z": z, "y": z, "coef": coef, "m1": x, "m2": x, "status": status}
    if "scaled" in name:
        made |= {"buffer": torch.zeros(shape, dtype=torch.int64), "ratio": ratio}
    return made


def meta(shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


S = (2, 3, 4, 4)
LATTICE = "lattice_scaled_update"
WRONG = [
    ("affine_update", {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ("affine_update", {"x": torch.zeros(S, dtype=torch.int32)}, TypeError, "x must be .*int32"),
    ("affine_update", {"x": torch.zeros(S, dtype=torch.complex64)}, TypeError, "got .*complex64"),
    ("affine_update", {"x": torch.zeros(S).to_sparse()}, ValueError, "x must be a dense"),
    ("affine_update", {"y": torch.zeros(2, 3, 4, 5)}, ValueError, r"y must .*\[2, 3, 4, 5\]"),
    ("affine_update", {"y": torch.zeros(S, dtype=F16)}, TypeError, "y must be torch.float32, got"),
    ("affine_update", {"y": meta(S)}, ValueError, "y must be on the device of x, cpu, got meta"),
    ("affine_update", {"y": torch.zeros(S).to_sparse()}, ValueError, "y must be a dense"),
    ("affine_update", {"y": None}, TypeError, "y must be a torch.Tensor, got NoneType"),
    ("affine_update", {"m1": torch.zeros(S, dtype=F64)}, TypeError, "m1 must .* got torch.float64"),
    ("affine_update", {"m1": torch.zeros(1, 3, 4, 4)}, ValueError, "m1 must have the shape of x"),
    ("affine_update", {"m1": None}, ValueError, "m1 must be given when m2 is given"),
    ("affine_update", {"m2": torch.zeros(S, dtype=BF16)}, TypeError, "m2 must have the dtype of"),
    ("affine_update", {"coef": 1.0}, TypeError, "coef must be a torch.Tensor, got float"),
    ("affine_update", {"coef": torch.ones(4, dtype=F64)}, TypeError, "coef must be torch.float32"),
    ("affine_update", {"coef": torch.ones(3)}, ValueError, r"coef must have shape \[4\] or \[2, 4"),
    ("affine_update", {"coef": torch.ones(3, 4)}, ValueError, r"coef must .* got \[3, 4\]"),
    ("affine_update", {"coef": torch.ones(2, 4, 1)}, ValueError, "coef must have shape"),
    ("affine_update", {"coef": torch.ones(1, 4)}, ValueError, r"coef must .* got \[1, 4\]"),
    ("affine_update", {"coef": torch.ones(1, 1, 4)}, ValueError, "coef must have shape"),
    ("affine_update", {"coef": torch.ones(4).to_sparse()}, ValueError, "coef must be a dense"),
    ("affine_update", {"coef": meta(4)}, ValueError, "coef must be on the device of x"),
    ("affine_update", {"status": torch.zeros(1)}, TypeError, "status must be torch.int32"),
    ("affine_update", {"status": ops.new_status(2)}, ValueError, r"status must have shape \[1\]"),
    ("affine_update", {"status": ops.new_status(1)}, ValueError, r"status must .*, got \[1, 1\]"),
    ("affine_update", {"status": meta(1, torch.int32)}, ValueError, "status must be on the device"),
    ("affine_update", {"impl": "fast"}, ValueError, "impl must be one of auto, .*, got 'fast'"),
    (LATTICE, {"z": torch.zeros(S)}, TypeError, "z must be torch.int32, got torch.float32"),
    (LATTICE, {"y": torch.zeros(S, dtype=torch.int64)}, TypeError, "y must be torch.int32"),
    (LATTICE, {"buffer": torch.zeros(S, dtype=torch.int32)}, TypeError, "buffer must .*int64"),
    (LATTICE, {"buffer": torch.zeros(2, dtype=torch.int64)}, ValueError, "buffer must have the sh"),
    (LATTICE, {"ratio": torch.ones(4)}, TypeError, "ratio must be torch.int64"),
    (LATTICE, {"ratio": torch.ones(2, dtype=torch.int64)}, ValueError, r"ratio must .* got \[2\]"),
    (LATTICE, {"m1": torch.zeros(S, dtype=F64)}, TypeError, "m1 must be"),
    (LATTICE, {"coef": torch.ones(4, dtype=F64)}, TypeError, "coef must be torch.float32"),
    (LATTICE, {"frac_bits": 0}, ValueError, r"frac_bits must be in 1\.\.30, got 0"),
    (LATTICE, {"frac_bits": 31}, ValueError, r"frac_bits must be in 1\.\.30, got 31"),
    (LATTICE, {"frac_bits": 20.0}, TypeError, "frac_bits must be an int, got float"),
    (LATTICE, {"frac_bits": True}, TypeError, "frac_bits must be an int, got bool"),
    (LATTICE, {"status": None}, TypeError, "status must be a torch.Tensor, got NoneType"),
    ("lattice_encode", {"scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
    ("lattice_encode", {"scale": torch.ones(3)}, ValueError, r"scale must .* \[2\].*, got \[3\]"),
    ("lattice_encode", {"scale": torch.ones(1, 1)}, ValueError, "scale must have shape"),
    ("lattice_encode", {"scale": torch.ones(1, dtype=F16)}, TypeError, "scale must be torch.float"),
    ("lattice_decode", {"dtype": torch.int32}, TypeError, "dtype must be one of .*, got .*int32"),
    ("lattice_decode", {"dtype": "float32"}, TypeError, "dtype must be one of .*, got 'float32'"),
    ("lattice_decode", {"dtype": 6}, TypeError, "dtype must be one of .*, got 6"),
    ("lattice_decode", {"frac_bits": True}, TypeError, "frac_bits must be an int, got bool"),
    ("lattice_decode", {"copies": 3}, ValueError, "copies must be 1 or 2, got 3"),
    ("lattice_decode", {"copies": True}, ValueError, "copies must be 1 or 2, got True"),
    ("preference_errors", {"theta": torch.zeros(())}, ValueError, "theta must have a batch dim"),
    ("preference_errors", {"ref": torch.zeros(S, dtype=F16)}, TypeError, "ref must be .*float32"),
    ("preference_errors", {"target": torch.zeros(2, 3)}, ValueError, "target must have the shape"),
    ("preference_errors", {"target": torch.zeros(S, dtype=BF16)}, TypeError, "target must be"),
    ("preference_backward", {"a": torch.ones(3)}, ValueError, r"a must have shape \[2\] .*\[3\]"),
    ("preference_backward", {"a": torch.ones(1)}, ValueError, r"a must have shape \[2\] .*\[1\]"),
    ("preference_backward", {"a": torch.ones(())}, ValueError, r"a must have shape \[2\] .*\[\]"),
    ("preference_backward", {"b": torch.ones(2, dtype=F64)}, TypeError, "b must be torch.float32"),
]


@pytest.mark.parametrize(("name", "change", "error", "words"), WRONG)
def test_wrong_arguments(name, change, error, words):
    with pytest.raises(error, match=words):
        getattr(ops, name)(**(valid(name) | change))


WRONG_TENSORS = [
    (name, change, error)
    for name, change, error, _ in WRONG
    if all(isinstance(value, torch.Tensor) for value in change.values())
]


@pytest.mark.parametrize(("name", "change", "error"), WRONG_TENSORS)
def test_operators_refuse_wrong_tensors_without_their_functions(name, change, error):
    """The functions leave tensors to the native kernels; what is not for these must not slip by."""
    values = {"frac_bits": 20, "copies": 1} | valid(name) | change
    arguments = [values[argument.name] for argument in OPS[name]._schema.arguments]
    with pytest.raises((RuntimeError, error)):
        OPS[name](*arguments)


@pytest.mark.parametrize("name", ["affine_update_", "lattice_update_", "lattice_scaled_update_"])
def test_what_is_refused_is_not_written(name, impl):
    values = valid(name.replace("affine_update_", "affine_update"))
    state = "x" if "x" in values else "z"
    values[state] = values[state] + 1
    values["status"] = ops.new_status(2)
    with pytest.raises(ValueError, match=r"status must have shape \[1\]"):
        getattr(ops, name)(**values, impl=impl)
    assert (values[state] == 1).all()


def test_the_kernels_own_words_are_kept_where_nothing_is_wrong(native, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(EAGER["native"], "affine_update", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.affine_update(**valid("affine_update"))
    with pytest.raises(TypeError, match="x must be a") as caught:
        ops.affine_update(**valid("affine_update") | {"x": [1.0]})
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", sorted({name for name, *_ in WRONG}))
def test_the_unchanged_arguments_are_right(impl, name):
    getattr(ops, name)(**valid(name), impl=impl)


def test_two_copies_need_a_batch():
    z, scale = torch.zeros((), dtype=torch.int32), torch.ones(())
    with pytest.raises(ValueError, match="z must have a batch dimension when copies is 2"):
        ops.lattice_decode(z, scale, F32, copies=2)


def test_a_named_backend_runs_or_raises():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'triton' is not available"):
        ops.affine_update(x, x, torch.ones(4), impl="triton")
    if ops.backends()["native"].available:
        x = meta((2, 3))
        with pytest.raises(ValueError, match=r"'native' is not available: .* tensors on meta"):
            ops.affine_update(x, x, meta(4), impl="native")


@pytest.mark.parametrize("name", ["affine_update", "lattice_update", "preference_backward"])
def test_the_native_kernel_survives_a_direct_call_with_wrong_tensors(native, name):
    """torch.ops.* has no Python checks; the kernel must not read outside of a tensor."""
    status = ops.new_status(1)[0]
    x, small = torch.zeros(64, 64), torch.zeros(2)
    z = torch.zeros(64, 64, dtype=torch.int32)
    calls = {
        "affine_update": [
            (x, small, None, None, torch.ones(4), None),
            (x, x, small, None, torch.ones(4), None),
            (x, x, None, x, torch.ones(4), None),
            (x, x, x, None, torch.ones(3), None),
            (x, x, x, None, torch.ones(5, 4), None),
            (x, x, x, None, torch.ones(4, dtype=F64), None),
            (x, x, z, None, torch.ones(4), None),
            # on a GPU both would be read as float32
            (x, x, x, x.to(F16), torch.ones(4), None),
            (x, x, x, None, torch.ones(4), torch.zeros(0, dtype=torch.int32)),
            (x, x, x, None, torch.ones(4), torch.zeros(1, dtype=torch.int8)),
        ],
        "lattice_update": [
            (z, z[:1], None, None, torch.ones(4), 20, status),
            (z, x, None, None, torch.ones(4), 20, status),
            (z, z, None, None, torch.ones(4), 99, status),
            (z, z, x, x.to(F16), torch.ones(4), 20, status),
        ],
        "preference_backward": [
            (x, x, x[:2], torch.ones(64), torch.ones(64)),
            (x, x, x, torch.ones(63), torch.ones(64)),
            (x, x.to(F16), x, torch.ones(64), torch.ones(64)),
        ],
    }
    for arguments in calls[name]:
        with pytest.raises(RuntimeError):
            OPS[name](*arguments)


@pytest.mark.parametrize("impl", ["native", "reference", "auto"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("affine_update", "x"),
        ("affine_inverse", "x"),
        ("lattice_update", "z"),
        ("lattice_inverse", "z"),
        ("lattice_scaled_update", "z"),
        ("lattice_scaled_update", "buffer"),
        ("lattice_scaled_inverse", "buffer"),
    ],
)
def test_expanded_tensors_are_read_but_not_written(name, written, impl):
    arguments = valid(name.replace("inverse", "update"))
    arguments[written] = arguments[written][:1].clone().expand(S)
    out = getattr(ops, name)(**arguments, impl=impl)
    assert (out[0] if isinstance(out, tuple) else out).shape == S
    before = {key: value.clone() for key, value in arguments.items()}
    with pytest.raises(ValueError, match=f"^{written} must not be expanded"):
        getattr(ops, f"{name}_")(**arguments, impl=impl)
    assert all(torch.equal(value, before[key]) for key, value in arguments.items())


@pytest.mark.parametrize("written", ["z", "buffer"])
def test_a_direct_call_writes_to_no_expanded_tensor(written):
    arguments = valid("lattice_scaled_update")
    arguments[written] = arguments[written][:1].clone().expand(S)
    named = ("z", "buffer", "y", "m1", "m2", "coef", "ratio")
    before = arguments["z"].clone()
    with pytest.raises(RuntimeError, match="not expanded"):
        torch.ops.inpo_fast.lattice_scaled_update_(
            *(arguments[name] for name in named), 16, arguments["status"]
        )
    assert torch.equal(arguments["z"], before)
