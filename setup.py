# SPDX-License-Identifier: Apache-2.0
"""Builds the native extension ``inpo_fast._C``; everything else is in pyproject.toml.

INPO_FAST_NATIVE=0 leaves it out, INPO_FAST_NATIVE=1 makes a failure fatal. Otherwise, without
torch in the build environment, or without a compiler that works, the library is installed in pure
Python and says so in one line. With a CUDA build of torch and its nvcc the GPU kernels are built
too, for TORCH_CUDA_ARCH_LIST ("8.0;9.0"), or else for the GPUs of this machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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


def cuda_architectures() -> list[str]:
    """Return what to build GPU kernels for, such as ["8.0", "9.0"]; nothing where that is moot."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return []
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        print("inpo_fast: no nvcc: the extension has CPU kernels only", file=sys.stderr)
        return []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        return [name.removesuffix("+PTX") for name in listed]
    found = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return sorted({f"{major}.{minor}" for major, minor in found}) or ["8.0", "9.0"]


def macros(cuda: bool) -> list[str]:
    """Return what every source is compiled with."""
    return [f"-DINPO_FAST_TORCH_TARGET={TORCH_TARGET_VERSION}", *["-DUSE_CUDA"] * cuda]


def nvcc_flags(numbers: list[str]) -> list[str]:
    """Return what GPU kernels are compiled with for architectures such as ["80", "90"].

    Machine code for each, and for later GPUs what the driver can compile of the last.
    """
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    targets += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in numbers[-1:]]
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

    numbers = [name.replace(".", "") for name in cuda_architectures()]
    built_for = [*(f"sm_{n}" for n in numbers), *(f"compute_{n}" for n in numbers[-1:])]
    flags = " ".join(FLAGS)
    extension = (CUDAExtension if numbers else CppExtension)(
        "inpo_fast._C",
        [f"csrc/{source}" for source in [*SOURCES, *CUDA_SOURCES * bool(numbers)]],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],
        extra_compile_args={
            "cxx": [
                *FLAGS,
                "-g0",
                *macros(cuda=bool(numbers)),
                f'-DINPO_FAST_BUILD_FLAGS="{flags}"',
                f'-DINPO_FAST_TORCH_VERSION="{torch.__version__}"',
                f'-DINPO_FAST_CUDA_ARCHITECTURES="{" ".join(built_for)}"',
            ],
            "nvcc": nvcc_flags(numbers),
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


# Builds run this file as a script; tests import it for the flags.
if __name__ == "__main__":
    arguments = native()
    arguments.setdefault("cmdclass", {})["sdist"] = SourceArchive
    setup(**arguments)
