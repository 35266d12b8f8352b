"""Exact diffusion inversion (BDIA, EDICT, O-BELM) and preference alignment by DDIM inversion.

The operators under both are torch custom ops, `torch.ops.inpo_fast.*`, and typed functions here.
"""

from importlib import import_module
from typing import Any

from ._version import __version__
from .losses import PreferenceLoss, dpo_loss
from .ops import (
    LatticeRangeError,
    NonFiniteError,
    PreferenceErrors,
    affine_inverse,
    affine_inverse_,
    affine_update,
    affine_update_,
    backends,
    check_status,
    lattice_decode,
    lattice_encode,
    lattice_inverse,
    lattice_inverse_,
    lattice_scaled_inverse,
    lattice_scaled_inverse_,
    lattice_scaled_update,
    lattice_scaled_update_,
    lattice_update,
    lattice_update_,
    new_status,
    preference_backward,
    preference_errors,
    preference_margin,
)
from .sampler import Sampler, State
from .schedule import NoiseSchedule
from .solvers import (
    SOLVERS,
    AmplificationWarning,
    Program,
    Stage,
    Update,
    bdia,
    ddim,
    dpmpp_2m,
    dpmpp_2s,
    edict,
    heun,
    mccallum_foster,
    obelm,
)

__all__ = [
    "SOLVERS",
    "AmplificationWarning",
    "LatticeRangeError",
    "NoiseSchedule",
    "NonFiniteError",
    "PreferenceErrors",
    "PreferenceLoss",
    "Program",
    "Sampler",
    "Stage",
    "State",
    "Update",
    "__version__",
    "affine_inverse",
    "affine_inverse_",
    "affine_update",
    "affine_update_",
    "backends",
    "bdia",
    "check_status",
    "ddim",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpo_loss",
    "edict",
    "heun",
    "lattice_decode",
    "lattice_encode",
    "lattice_inverse",
    "lattice_inverse_",
    "lattice_scaled_inverse",
    "lattice_scaled_inverse_",
    "lattice_scaled_update",
    "lattice_scaled_update_",
    "lattice_update",
    "lattice_update_",
    "mccallum_foster",
    "new_status",
    "obelm",
    "preference_backward",
    "preference_errors",
    "preference_margin",
]

# These need diffusers, and `layers` Triton: imported with the first one that is asked for.
_LAZY = {
    "BDIAInverseScheduler": "schedulers",
    "BDIAScheduler": "schedulers",
    "EDICTInverseScheduler": "schedulers",
    "EDICTScheduler": "schedulers",
    "Inversion": "pipelines",
    "OBELMInverseScheduler": "schedulers",
    "OBELMScheduler": "schedulers",
    "fuse_layers": "layers",
    "invert": "pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        extra = "triton" if error.name == "triton" else "diffusers"
        raise ModuleNotFoundError(
            f'inpo_fast.{name} needs the package {error.name}: pip install "inpo-fast[{extra}]"',
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
