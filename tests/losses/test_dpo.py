"""The preference loss against its formula in plain torch, in value and in gradient."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast import dpo_loss, ops

SHAPE = (4, 5, 3)
BETA = 20.0


def batch(pairs, dtype=torch.float32, seed=0):
    """policy, reference and target, [2·pairs, …]."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, target = torch.randn(
        (3, 2 * pairs, *SHAPE), generator=generator, dtype=torch.float64
    )
    # a policy near its reference, as in training
    return (reference + policy / 8).to(dtype), reference.to(dtype), target.to(dtype)


def transcription(policy, reference, target, beta):
    """papers: L = −mean log σ(−(β/2) [(e_θ − e_ref)^w − (e_θ − e_ref)^l]) and its D."""
    pairs = len(policy) // 2
    dims = tuple(range(1, policy.dim()))
    e_policy = ((policy - target) ** 2).mean(dims)
    e_reference = ((reference - target) ** 2).mean(dims)
    winner = e_policy[:pairs] - e_reference[:pairs]
    loser = e_policy[pairs:] - e_reference[pairs:]
    difference = winner - loser
    loss = -torch.nn.functional.logsigmoid(-beta / 2 * difference).mean()
    return loss, difference, e_policy, e_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_policy_equal_to_the_reference(dtype, impl):
    policy, _, target = batch(5, dtype)
    for beta in (1.0, 5000.0):
        result = dpo_loss(policy, policy.clone(), target, beta=beta, impl=impl)
        # both branches take one path, so that the difference is 0 and not merely small
        assert result.loss.dtype == torch.float32
        assert abs(result.loss.item() - math.log(2)) <= 1e-6
        assert (result.logits == 0).all() and result.accuracy.item() == 0.5
        assert torch.equal(result.errors.e_theta, result.errors.e_ref)


@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_the_formula(dtype, target_dtype, impl):
    policy, reference, target = batch(6, dtype)
    target = target.to(target_dtype)
    result = dpo_loss(policy, reference, target, beta=BETA, impl=impl)
    loss, difference, e_policy, e_reference = transcription(
        policy.double(), reference.double(), target.double(), BETA
    )
    # residuals are rounded to float32 (float64): relative eps in each square, whatever the dtype
    # of the outputs; the differences then cancel, hence the size of the errors themselves
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = e_policy.max().item()
    torch.testing.assert_close(result.errors.e_theta.double(), e_policy, rtol=4 * eps, atol=0)
    torch.testing.assert_close(result.errors.e_ref.double(), e_reference, rtol=4 * eps, atol=0)
    logits = -BETA / 2 * difference
    atol = BETA / 2 * 16 * eps * size
    torch.testing.assert_close(result.logits.double(), logits, rtol=0, atol=atol)
    # the log-sigmoid has slope at most 1
    torch.testing.assert_close(result.loss.double(), loss, rtol=8 * eps, atol=atol)
    assert result.accuracy.item() == pytest.approx((logits > 0).double().mean().item())
    assert result.logits.shape == (6,) and result.errors.e_theta.shape == (12,)


def test_a_better_winner_lowers_the_loss():
    policy, reference, target = batch(4)
    losses, previous = [], None
    for step in (0.0, 0.25, 0.5, 1.0):
        moved = policy.clone()
        # winners towards their targets
        moved[:4] += step * (target[:4] - policy[:4])
        result = dpo_loss(moved, reference, target, beta=BETA)
        losses.append(result.loss.item())
        assert previous is None or (result.logits > previous).all()
        previous = result.logits
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]
    assert result.accuracy.item() == 1
    swapped = policy.clone()
    swapped[4:] += 0.5 * (target[4:] - policy[4:])
    worse = dpo_loss(swapped, reference, target, beta=BETA)
    assert worse.loss.item() > losses[0] and (worse.logits < 0).all()


def test_gradcheck():
    policy, reference, target = batch(2, torch.float64)
    policy.requires_grad_()

    def loss(policy):
        # not the last operation, so that the incoming gradient is not 1
        return dpo_loss(policy, reference, target, beta=BETA).loss * 3

    assert torch.autograd.gradcheck(loss, (policy,))


@pytest.mark.parametrize("beta", [0.0, 3.0, 5000.0])
def test_the_closed_form_of_the_gradient(beta):
    policy, reference, target = batch(3, torch.float64)
    policy.requires_grad_()
    dpo_loss(policy, reference, target, beta=beta).loss.backward()
    _, difference, *_ = transcription(policy.detach(), reference, target, beta)
    # papers: dL/dε^w = +β σ(βD/2) (ε^w − τ^w)/n for one pair, dL/dε^l the same with −
    weight = beta * torch.sigmoid(beta / 2 * difference) / math.prod(SHAPE) / 3
    # the rounding of β D/2, some hundreds here, is relative in an exponential
    rtol = 1e-13 * (1 + (beta / 2 * difference).abs().max().item())
    signed = torch.cat([weight, -weight]).reshape(-1, 1, 1, 1)
    expected = signed * (policy.detach() - target)
    torch.testing.assert_close(policy.grad, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients(dtype):
    policy, reference, target = batch(3, dtype)
    policy.requires_grad_()
    dpo_loss(policy, reference, target, beta=BETA).loss.backward()
    assert policy.grad.dtype == dtype
    exact = policy.detach().double().requires_grad_()
    transcription(exact, reference.double(), target.double(), BETA)[0].backward()
    # float32 inside, rounded once to the dtype of the outputs; the sigmoid turns the absolute
    # error of the logits (see test_the_formula) into a relative one of the weight
    eps = torch.finfo(dtype).eps / 2 + 100 * torch.finfo(torch.float32).eps
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(policy.grad.double(), exact.grad, rtol=2 * eps, atol=tiny)


def test_four_pairs_are_the_mean_of_four():
    policy, reference, target = batch(4, torch.float64)
    policy.requires_grad_()
    together = dpo_loss(policy, reference, target, beta=BETA)
    (gradient,) = torch.autograd.grad(together.loss, policy)
    mean, losses, accuracies = torch.zeros_like(gradient), [], []
    for i in range(4):
        rows = [i, 4 + i]
        alone = dpo_loss(policy[rows], reference[rows], target[rows], beta=BETA)
        mean += torch.autograd.grad(alone.loss, policy)[0] / 4
        losses.append(alone.loss.item())
        accuracies.append(alone.accuracy.item())
        assert alone.logits.item() == together.logits[i].item()
    torch.testing.assert_close(gradient, mean, rtol=1e-14, atol=0)
    assert together.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-15)
    assert together.accuracy.item() == sum(accuracies) / 4


def test_only_the_loss_has_a_gradient():
    policy, reference, target = batch(2)
    result = dpo_loss(policy.requires_grad_(), reference, target, beta=BETA)
    assert result.loss.requires_grad
    for tensor in (result.logits, result.accuracy, *result.errors):
        assert not tensor.requires_grad


def test_large_logits_do_not_overflow():
    policy, reference, target = batch(2)
    for winner in (1e3, -1e3):
        moved = policy.clone()
        moved[0] += winner
        moved[2] -= winner / 2
        moved.requires_grad_()
        loss = dpo_loss(moved, reference, target, beta=5000.0).loss
        loss.backward()
        assert loss.isfinite() and moved.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy": torch.randn(3, *SHAPE)}, ValueError, r"policy must be \[2P, …\] with P ≥ 1"),
        ({"policy": torch.randn(0, *SHAPE)}, ValueError, r"policy must be \[2P, …\]"),
        ({"policy": torch.tensor(1.0)}, ValueError, r"policy must be \[2P, …\]"),
        ({"policy": [1.0, 2.0]}, TypeError, "policy must be a tensor, got list"),
        (
            {"reference": torch.randn(2, *SHAPE)},
            ValueError,
            "reference must have the shape of policy",
        ),
        (
            {"reference": torch.randn(4, *SHAPE).double()},
            TypeError,
            "reference must be torch.float32",
        ),
        ({"target": torch.randn(4, 5)}, ValueError, "target must have the shape of policy"),
        ({"target": torch.randn(4, *SHAPE).half()}, TypeError, "target must be torch.float32"),
        ({"target": torch.randn(4, *SHAPE, requires_grad=True)}, ValueError, "target must not req"),
        (
            {"reference": torch.randn(4, *SHAPE, requires_grad=True)},
            ValueError,
            "^reference must not require grad: preference errors differentiate policy only",
        ),
        ({"policy": torch.zeros(4, *SHAPE, dtype=torch.int32)}, TypeError, "policy must be torch."),
        ({"beta": -1.0}, ValueError, "beta must be finite and at least 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta must be finite and at least 0, got nan"),
        ({"beta": math.inf}, ValueError, "beta must be finite and at least 0, got inf"),
        ({"beta": torch.tensor(BETA)}, TypeError, "beta must be a number, got a tensor"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    policy, reference, target = batch(2)
    arguments = {"policy": policy, "reference": reference, "target": target, "beta": BETA}
    with pytest.raises(error, match=message):
        dpo_loss(**{**arguments, **change})


def test_few_operators_beside_the_reduction():
    """What an eager training step pays for the loss is their number, on any GPU."""

    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            views = "detach", "split", "expand", "new_empty"
            if func.overloadpacket.__name__ not in views:
                self.names.append(func.overloadpacket.__name__)
            return result

    available, reason = ops.backends()["native"]
    if not available:
        pytest.skip(reason)
    policy, reference, target = batch(4)
    policy.requires_grad_()
    with Counted() as counted:
        loss = dpo_loss(policy, reference, target, beta=BETA, impl="native").loss
        torch.autograd.grad(loss, policy)
    forward = ["preference_errors", "sub", "sub", "mul", "neg", "softplus", "mean"]
    backward = ["ones_like", "div", "softplus_backward", "neg", "mul", "mul", "preference_backward"]
    assert counted.names == forward + backward
