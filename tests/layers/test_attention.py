"""The backward of attention that repeats its bits: in the interpreter, and compiled for GPUs."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inpo_fast.determinism import deterministic_gradients

ROOT = Path(__file__).parents[2]

ERRORS = """
import torch
from benchmarks.attention import Case, Shape
from inpo_fast.determinism import deterministic_gradients
from inpo_fast.layers.attention import attention

for shape in {shapes}:
    case = Case(Shape(*shape, 1), "cpu")
    with deterministic_gradients():
        y = attention(*case.given)
        assert "DeterministicAttention" in y.grad_fn.name()
        found = torch.autograd.grad(y, case.given, case.dy)
    assert all(torch.isfinite(x).all() for x in found)
    print(case.error(found))
"""
SHAPES = [(2, 64, 64, 2, 40), (1, 130, 77, 1, 64), (1, 100, 130, 3, 80), (1, 5, 3, 1, 16)]


def interpreted(*command):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_gradients_are_those_of_float64():
    errors = interpreted("-c", ERRORS.format(shapes=SHAPES)).split()
    assert len(errors) == len(SHAPES)
    # P, dS and the result are rounded to float16, each by 2^-11 of itself, and a sum of terms of
    # both signs can be smaller than they are
    assert max(map(float, errors)) < 4 * 2**-11


@pytest.mark.parametrize("width", [40, 64, 80, 128])
def test_no_kernel_spills(width, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from inpo_fast.layers import attention_kernels as kernels
    from tests.ops.test_triton_compiles import CAPABILITIES, usage

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = kernels.plan_of(width)
    pairs = [
        (kernels._of_keys_kernel, plan.of_keys),
        (kernels._of_queries_kernel, plan.of_queries),
        (kernels._delta_kernel, kernels.Tile(0, 0, 4, 3)),
    ]
    for (kernel, tile), capability in itertools.product(pairs, CAPABILITIES):
        constants = {
            "ROWS": kernels.ROWS,
            "LOG2E": kernels.LOG2E,
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
            "WIDTH": width,
            "DIM": max(64, kernels.triton.next_power_of_2(width)),
        }
        signature, values, attributes = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument], values[(i,)] = "constexpr", constants[argument]
            elif argument == "scale":
                signature[argument] = "fp32"
            elif argument.endswith("_ptr"):
                wide = argument in ("log_ptr", "delta_ptr")
                signature[argument] = "*fp32" if wide else "*bf16"
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[argument] = "i32"
                if argument != "heads":
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        made = compile(source, GPUTarget("cuda", capability, 32), tile.options)
        used = usage(made.asm["cubin"], tmp_path / "kernel.cubin")
        assert used["LOCAL"] == 0 and used["STACK"] <= 8, (kernel, capability, used)
        # what a multiprocessor of every kind has
        assert made.metadata.shared <= 160 * 1024


def test_heads_that_are_too_wide_are_refused():
    kernels = pytest.importorskip("inpo_fast.layers.attention_kernels")
    x = torch.zeros(1, 4, 1, 160, dtype=torch.float16)
    assert kernels.plan_of(160) is None
    with pytest.raises(ValueError, match="no wider than 128, got 160"):
        kernels.backward(x, x, x, x, torch.zeros(1, 1, 4), x)


@pytest.mark.parametrize(
    ("changes", "deterministic"),
    [
        ({}, False),
        ({"dtype": torch.float32}, True),
        ({"width": 160}, True),
        ({"width": 20}, True),
        ({"tokens": 0}, True),
        ({"key": torch.randn(1, 5, 2, 8)}, True),
        ({"heads": 40000}, True),
    ],
)
def test_torch_attends_to_all_else(changes, deterministic, monkeypatch):
    """What need not repeat its bits, float32, and shapes that the kernels do not take."""
    module = pytest.importorskip("inpo_fast.layers.attention")
    monkeypatch.setattr(module.functions, "has_kernels", lambda x: True)
    monkeypatch.setattr(module.functions, "apply", None)
    given = {"dtype": torch.float16, "width": 8, "tokens": 5, "heads": 2, **changes}
    shape = (2, given["tokens"], given["heads"], given["width"])
    query, key, value = torch.randn(3, *shape).to(given["dtype"])
    key, value = ((given["key"].to(x) if "key" in given else x) for x in (key, value))
    with deterministic_gradients() if deterministic else contextlib.nullcontext():
        y = module.attention(query, key, value)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    assert torch.equal(y, expected)


def test_what_is_wrong_is_torchs_to_say(monkeypatch):
    module = pytest.importorskip("inpo_fast.layers.attention")
    monkeypatch.setattr(module.functions, "has_kernels", lambda x: True)
    query = torch.randn(2, 5, 2, 8).half()
    with deterministic_gradients():
        with pytest.raises(RuntimeError, match="dtype"):
            module.attention(query, query.float(), query)
        with pytest.raises(RuntimeError):
            module.attention(query, query[:, :, :1].repeat(1, 1, 3, 1), query)
