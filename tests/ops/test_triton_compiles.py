"""Every Triton kernel becomes machine code for GPUs that need not be here: no spills, wide access.

The kernels are compiled as their launchers would have them compiled for operands of these types.
"""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted, there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from inpo_fast.ops import triton as kernels  # noqa: E402

CAPABILITIES = (80, 90, 100)
FLOATS = ("fp64", "fp32", "fp16", "bf16")
SIZES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "i32": 4}
INTEGERS = ("n", "blocks", "coef_stride", "ratio_stride", "scale_stride", "frac_bits", "total")


def block(dtype):
    return kernels.THREADS * 16 // SIZES[dtype]


def affine():
    for state, inverse in itertools.product(FLOATS, (False, True)):
        wide = "fp64" if state == "fp64" else "fp32"
        m = {"fp32": "bf16", "fp64": "fp16"}.get(state, state)
        pointers = {"x": state, "y": state, "m1": m, "m2": m, "coef": wide, "out": state}
        constants = {"INVERSE": inverse, "BLOCK": block(state)}
        yield pointers | {"status": "i32"}, constants
    yield pointers | {"m1": None, "m2": None, "status": None}, constants


def lattice():
    for m, inverse in (("fp32", False), ("fp16", True), ("bf16", False), ("bf16", True)):
        pointers = {"z": "i32", "y": "i32", "m1": m, "m2": m, "coef": "fp32", "out": "i32"}
        constants = {"INVERSE": inverse, "BLOCK": block("i32")}
        yield pointers | {"status": "i32"}, constants
    yield pointers | {"m2": None, "status": "i32"}, constants
    yield pointers | {"m1": None, "m2": None, "status": "i32"}, constants


def scaled():
    for pointers, constants in lattice():
        yield pointers | {"buffer": "i64", "buffer_out": "i64", "ratio": "i64"}, constants


def encode():
    for x in FLOATS:
        yield {"x": x, "scale": "fp32", "out": "i32", "status": "i32"}, {"BLOCK": block("i32")}


def decode():
    for out in FLOATS:
        constants = {"COPIES": 2 if out == "bf16" else 1, "BLOCK": block(out)}
        yield {"z": "i32", "scale": "fp32", "out": out}, constants


def errors():
    constants = {"TILES": kernels.ERROR_TILES, "BLOCK": kernels.ERROR_BLOCK}
    for theta in FLOATS:
        target = "fp64" if theta == "fp64" else "fp32"
        yield {"theta": theta, "ref": theta, "target": target, "sums": "fp64"}, constants
    yield {"theta": theta, "ref": None, "target": theta, "sums": "fp64"}, constants


def means():
    for out, with_ref, tiles in (("fp32", True, 1), ("fp64", True, 16), ("fp32", False, 2)):
        pointers = {"sums": "fp64", "e_theta": out, "e_ref": out, "d": out}
        yield pointers, {"WITH_REF": with_ref, "TILES": tiles, "BLOCK": kernels.SUM_BLOCK}


def preference_backward():
    for theta in FLOATS:
        wide = "fp64" if theta == "fp64" else "fp32"
        pointers = {"theta": theta, "ref": theta, "target": wide, "a": wide, "b": wide}
        yield pointers | {"out": theta}, {"BLOCK": block(theta)}


VARIANTS = (affine, lattice, scaled, encode, decode, errors, means, preference_backward)


def compiled(variants, capability, aligned=True):
    """Yield every variant of a kernel, compiled for operands that start at multiples of 16."""
    kernel = getattr(kernels, f"_{variants.__name__}_kernel")
    for pointers, constants in variants():
        signature, values, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            operand = pointers.get(name.removesuffix("_ptr"))
            if name in constants or (name not in INTEGERS and operand is None):
                signature[name], values[(i,)] = "constexpr", constants.get(name)
                continue
            signature[name] = "i32" if name in INTEGERS else f"*{operand}"
            varying = kernel.params[i].do_not_specialize
            if aligned and not varying:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        target = GPUTarget("cuda", capability, 32)
        yield pointers, constants, triton.compile(source, target, dict(kernels.OPTIONS))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def usage(cubin, path):
    """What the machine code takes: registers, and bytes of stack and of local memory per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path.write_bytes(cubin)
    command = [str(tool), "-res-usage", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


@pytest.mark.parametrize("variants", VARIANTS, ids=lambda variants: variants.__name__)
def test_no_variant_spills(variants, tmp_path):
    for capability in CAPABILITIES:
        for *variant, kernel in compiled(variants, capability):
            used = usage(kernel.asm["cubin"], tmp_path / "kernel.cubin")
            # What does not fit the registers goes to the stack.
            assert used["STACK"] == used["LOCAL"] == 0, (variant, capability, used)
            # Two blocks of threads on a multiprocessor at least.
            assert 2 * used["REG"] * kernels.THREADS <= 65536
            assert kernel.metadata.num_warps * 32 == kernels.THREADS <= 1024


def test_elements_are_read_and_written_in_units_of_128_bits():
    for variants in (affine, lattice, scaled, decode, preference_backward):
        for pointers, _, kernel in compiled(variants, 90):
            if "fp64" in pointers.values():
                continue  # two elements for each thread
            text = kernel.asm["ptx"]
            wide = re.findall(r"(ld|st)\.global(?:\.[\w:]+)*?\.v(\d)\.b(\d+)", text)
            assert {"ld", "st"} <= {way for way, n, bits in wide if int(n) * int(bits) == 128}
            # The others: four elements of 16 bits beside four of 32.
            assert all(int(n) * int(bits) in (64, 128) for _, n, bits in wide), pointers


def test_products_are_rounded_before_they_are_added():
    """It shows in float64 states; a division is the only place for a fused multiply-add."""
    for pointers, constants, kernel in compiled(affine, 90):
        text = kernel.asm["ptx"]
        assert "fma" not in text and "mul.rn.f64" in text, pointers
        assert ("div.rn.f64" in text) == constants["INVERSE"]


def test_operands_of_any_alignment_compile():
    for variants in VARIANTS:
        for *_, kernel in itertools.islice(compiled(variants, 90, aligned=False), 1):
            assert kernel.asm["cubin"]
