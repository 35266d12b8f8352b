# SPDX-License-Identifier: Apache-2.0
"""Which backends there are, and which one runs.

"reference" is plain torch and runs everywhere. "native" is the extension ``inpo_fast._C``.
"triton" compiles its kernels when they are first used, for CUDA GPUs. A backend that is named runs
or raises; "auto" takes the first of native, triton and reference that can run on the device.

Nothing here imports triton or asks for a GPU before a backend has to be chosen for a CUDA tensor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

from inpo_fast.ops import native

__all__ = ["Backend", "Impl", "backends", "resolve"]

Impl = Literal["auto", "reference", "native", "triton"]
IMPLS: tuple[str, ...] = get_args(Impl)

ENVIRONMENT_VARIABLE = "INPO_FAST_IMPL"
# Read once, so that a call under torch.compile does not depend on the environment.
DEFAULT_IMPL = os.environ.get(ENVIRONMENT_VARIABLE, "auto")

# float64 and bfloat16 arithmetic, as the Triton kernels use it.
TRITON_CAPABILITY = (8, 0)


class Backend(NamedTuple):
    """Whether a backend can run here, and why not (or what it is)."""

    available: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Return for each backend whether it is available here and the reason.

    Where triton is installed and a GPU is there, this compiles a first kernel.
    """
    if native.MISSING:
        found = Backend(False, native.MISSING)
    else:
        architectures = f" ({', '.join(native.ARCHITECTURES)})" if native.ARCHITECTURES else ""
        found = Backend(True, f"inpo_fast._C for {', '.join(native.DEVICES)}{architectures}")
    problem = triton_problem()
    if problem:
        triton = Backend(False, problem)
    else:
        where = "in its interpreter" if triton_module().INTERPRETED else "on CUDA GPUs"
        triton = Backend(True, f"triton {triton_module().VERSION} {where}")
    return {
        "reference": Backend(True, "plain torch, every device"),
        "native": found,
        "triton": triton,
    }


# --- Native -----------------------------------------------------------------------------------


def _native_problem(device: torch.device) -> str:
    """Return why the native kernels cannot run on the device, or "" if they can."""
    if native.MISSING:
        return native.MISSING
    if device.type not in native.DEVICES:
        return f"it has kernels for {', '.join(native.DEVICES)} only, got tensors on {device}"
    if device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(architecture, capability) for architecture in native.ARCHITECTURES):
        return ""
    return (
        f"it was built for {', '.join(native.ARCHITECTURES)}, and {device} has compute capability"
        f" {_dotted(capability)}; rebuild it on this machine with: {native.BUILD_COMMAND}"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Say whether code for it runs: machine code "sm_XY" on the same major and at least the minor
    version, "compute_XY" (which the driver compiles) on every later GPU, and either with an "a" on
    that architecture alone."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", architecture)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4]:
        return capability == built
    return capability >= built and (match[1] == "compute" or capability[0] == built[0])


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


# --- Triton -----------------------------------------------------------------------------------


@functools.cache
def triton_module() -> ModuleType:
    """Import and return ``inpo_fast.ops.triton``, whose functions have the operators' names."""
    return importlib.import_module("inpo_fast.ops.triton")


@functools.cache
def triton_problem() -> str:
    """Return why Triton kernels cannot run in this process, or "" if they can; found out once."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; install it with: pip install "inpo-fast[triton]"'
    try:
        if triton_module().INTERPRETED:
            return ""
    except Exception as error:
        return f"triton does not import: {_first_line(error)}"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or this torch is built without CUDA"
    # The current GPU, or another one beside it that is new enough.
    current = torch.cuda.current_device()
    devices = current, *(i for i in range(torch.cuda.device_count()) if i != current)
    capabilities = {i: torch.cuda.get_device_capability(i) for i in devices}
    able = [i for i in devices if capabilities[i] >= TRITON_CAPABILITY]
    if not able:
        return _too_old("the GPU", capabilities[current])
    try:
        triton_module().probe(torch.device("cuda", able[0]))
    except Exception as error:
        problem = f"triton cannot compile or launch a kernel: {_first_line(error)}"
        warnings.warn(
            f"{problem}. The operators run on the slow reference backend instead. Triton needs a C"
            " compiler and Python's headers, a writable cache directory (TRITON_CACHE_DIR) and a"
            f" driver for its CUDA version; {ENVIRONMENT_VARIABLE}=reference silences this",
            RuntimeWarning,
            stacklevel=2,
        )
        return problem
    return ""


def _triton_problem_on(device: torch.device) -> str:
    """Return why Triton kernels cannot run on the device, or "" if they can."""
    problem = triton_problem()
    if problem:
        return problem
    if triton_module().INTERPRETED and device.type in ("cpu", "cuda"):
        return ""
    if device.type != "cuda":
        return (
            f"it runs on CUDA tensors, got tensors on {device} (TRITON_INTERPRET=1 interprets it on"
            " the CPU, for tests)"
        )
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= TRITON_CAPABILITY else _too_old(str(device), capability)


def _too_old(what: str, capability: tuple[int, int]) -> str:
    return (
        f"it needs compute capability {_dotted(TRITON_CAPABILITY)} or higher, {what} has"
        f" {_dotted(capability)}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- Choice -----------------------------------------------------------------------------------

_PROBLEMS = {
    "reference": lambda device: "",
    "native": _native_problem,
    "triton": _triton_problem_on,
}

_automatic: dict[torch.device, str] = {}
_resolved: dict[tuple[str, torch.device], str] = {}


def automatic(device: torch.device) -> str:
    """Return the backend that "auto" is on this device, whatever INPO_FAST_IMPL says."""
    found = _automatic.get(device)
    if found is None:
        order = ("native", "triton") if device.type == "cuda" else ("native",)
        usable = (name for name in order if not _PROBLEMS[name](device))
        found = _automatic[device] = next(usable, "reference")
    return found


def resolve(impl: str, device: torch.device) -> str:
    """Return the backend to run, "reference", "native" or "triton".

    Raises:
        ValueError: the backend is unknown, or named and not available for this device.
    """
    found = _resolved.get((impl, device))
    if found is None:
        found = _resolved[impl, device] = _resolve(impl, device)
    return found


# torch.compile takes the result as a constant, as torch.compiler.assume_constant_result would
# have it, whose use imports the compiler.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resolve(impl: str, device: torch.device) -> str:
    argument = "impl"
    if impl == "auto":
        impl, argument = DEFAULT_IMPL, ENVIRONMENT_VARIABLE
    if impl == "auto":
        return automatic(device)
    if impl not in IMPLS:
        raise ValueError(f"{argument} must be one of {', '.join(IMPLS)}, got {impl!r}")
    problem = _PROBLEMS[impl](device)
    if problem:
        raise ValueError(f"{argument}={impl!r} is not available: {problem}")
    return impl
