"""Every CUDA source becomes machine code for GPUs that need not be here, and nothing spills."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = "8.0;9.0+PTX"

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
    flags = module.nvcc_flags(["-gencode=arch=compute_80,code=sm_80"])
    assert "-gencode=arch=compute_80,code=sm_80" in flags
    # a product is rounded before it is added
    assert "--fmad=false" in flags


@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        ("8.0;9.0", {"sm_80", "sm_90"}),
        ("8.0 9.0", {"sm_80", "sm_90"}),
        ("8.0+PTX;9.0", {"sm_80", "compute_80", "sm_90"}),
        ("9.0+PTX", {"sm_90", "compute_90"}),
        ("9.0a", {"sm_90a"}),
        ("8.6;9.0a+PTX", {"sm_86", "sm_90a", "compute_90a"}),
        ("12.0", {"sm_120"}),
        ("Hopper", {"sm_90", "compute_90"}),
        ("Turing 9.0", {"sm_75", "compute_75", "sm_90"}),
    ],
)
def test_architectures_are_read_as_torch_reads_them(listed, codes, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    flags = build().gencode(listed)
    assert {flag.rpartition("code=")[2] for flag in flags} == codes and len(flags) == len(codes)
    # the virtual architecture of each is its own
    assert all(re.search(r"arch=compute_(\w+),code=\w+_\1$", flag) for flag in flags)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.0"


def test_without_a_list_the_newest_gpu_here_has_ptx():
    assert build().default_architectures([(12, 0), (9, 0), (12, 0)]) == "9.0;12.0+PTX"
    assert build().default_architectures([]) == "8.0;9.0+PTX"


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """Pretends a torch with CUDA 13.0, and an nvcc of a release."""

    def pretend(release, status=0):
        tool = tmp_path / "bin" / "nvcc"
        tool.parent.mkdir()
        said = f"Cuda compilation tools, release {release}, V{release}.88"
        tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
        tool.chmod(0o755)

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    return pretend


def test_an_nvcc_of_torchs_major_version_builds_gpu_kernels(cuda, monkeypatch):
    cuda("13.2")
    assert build().cuda_targets() == ["-gencode=arch=compute_90,code=sm_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;Hoper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST='9.0;Hoper' cannot be: .*Hoper"):
        build().cuda_targets()


def test_a_gpu_that_torch_does_not_know_costs_the_gpu_kernels_only(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (99, 1))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    module = build()
    monkeypatch.setattr(module, "nvcc_problem", lambda *_: "")
    assert module.cuda_targets() == []
    assert "CPU kernels only: torch cannot build for" in capsys.readouterr().err


@pytest.mark.parametrize("demanded", ["", "1"])
def test_without_such_an_nvcc_the_cpu_kernels_are_built(cuda, demanded, capsys, monkeypatch):
    monkeypatch.setenv("INPO_FAST_NATIVE", demanded)
    for make, reason in (
        (lambda: None, "there is no nvcc"),
        (lambda: cuda("12.8"), "nvcc is of CUDA 12.8 and torch of CUDA 13.0"),
    ):
        make()
        (extension,) = build().native()["ext_modules"]
        assert sorted(Path(source).name for source in extension.sources) == build().SOURCES
        assert "-DUSE_CUDA" not in extension.extra_compile_args["cxx"]
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"inpo_fast: the extension has CPU kernels only: {reason}"


def test_an_nvcc_that_does_not_run_is_named(cuda, tmp_path):
    cuda("13.0", status=1)
    assert "nvcc does not run: " in build().nvcc_problem(str(tmp_path), "13.0")


@pytest.mark.parametrize("source", build().CUDA_SOURCES)
def test_it_compiles_and_nothing_spills(source, tmp_path):
    command = [
        *(nvcc(), "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernels.o")),
        *build().nvcc_flags(build().gencode(ARCHITECTURES)),
        *("-Xptxas", "-v", f"-I{ROOT / 'csrc'}"),
        *(f"-I{path}" for path in cpp_extension.include_paths()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = list(usage(done.stdout + done.stderr))
    assert {architecture for architecture, *_ in kernels} == {"80", "90"}
    spilled = [kernel for kernel in kernels if kernel[2] > SPILLED_BYTES]
    assert not spilled
