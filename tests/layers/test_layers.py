"""The fused layers: run interpreted.py, and compile every kernel for GPUs that need not be here."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inpo_fast.training.metrics import count_flops, on_meta
from tests.training import tiny

TESTS = Path(__file__).with_name("interpreted.py")
PARTS = ("begins or activations", "unet or reference or compiler")


@pytest.mark.parametrize("part", [*PARTS, f"not ({' or '.join(PARTS)})"])
def test_interpreted(part):
    """In parts, which workers take one by one."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, TESTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


def test_where_there_are_no_kernels_torch_computes(monkeypatch):
    """A pipeline that was trained goes on being one, on any device, and can be trained again."""
    layers = pytest.importorskip("inpo_fast.layers.modules")
    monkeypatch.setattr(layers.functions, "INTERPRETED", False)
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    fused = copy.deepcopy(unet)
    count = layers.fuse_layers(fused, channels_last=False)
    assert count == layers.fuse_layers(fused, channels_last=False) > 10
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 3, tiny.WIDTH, generator=rng)

    def call(model, x, text):
        return model(x, 7, text, return_dict=False)[0]

    # float32 sums of convolutions in another layout
    torch.testing.assert_close(call(fused, x, text), call(unet, x, text), rtol=0, atol=1e-5)
    flops = []
    for model in (unet, fused):
        structure, empty = on_meta(model), (x.to("meta"), text.to("meta"))
        flops.append(count_flops(lambda: call(structure, *empty)))  # noqa: B023
    assert flops[0] == flops[1] > (0, 0)


def test_blocks_are_found_by_the_names_of_their_classes():
    """As accelerate and `policy.shard` look for what FSDP2 shards together."""
    layers = pytest.importorskip("inpo_fast.layers.modules")
    unet = tiny.unet()
    names = [type(module).__name__ for module in unet.modules() if module is not unet.conv_act]
    layers.fuse_layers(unet)
    assert [type(m).__name__ for m in unet.modules() if m is not unet.conv_act] == names
    again = pickle.loads(pickle.dumps(unet))
    assert [type(module) for module in again.modules()] == [type(m) for m in unet.modules()]


def test_what_is_offloaded_is_refused_and_left_alone():
    """Its hooks keep a `forward` that knows nothing of what the kernels are told."""
    layers = pytest.importorskip("inpo_fast.layers.modules")
    accelerate = pytest.importorskip("accelerate")
    unet = tiny.unet()
    kinds = [type(module) for module in unet.modules()]
    accelerate.cpu_offload(unet, "cpu")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must come before hooks and offloading, and .*norm1"):
            layers.fuse_layers(unet)
        assert [type(module) for module in unet.modules()] == kinds
        accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    unet = tiny.unet()
    layers.fuse_layers(unet)
    accelerate.cpu_offload(unet, "cpu")
    given = torch.randn(1, 4, 8, 8), 7, torch.randn(1, 3, tiny.WIDTH)
    assert unet(*given).sample.isfinite().all()


def test_what_has_no_such_layers_is_left_alone():
    layers = pytest.importorskip("inpo_fast.layers.modules")
    transformer = tiny.sd3()
    assert layers.fuse_layers(transformer) == 0
    assert transformer.pos_embed.proj.weight.is_contiguous()


@pytest.mark.parametrize("module", [torch.nn.GroupNorm(2, 4), torch.nn.LayerNorm(4)])
def test_float64_is_not_rounded(module):
    layers = pytest.importorskip("inpo_fast.layers.modules")
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = module.double()(x)
    layers.fuse_layers(module)
    assert torch.equal(module(x), expected)


HALF = {f"{name}_ptr" for name in ("x", "dx", "y", "dy", "residual", "total", "dtotal")}
HALF |= {"shift_ptr", "dshift_ptr"}
"""Pointers to numbers of the model's precision; all others are to float32."""
WIDTHS = (320, 1280)


def options(**values):
    """All combinations of values of constants."""
    return [dict(zip(values, given, strict=True)) for given in itertools.product(*values.values())]


BOTH = (False, True)
CONSTANTS = {
    "_group_norm_parts_kernel": [{}],
    "_group_norm_moments_kernel": options(SIZE=(16, 128), SHIFTED=BOTH),
    "_group_norm_kernel": options(ACTIVATED=BOTH, SHIFTED=BOTH),
    "_group_norm_backward_parts_kernel": options(ACTIVATED=BOTH, SHIFTED=BOTH),
    "_group_norm_backward_means_kernel": options(SIZE=(16, 128), SHIFTED=BOTH),
    "_group_norm_backward_kernel": options(ACTIVATED=BOTH, SHIFTED=BOTH),
    "_layer_norm_kernel": options(width=WIDTHS, ADDED=BOTH),
    "_layer_norm_backward_kernel": options(width=WIDTHS, ADDED=BOTH),
    "_biased_sum_kernel": [{}],
    "_geglu_kernel": [{}],
    "_geglu_backward_kernel": [{}],
}


def test_every_kernel_is_listed():
    kernels = pytest.importorskip("inpo_fast.layers.kernels")
    assert {name for name in vars(kernels) if name.endswith("_kernel")} == set(CONSTANTS)
    assert set(kernels.WARPS) < set(CONSTANTS)


@pytest.mark.parametrize("name", CONSTANTS)
def test_no_kernel_spills(name, tmp_path, monkeypatch):
    """For bfloat16 and float32, as the launchers would have them compiled."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from inpo_fast.layers import kernels, launch
    from tests.ops.test_triton_compiles import CAPABILITIES, usage

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    fixed = {"PIXELS": kernels.PIXELS, "CHANNELS": kernels.CHANNELS, "ROWS": kernels.ROWS}
    fixed |= dict(zip(("GATES", "GATED_ROWS"), launch._GATE_TILE, strict=True))
    for capability in CAPABILITIES:
        for half, given in itertools.product(("bf16", "fp32"), CONSTANTS[name]):
            constants = fixed | given
            if "width" in given:
                tile = launch._row_tile(given["width"])
                constants |= dict(zip(("TILE_ROWS", "WIDTH"), tile, strict=True))
            signature, values, attributes = {}, {}, {}
            for i, argument in enumerate(kernel.arg_names):
                if argument in constants and argument != "width":
                    signature[argument], values[(i,)] = "constexpr", constants[argument]
                elif argument == "eps":
                    signature[argument] = "fp32"
                elif argument.endswith("_ptr"):
                    signature[argument] = f"*{half if argument in HALF else 'fp32'}"
                    attributes[(i,)] = [["tt.divisibility", 16]]
                else:
                    signature[argument] = "i32"
                    if argument in ("channels", "width", "pixels"):
                        attributes[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, values, attributes)
            made = compile(source, GPUTarget("cuda", capability, 32), kernels.options(kernel))
            used = usage(made.asm["cubin"], tmp_path / "kernel.cubin")
            assert used["STACK"] == used["LOCAL"] == 0, (capability, half, given, used)
            # two blocks of threads on a multiprocessor at least
            assert 2 * used["REG"] * 32 * made.metadata.num_warps <= 65536, (half, given, used)
