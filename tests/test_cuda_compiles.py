"""Every CUDA source becomes machine code for GPUs that need not be here, and nothing spills."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90")

# The compiler's own choices around the limit of registers; what matters is that nothing more goes
# to memory, as an array of a lane's operands would.
SPILLED_BYTES = 8


def build():
    """setup.py as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("inpo_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc():
    """The compiler, or a skip with the reason."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        where = f"{home}/bin (CUDA_HOME)" if home else "PATH, and CUDA_HOME is not set"
        pytest.skip(f"no nvcc in {where}: the CUDA sources are not compiled")
    return found


def usage(report):
    """(architecture, kernel, bytes of spill stores and loads) of what ptxas says with -v."""
    entry = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
    spills = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
    current = None
    for line in report.splitlines():
        if match := entry.search(line):
            current = match[2], match[1]
        elif match := spills.search(line):
            yield *current, max(int(match[1]), int(match[2]))


def test_importing_the_build_builds_nothing_and_has_all_sources():
    module = build()
    sources = {str(path.relative_to(ROOT / "csrc")) for path in ROOT.glob("csrc/**/*.cu")}
    assert sources == set(module.CUDA_SOURCES) and sources
    flags = module.nvcc_flags(["80", "90"])
    assert "-gencode=arch=compute_80,code=sm_80" in flags
    # PTX of the last one alone
    assert [f for f in flags if "code=compute_" in f] == [
        "-gencode=arch=compute_90,code=compute_90"
    ]
    # a product is rounded before it is added
    assert "--fmad=false" in flags


@pytest.mark.parametrize("source", build().CUDA_SOURCES)
def test_it_compiles_and_nothing_spills(source, tmp_path):
    command = [
        *(nvcc(), "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernels.o")),
        *build().nvcc_flags(list(ARCHITECTURES)),
        *("-Xptxas", "-v", f"-I{ROOT / 'csrc'}"),
        *(f"-I{path}" for path in include_paths()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = list(usage(done.stdout + done.stderr))
    assert {architecture for architecture, *_ in kernels} == set(ARCHITECTURES)
    spilled = [kernel for kernel in kernels if kernel[2] > SPILLED_BYTES]
    assert not spilled
