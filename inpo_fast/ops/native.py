# SPDX-License-Identifier: Apache-2.0
"""The native extension ``inpo_fast._C``: loading it, and how it was built.

Loading registers its kernels with torch. A missing extension is not an error, and nothing is
logged: the reason is kept for whoever names the backend.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["build_info"]

BUILD_COMMAND = "INPO_FAST_NATIVE=1 pip install --no-build-isolation -e ."


def _load() -> tuple[dict[str, Any] | None, str]:
    """Return (build information, "") or (None, the reason why there is none)."""
    try:
        module = importlib.import_module("inpo_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "inpo_fast._C":
            return None, f"inpo_fast._C does not load: {error}"
        return None, f"inpo_fast._C is not built; build it from a checkout with: {BUILD_COMMAND}"
    except ImportError as error:
        # A library that was built for another torch or Python.
        return None, f"inpo_fast._C does not load ({error}); rebuild it with: {BUILD_COMMAND}"
    return dict(module.build_info()), ""


_build_info, MISSING = _load()
DEVICES: tuple[str, ...] = () if _build_info is None else tuple(_build_info["devices"])
# Of CUDA kernels, such as "sm_90".
ARCHITECTURES: tuple[str, ...] = (
    () if _build_info is None else tuple(_build_info["cuda_architectures"])
)


def build_info() -> dict[str, Any] | None:
    """Return how the native extension was built, or None if there is none.

    Keys: compiler, flags, cuda_architectures (list), torch_version, torch_target_version, devices
    (list of device types with kernels), simd (the instruction set in use here).
    """
    return None if _build_info is None else dict(_build_info)
