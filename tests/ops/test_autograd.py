"""Gradients of the affine update, and refusals where there is none."""

import pytest
import torch
import torch.nn.functional as F

from inpo_fast import ops
from tests.ops import cases

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize("name", ["affine_update", "affine_inverse"])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("outputs", [0, 1, 2])
def test_gradcheck(impl, name, batch, outputs):
    rng = cases.generator(0)
    x, y, *ms = (cases.floats((2, 3, 2), F64, rng).requires_grad_() for _ in range(2 + outputs))
    coef = cases.rows(batch, F64, rng)

    def function(*args):
        return getattr(ops, name)(args[0], args[1], coef, *args[2:], impl=impl)

    assert torch.autograd.gradcheck(function, (x, y, *ms))
    assert torch.autograd.gradgradcheck(function, (x, y, *ms))


def test_only_what_requires_grad_gets_one(impl):
    rng = cases.generator(1)
    x, y, m = (cases.floats((2, 3), F32, rng) for _ in range(3))
    m = m.to(BF16).requires_grad_()
    coef = torch.tensor([2.0, 3.0, 0.5, 0.0])
    status = ops.new_status(1)[0]
    result = ops.affine_update(x, y, coef, m, status=status, impl=impl)
    assert torch.equal(result.detach(), ops.affine_update(x, y, coef, m.detach(), impl=impl))
    result.sum().backward()
    assert m.grad.dtype == BF16 and torch.equal(m.grad, torch.full_like(m, 0.5))
    assert x.grad is None and y.grad is None
    assert status.item() == 0


def test_status_is_set_when_grad_is_on(impl):
    x = torch.ones(2, 3, requires_grad=True)
    status = ops.new_status(1)[0]
    m = torch.full((2, 3), torch.inf)
    ops.affine_update(x, x, torch.ones(4), m, status=status, impl=impl)
    assert status.item() == ops.STATUS_NONFINITE


def arguments(name):
    """Valid arguments of a function that differentiates nothing, floating ones marked."""
    z = torch.zeros(2, 3, dtype=torch.int32)
    buffer = torch.zeros(2, 3, dtype=torch.int64)
    ratio = cases.ratios(None, cases.generator(0))
    status = ops.new_status(1)[0]
    floats = {key: torch.zeros(2, 3) for key in ("x", "y", "m1", "m2")}
    coef = {"coef": torch.ones(4)}
    if name.startswith("affine"):
        return {**floats, **coef}
    if name == "lattice_encode":
        return {"x": floats["x"], "scale": torch.ones(()), "status": status}
    if name == "lattice_decode":
        return {"z": z, "scale": torch.ones(()), "dtype": F32}
    made = {"z": z, "y": z, **coef, "m1": floats["m1"], "m2": floats["m2"], "status": status}
    if "scaled" in name:
        made |= {"buffer": buffer, "ratio": ratio}
    return made


NO_GRADIENT = [
    "affine_update_",
    "affine_inverse_",
    "lattice_update",
    "lattice_inverse_",
    "lattice_scaled_update",
    "lattice_scaled_inverse_",
    "lattice_encode",
    "lattice_decode",
]


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_refusals(impl, name):
    for key, value in arguments(name).items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        changed = arguments(name) | {key: value.clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{key} must not require grad"):
            getattr(ops, name)(**changed, impl=impl)
        with torch.no_grad():
            getattr(ops, name)(**changed, impl=impl)


def test_coefficients_are_constants(impl):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="coef must not require grad: it is a constant"):
        ops.affine_update(x, x, torch.ones(4, requires_grad=True), impl=impl)


@pytest.mark.parametrize("key", ["ref", "target"])
def test_preference_differentiates_theta_only(impl, key):
    theta, ref, target = (torch.zeros(2, 3) for _ in range(3))
    made = {"theta": theta, "ref": ref, "target": target}
    made[key] = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"{key} must not require grad: preference errors"):
        ops.preference_errors(**made, impl=impl)
    made["theta"] = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"theta, {key} must not require grad"):
        ops.preference_backward(**made, a=torch.ones(2), b=torch.ones(2), impl=impl)


def saved_for_backward(name):
    """Arguments of an operator in place, and a loss that saved it for each tensor it changes."""
    made = arguments(name)
    made["y"] = made["y"].clone()
    changed = [made[key] for key in ("x", "z", "buffer") if key in made]
    weight = torch.ones(1, 1, requires_grad=True)
    losses = [
        (weight * t).sum() if t.is_floating_point() else F.embedding(t, weight).sum()
        for t in changed
    ]
    return made, losses


IN_PLACE = [
    f"{kind}_{direction}_"
    for kind in ("affine", "lattice", "lattice_scaled")
    for direction in ("update", "inverse")
]


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_backward_refuses_what_an_operator_has_changed(impl, name):
    made, losses = saved_for_backward(name)
    unchanged = (torch.ones((), requires_grad=True) * made["m1"]).sum()
    with torch.no_grad():
        getattr(ops, name)(**made, impl=impl)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    unchanged.backward()


@pytest.mark.parametrize("name", IN_PLACE[::2])
def test_so_it_does_where_the_operator_is_compiled(impl, name):
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    made, losses = saved_for_backward(name)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(made):
        getattr(ops, name)(**made, impl=impl)

    with torch.no_grad():
        step(made)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_refused_call_has_changed_nothing(impl):
    x = torch.ones(2, 3)
    weight = torch.ones((), requires_grad=True)
    loss = (weight * x).sum()
    with pytest.raises(ValueError, match="y must have the shape of x"):
        ops.affine_update_(x, x[:1], torch.ones(4), impl=impl)
    loss.backward()
    assert weight.grad == 6


def test_forward_mode_is_refused(impl):
    """Not answered with zeros."""
    x = torch.randn(2, 3)
    coef, scale = torch.tensor([0.5, 0.1, 0.2, 0.0]), torch.ones(())
    calls = {
        "affine": lambda t: ops.affine_update(t, x, coef, x, impl=impl),
        "errors": lambda t: ops.preference_errors(t, x, x, impl=impl).e_theta,
        "encode": lambda t: ops.lattice_encode(t, scale, status=ops.new_status(1)[0], impl=impl),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError, match="reverse mode only"):
            torch.func.jvp(call, (x,), (x,))
