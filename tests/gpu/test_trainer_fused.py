"""Fused layers on a GPU: as accurate as torch's own, and exact where training must be."""

import copy
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("triton")

from torch import nn
from torch.nn import functional

from inpo_fast.determinism import deterministic_gradients, reproducible_training
from inpo_fast.layers import attention
from inpo_fast.layers import modules as layers
from tests.gpu.trainings import (
    assert_resumed_run_is_whole,
    assert_steps_do_not_wait,
    trainer,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Activated(nn.GroupNorm):
    """Group norm and SiLU, with the interface of the fused one."""

    def forward(self, x, activated=True):
        return functional.silu(super().forward(x))


def outputs(module, x, dtype, seed=0):
    """Output, and gradients of the input and the weights, under autocast, float64.

    torch's norms leave a float32 output to be rounded by the layer that reads it.
    """
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype not in (torch.float32, torch.float64)):
        y = module(x).to(dtype)
    rng = torch.Generator("cuda").manual_seed(seed)
    dy = torch.randn(y.shape, generator=rng, device="cuda")
    y.backward(dy.to(y))
    return [
        value.double() for value in (y.detach(), x.grad, *(p.grad for p in module.parameters()))
    ]


def assert_as_accurate(stock, fused, x, dtype):
    x = x.cuda().to(dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.5)
    stock = stock.cuda()
    fused.load_state_dict(stock.state_dict())
    exact = outputs(copy.deepcopy(stock).double(), x.double(), torch.float64)
    theirs, mine = (outputs(module, x, dtype) for module in (stock, fused.cuda()))
    again = outputs(fused, x, dtype)
    for truth, their, my in zip(exact, theirs, mine, strict=True):
        # both round to the same places in other orders; the floor is the rounding of the output
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (my - truth).norm() <= 1.5 * (their - truth).norm() + floor
    # weights have had their gradient twice
    assert torch.equal(mine[0], again[0]) and torch.equal(mine[1], again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (3, 96, 9, 31), (1, 2560, 8, 8)])
def test_group_norm_and_its_activation(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    for given in (x, x.to(memory_format=torch.channels_last)):
        norms = (Activated(32, shape[1]), layers.FusedGroupNormActivation(32, shape[1]))
        assert_as_accurate(*norms, given, dtype)
        norms = (nn.GroupNorm(32, shape[1]), layers.FusedGroupNorm(32, shape[1]))
        assert_as_accurate(*norms, given, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4096, 320), (3, 77, 1280), (5, 40)])
def test_layer_norm(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    norms = (nn.LayerNorm(shape[-1]), layers.FusedLayerNorm(shape[-1]))
    assert_as_accurate(*norms, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype):
    x = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0))
    gates = (layers.GEGLU(40, 160), layers.FusedGEGLU(40, 160))
    assert_as_accurate(*gates, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("width", [40, 64, 80, 128])
@pytest.mark.parametrize("keys", [300, 77, 1])
def test_deterministic_attention(keys, width, dtype):
    """Against float64, no worse than torch's own; by cuDNN's forward where it takes the shape."""
    rng = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, tokens, 3, width) for tokens in (300, keys, keys, 300)]
    given = [torch.randn(shape, generator=rng, device="cuda") for shape in shapes]

    own = []

    def gradients(dtype):
        query, key, value, dy = (x.to(dtype).requires_grad_() for x in given)
        y = attention.attention(query, key, value)
        own.append("DeterministicAttention" in y.grad_fn.name())
        return [x.double() for x in (y, *torch.autograd.grad(y, (query, key, value), dy))]

    with reproducible_training():
        with deterministic_gradients():
            mine, again = gradients(dtype), gradients(dtype)
        theirs, truth = gradients(dtype), gradients(torch.float64)
    assert own == [True, True, False, False]
    assert all(map(torch.equal, mine, again))
    for exact, their, my in zip(truth, theirs, mine, strict=True):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        assert (my - exact).abs().max() <= 2 * (their - exact).abs().max() + floor


def test_the_gradient_of_long_attention_repeats():
    """At the size of Stable Diffusion's first level, where sums are split over many blocks."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    torch.manual_seed(0)
    block = Transformer2DModel(8, 40, 320, cross_attention_dim=64).cuda()
    layers.fuse_layers(block)
    x, text = torch.randn(2, 320, 64, 64).cuda(), torch.randn(2, 77, 64).cuda()

    def gradients():
        block.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x, text, return_dict=False)[0]
        y.float().square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    with reproducible_training(), deterministic_gradients():
        first, second = gradients(), gradients()
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_the_policy_starts_as_the_reference(model, tmp_path, precision, rank):
    run = trainer(
        *(model, tmp_path),
        mixed_precision=precision,
        rank=rank,
        fused_layers=True,
        max_train_steps=1,
    )
    (first,) = run.train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), first
    assert first["accuracy"] == 0.5, first
    assert first["policy_winner"] == first["reference_winner"] > 0


def test_steps_do_not_wait_for_the_device(model, tmp_path, no_sync):
    run = trainer(model, tmp_path, fused_layers=True, gradient_accumulation_steps=2)
    assert_steps_do_not_wait(run, no_sync)


@pytest.mark.parametrize("changes", [{}, {"rank": 2, "gradient_checkpointing": True}])
def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path, changes):
    assert_resumed_run_is_whole(model, tmp_path, fused_layers=True, **changes)


def test_gradients_repeat_in_a_process_that_has_used_cublas_before():
    """torch looks for cuBLAS's workspace once, at the first product."""
    script = """
import os
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
import torch
from torch.nn import functional
from inpo_fast.determinism import deterministic_gradients, reproducible_training
w = torch.randn(320, 320, device="cuda", requires_grad=True)
x = torch.randn(4, 4096, 320, device="cuda")
x @ w
found = []
with reproducible_training():
    for _ in range(2):
        w.grad = None
        with deterministic_gradients():
            with torch.autocast("cuda", torch.bfloat16):
                q = (x @ w).unflatten(-1, (8, 40)).transpose(1, 2)
                y = functional.scaled_dot_product_attention(q, q, q)
            y.float().square().sum().backward()
        found.append(w.grad.clone())
assert torch.equal(*found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
