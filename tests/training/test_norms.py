"""GroupNorm by rows is GroupNorm."""

import copy

import pytest
import torch
from torch import nn

from inpo_fast.training.norms import RowwiseGroupNorm, by_rows


def pair(channels=12, groups=3, **options):
    torch.manual_seed(0)
    stock = nn.GroupNorm(groups, channels, **options)
    if stock.affine:
        nn.init.normal_(stock.weight)
        nn.init.normal_(stock.bias)
    rowwise = copy.deepcopy(stock)
    by_rows(rowwise)
    assert isinstance(rowwise, RowwiseGroupNorm)
    return stock, rowwise


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_gradients_are_those_of_group_norm(affine, memory_format):
    stock, rowwise = (norm.double() for norm in pair(affine=affine, eps=1e-6))
    x = torch.randn(5, 12, 4, 7, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn_like(x)
    grads = []
    for norm in (stock, rowwise):
        given = x.clone().requires_grad_()
        y = norm(given)
        (y * weight).sum().backward()
        grads.append([y.detach(), given.grad, *(p.grad for p in norm.parameters())])
    for expected, found in zip(*grads, strict=True):
        # sums of at most 140 numbers of order 1 in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=140 * 16 * 2**-53)


def test_a_large_mean_costs_no_more_than_in_group_norm():
    stock, rowwise = pair()
    x = 1000 + torch.randn(2, 12, 16, 16)
    oracle = copy.deepcopy(stock).double()(x.double())
    theirs = (stock(x) - oracle).abs().max()
    assert (rowwise(x) - oracle).abs().max() <= 2 * theirs + 2**-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_group_norm(dtype):
    stock, rowwise = (norm.to(dtype) for norm in pair())
    x = torch.randn(2, 12, 4, 4, dtype=dtype)
    assert rowwise(x).dtype == stock(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert rowwise(x).dtype == stock(x).dtype


@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 5)])
def test_other_ranks_are_left_to_group_norm(shape):
    stock, rowwise = pair()
    x = torch.randn(shape)
    assert torch.equal(rowwise(x), stock(x))


def test_only_group_norms_change_and_no_name_does():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    by_rows(model)
    assert [type(part) for part in model] == [RowwiseGroupNorm, nn.LayerNorm, nn.Conv2d]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
