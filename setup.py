# SPDX-License-Identifier: Apache-2.0
"""Builds the native extension ``inpo_fast._C``; everything else is in pyproject.toml.

INPO_FAST_NATIVE=0 leaves it out, INPO_FAST_NATIVE=1 makes a failure fatal. Otherwise, without
torch in the build environment, or without a compiler that works, the library is installed in pure
Python and says so in one line. With a CUDA build of torch and an nvcc of its major version the GPU
kernels are built too, for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), or for the GPUs of this machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SOURCES = ["bindings.cpp", "common.cpp", "preference.cpp", "reversible.cpp"]
CUDA_SOURCES = ["cuda/preference.cu", "cuda/reversible.cu"]

# Kernels use the part of torch's C++ API that is stable from this version on: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"

# Contraction to fused multiply-add would change the bits of float64 states.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]

MODE = os.environ.get("INPO_FAST_NATIVE", "")


class SourceArchive(sdist):
    """An sdist with csrc, also where no extension, and so none of its sources, is declared."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        sources = (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*")))
        super().make_release_tree(base_dir, sorted({*files, *sources}))


def notice(reason: str) -> None:
    """Say in one line why the extension is left out, or stop if it was demanded."""
    reason = " ".join(str(reason).split())[:300]
    if MODE == "1":
        sys.exit(f"inpo_fast: INPO_FAST_NATIVE=1, but the native extension failed: {reason}")
    print(f"inpo_fast: installing without the native extension: {reason}", file=sys.stderr)


def cuda_targets() -> list[str]:
    """Return nvcc's flags that say what to build GPU kernels for; nothing where that is moot."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return []
    if problem := nvcc_problem(CUDA_HOME, torch.version.cuda):
        print(f"inpo_fast: the extension has CPU kernels only: {problem}", file=sys.stderr)
        return []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found = listed in ("", "native")
    if found:
        devices = range(torch.cuda.device_count())
        listed = default_architectures([torch.cuda.get_device_capability(i) for i in devices])
    try:
        return gencode(listed)
    except ValueError as error:
        if not found:
            sys.exit(f"inpo_fast: TORCH_CUDA_ARCH_LIST={listed!r} cannot be: {error}")
        told = f"torch cannot build for this machine's GPUs ({listed}): {error}"
        print(f"inpo_fast: the extension has CPU kernels only: {told}", file=sys.stderr)
        return []


def nvcc_problem(home: str | None, torch_cuda: str) -> str:
    """Return why the nvcc of a CUDA folder cannot build for a torch with CUDA "X.Y", or "".

    BuildExtension refuses another major version too, and with it the CPU kernels.
    """
    nvcc = Path(home) / "bin" / "nvcc" if home is not None else None
    if nvcc is None or not nvcc.exists():
        return "there is no nvcc"
    try:
        told = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is not None and release[1] != torch_cuda.partition(".")[0]:
        return f"nvcc is of CUDA {release[1]}.{release[2]} and torch of CUDA {torch_cuda}"
    return ""


def default_architectures(capabilities: list[tuple[int, int]]) -> str:
    """Return a list for these GPUs, or for those in wide use; later GPUs compile what is last."""
    names = [f"{major}.{minor}" for major, minor in sorted(set(capabilities))] or ["8.0", "9.0"]
    return ";".join(names) + "+PTX"


def gencode(architectures: str) -> list[str]:
    """Return nvcc's flags for a list such as "8.0;9.0a" or "Ampere 9.0+PTX", which torch reads.

    Machine code for each entry, and for later GPUs what the driver can compile of those with +PTX.
    """
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    with patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=architectures):
        flags: list[str] = _get_cuda_arch_flags()
    return flags


def macros(cuda: bool) -> list[str]:
    """Return what every source is compiled with."""
    return [f"-DINPO_FAST_TORCH_TARGET={TORCH_TARGET_VERSION}", *["-DUSE_CUDA"] * cuda]


def nvcc_flags(targets: list[str]) -> list[str]:
    """Return what GPU kernels are compiled with, for the targets that `gencode` returned."""
    return [*CUDA_FLAGS, *macros(cuda=True), *targets]


def native() -> dict[str, Any]:
    """Return the arguments of setup() that build the extension, or none."""
    if MODE not in ("", "0", "1"):
        sys.exit(f"inpo_fast: INPO_FAST_NATIVE must be 0 or 1, got {MODE!r}")
    if MODE == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        notice(f"{error} (torch must be in the build environment: pip --no-build-isolation)")
        return {}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                notice(str(error))
                self.extensions = []

    targets = cuda_targets()
    built_for = [flag.rpartition("code=")[2] for flag in targets]
    flags = " ".join(FLAGS)
    extension = (CUDAExtension if targets else CppExtension)(
        "inpo_fast._C",
        [f"csrc/{source}" for source in [*SOURCES, *CUDA_SOURCES * bool(targets)]],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],
        extra_compile_args={
            "cxx": [
                *FLAGS,
                "-g0",
                *macros(cuda=bool(targets)),
                f'-DINPO_FAST_BUILD_FLAGS="{flags}"',
                f'-DINPO_FAST_TORCH_VERSION="{torch.__version__}"',
                f'-DINPO_FAST_CUDA_ARCHITECTURES="{" ".join(built_for)}"',
            ],
            "nvcc": nvcc_flags(targets),
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


# Builds run this file as a script; tests import it for the flags.
if __name__ == "__main__":
    arguments = native()
    arguments.setdefault("cmdclass", {})["sdist"] = SourceArchive
    setup(**arguments)
