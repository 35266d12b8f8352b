"""The policy's second trees."""

import pytest
import torch
from torch import nn

from inpo_fast.training import policy
from tests.training import tiny


def outputs(*models):
    """Under autocast, to bfloat16."""
    rng = torch.Generator().manual_seed(0)
    config = models[0].config
    x = torch.randn(2, config.in_channels, 8, 8, generator=rng)
    text = torch.randn(2, 3, config.cross_attention_dim, generator=rng)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return [m(x, torch.tensor([3, 700]), text, return_dict=False)[0] for m in models]


def trained(rank):
    """A policy, as the trainer makes it."""
    model = tiny.with_trained_norms(tiny.unet())
    if rank is None:
        return policy.full(model, torch.bfloat16)[0]
    options = {"alpha": rank, "targets": ["to_q", "to_v"], "seed": 0}
    return policy.lora(model, torch.bfloat16, rank=rank, **options)[0]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_rounded_tree_computes_the_policys_bits(rank):
    model = trained(rank)
    rounded, again = policy.rounded(model, torch.bfloat16)
    assert torch.equal(*outputs(model, rounded))
    before = outputs(rounded)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    again()
    mine, theirs = outputs(model, rounded)
    assert torch.equal(mine, theirs) and not torch.equal(theirs, before)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_rounded_tree_has_no_more_than_what_it_rounds(rank):
    model = trained(rank)
    rounded, _ = policy.rounded(model, torch.bfloat16)
    mine = dict(rounded.named_parameters())
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        matrix = isinstance(owner, nn.Linear | nn.Conv2d)
        assert (mine[name] is parameter) == (not matrix or parameter.dtype == torch.bfloat16), name
        assert mine[name].dtype == (torch.bfloat16 if matrix else parameter.dtype), name
    assert (rank is None) == (model.conv_in.weight is not rounded.conv_in.weight)


@pytest.mark.parametrize("training", [False, True])
def test_checkpointed_activations_give_the_same_gradients(training):
    """With dropout, too, for whoever goes on with the model."""
    model = tiny.unet(dropout=0.5, resnet_time_scale_shift="default").train(training)
    rng = torch.Generator().manual_seed(0)
    given = (torch.randn(2, 4, 8, 8, generator=rng), 7, torch.randn(2, 3, 8, generator=rng))
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        model(*given, return_dict=False)[0].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        policy.checkpoint_activations(model)
    assert model.is_gradient_checkpointing
    assert all(map(torch.equal, *found))
