# SPDX-License-Identifier: Apache-2.0
"""Builds the native extension ``inpo_fast._C``; everything else is in pyproject.toml.

INPO_FAST_NATIVE=0 leaves it out, INPO_FAST_NATIVE=1 makes a failure fatal. Otherwise, without
torch in the build environment, or without a compiler that works, the library is installed in pure
Python and says so in one line.
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

# Kernels use the part of torch's C++ API that is stable from this version on: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"

# Contraction to fused multiply-add would change the bits of float64 states.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]

MODE = os.environ.get("INPO_FAST_NATIVE", "")


class SourceArchive(sdist):
    """An sdist with csrc, also where no extension, and so none of its sources, is declared."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        sources = (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*")))
        super().make_release_tree(base_dir, sorted({*files, *sources}))


def notice(reason: str) -> None:
    """Say in one line why the extension is left out, or stop if it was demanded."""
    reason = " ".join(str(reason).split())[:300]
    if MODE == "1":
        sys.exit(f"inpo_fast: INPO_FAST_NATIVE=1, but the native extension failed: {reason}")
    print(f"inpo_fast: installing without the native extension: {reason}", file=sys.stderr)


def native() -> dict[str, Any]:
    """Return the arguments of setup() that build the extension, or none."""
    if MODE not in ("", "0", "1"):
        sys.exit(f"inpo_fast: INPO_FAST_NATIVE must be 0 or 1, got {MODE!r}")
    if MODE == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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

    flags = " ".join(FLAGS)
    extension = CppExtension(
        "inpo_fast._C",
        [f"csrc/{source}" for source in SOURCES],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*"))],
        extra_compile_args=[
            *FLAGS,
            "-g0",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f'-DINPO_FAST_BUILD_FLAGS="{flags}"',
            f'-DINPO_FAST_TORCH_VERSION="{torch.__version__}"',
        ],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


arguments = native()
arguments.setdefault("cmdclass", {})["sdist"] = SourceArchive
setup(**arguments)
