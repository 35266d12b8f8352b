# SPDX-License-Identifier: Apache-2.0
"""Operators of reversible diffusion solvers and of preference training.

Importing this package registers ``torch.ops.inpo_fast.*`` and loads the native kernels if they
are built. The functions below are the typed way in; ``inpo_fast.ops.reference`` specifies them.
"""

from inpo_fast.ops.choice import Backend, Impl, backends
from inpo_fast.ops.functional import (
    PreferenceErrors,
    affine_inverse,
    affine_inverse_,
    affine_update,
    affine_update_,
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
    preference_backward,
    preference_errors,
    preference_margin,
)
from inpo_fast.ops.native import build_info
from inpo_fast.ops.status import (
    STATUS_NONFINITE,
    STATUS_RANGE,
    LatticeRangeError,
    NonFiniteError,
    StateError,
    check_status,
    new_status,
)

__all__ = [
    "STATUS_NONFINITE",
    "STATUS_RANGE",
    "Backend",
    "Impl",
    "LatticeRangeError",
    "NonFiniteError",
    "PreferenceErrors",
    "StateError",
    "affine_inverse",
    "affine_inverse_",
    "affine_update",
    "affine_update_",
    "backends",
    "build_info",
    "check_status",
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
    "preference_backward",
    "preference_errors",
    "preference_margin",
]
