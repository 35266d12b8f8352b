"""Exact diffusion inversion (BDIA, EDICT, O-BELM) and preference alignment by DDIM inversion.

The operators under both are torch custom ops, `torch.ops.inpo_fast.*`, and typed functions here.
"""

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
)
from .sampler import Sampler, State
from .schedule import NoiseSchedule
from .solvers import SOLVERS, AmplificationWarning, Program, Stage, Update, bdia, ddim, edict, obelm

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
    "dpo_loss",
    "edict",
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
    "new_status",
    "obelm",
    "preference_backward",
    "preference_errors",
]
