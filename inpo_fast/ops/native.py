# SPDX-License-Identifier: Apache-2.0
"""The native extension ``inpo_fast._C``: loading, build information, and which backends there are.

Loading registers its kernels with torch. A missing extension is not an error, and nothing is
logged: the reason is kept for whoever names the backend.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Literal, NamedTuple, get_args

import torch

__all__ = ["Backend", "Impl", "backends", "build_info"]

Impl = Literal["auto", "reference", "native", "triton"]
IMPLS: tuple[str, ...] = get_args(Impl)

_BUILD_COMMAND = "INPO_FAST_NATIVE=1 pip install --no-build-isolation -e ."


class Backend(NamedTuple):
    """Whether a backend can run here, and why not (or what it is)."""

    available: bool
    reason: str


def _load() -> tuple[dict[str, Any] | None, str]:
    """Return (build information, "") or (None, the reason why there is none)."""
    try:
        module = importlib.import_module("inpo_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "inpo_fast._C":
            return None, f"inpo_fast._C does not load: {error}"
        return None, f"inpo_fast._C is not built; build it from a checkout with: {_BUILD_COMMAND}"
    except ImportError as error:
        # A library that was built for another torch or Python.
        return None, f"inpo_fast._C does not load ({error}); rebuild it with: {_BUILD_COMMAND}"
    return dict(module.build_info()), ""


_build_info, _missing = _load()
NATIVE_DEVICES: tuple[str, ...] = () if _build_info is None else tuple(_build_info["devices"])

ENVIRONMENT_VARIABLE = "INPO_FAST_IMPL"
# Read once, so that a call under torch.compile does not depend on the environment.
DEFAULT_IMPL = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def build_info() -> dict[str, Any] | None:
    """Return how the native extension was built, or None if there is none.

    Keys: compiler, flags, cuda_architectures (list), torch_version, torch_target_version, devices
    (list of device types with kernels), simd (the instruction set in use here).
    """
    return None if _build_info is None else dict(_build_info)


def backends() -> dict[str, Backend]:
    """Return for each backend whether it is available here and the reason."""
    if _build_info is None:
        native = Backend(False, _missing)
    else:
        native = Backend(True, f"inpo_fast._C for {', '.join(NATIVE_DEVICES)}")
    return {
        "reference": Backend(True, "plain torch, every device"),
        "native": native,
        "triton": Backend(False, "inpo_fast has no Triton kernels yet"),
    }


def resolve(impl: str, device: torch.device) -> str:
    """Return the backend to run: "auto" (torch's dispatcher decides), "reference" or "native".

    Raises:
        ValueError: the backend is unknown, or named and not available for this device.
    """
    argument = "impl"
    if impl == "auto":
        impl, argument = DEFAULT_IMPL, ENVIRONMENT_VARIABLE
    if impl in ("auto", "reference") or (impl == "native" and device.type in NATIVE_DEVICES):
        return impl
    if impl not in IMPLS:
        raise ValueError(f"{argument} must be one of {', '.join(IMPLS)}, got {impl!r}")
    available, reason = backends()[impl]
    if available:
        reason = f"it has kernels for {', '.join(NATIVE_DEVICES)} only, got tensors on {device}"
    raise ValueError(f"{argument}={impl!r} is not available: {reason}")
