# SPDX-License-Identifier: Apache-2.0
"""Schemas of ``torch.ops.inpo_fast``, their reference kernels and their fake kernels.

The reference serves every device. The native extension registers kernels for its devices under
the same names; those take precedence wherever they exist, in whichever order the two are loaded.
Where it has none for CUDA, Triton serves CUDA tensors if it can. It is imported with the first of
them, and has its operators also by name, as ``torch.ops.inpo_fast_triton``.

The operators have no autograd kernel: gradients are defined by the functions of ``inpo_fast.ops``,
which also tell autograd that an operator in place has written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inpo_fast.ops import native, reference
from inpo_fast.ops.choice import automatic, triton_module
from inpo_fast.ops.validation import CHECKS

NAMESPACE = "inpo_fast"
TRITON_NAMESPACE = "inpo_fast_triton"

_AFFINE = "Tensor y, Tensor? m1, Tensor? m2, Tensor coef, Tensor(STATUS!)? status"
_LATTICE = (
    "Tensor y, Tensor? m1, Tensor? m2, Tensor coef, {ratio}int frac_bits, Tensor(STATUS!) status"
)
_PLAIN = _LATTICE.format(ratio="")
_SCALED = _LATTICE.format(ratio="Tensor ratio, ")

# Alias names are by position: tensors that an operator changes are a, b, c in order.
SCHEMAS: dict[str, str] = {
    "affine_update": f"(Tensor x, {_AFFINE.replace('STATUS', 'a')}) -> Tensor",
    "affine_inverse": f"(Tensor x, {_AFFINE.replace('STATUS', 'a')}) -> Tensor",
    "affine_update_": f"(Tensor(a!) x, {_AFFINE.replace('STATUS', 'b')}) -> ()",
    "affine_inverse_": f"(Tensor(a!) x, {_AFFINE.replace('STATUS', 'b')}) -> ()",
    "lattice_update": f"(Tensor z, {_PLAIN.replace('STATUS', 'a')}) -> Tensor",
    "lattice_inverse": f"(Tensor z, {_PLAIN.replace('STATUS', 'a')}) -> Tensor",
    "lattice_update_": f"(Tensor(a!) z, {_PLAIN.replace('STATUS', 'b')}) -> ()",
    "lattice_inverse_": f"(Tensor(a!) z, {_PLAIN.replace('STATUS', 'b')}) -> ()",
    "lattice_scaled_update": (
        f"(Tensor z, Tensor buffer, {_SCALED.replace('STATUS', 'a')}) -> (Tensor, Tensor)"
    ),
    "lattice_scaled_inverse": (
        f"(Tensor z, Tensor buffer, {_SCALED.replace('STATUS', 'a')}) -> (Tensor, Tensor)"
    ),
    "lattice_scaled_update_": (
        f"(Tensor(a!) z, Tensor(b!) buffer, {_SCALED.replace('STATUS', 'c')}) -> ()"
    ),
    "lattice_scaled_inverse_": (
        f"(Tensor(a!) z, Tensor(b!) buffer, {_SCALED.replace('STATUS', 'c')}) -> ()"
    ),
    "lattice_encode": "(Tensor x, Tensor scale, int frac_bits, Tensor(a!) status) -> Tensor",
    "lattice_decode": (
        "(Tensor z, Tensor scale, int frac_bits, int copies, ScalarType dtype) -> Tensor"
    ),
    "preference_errors": ("(Tensor theta, Tensor? ref, Tensor target) -> (Tensor, Tensor, Tensor)"),
    "preference_backward": (
        "(Tensor theta, Tensor? ref, Tensor target, Tensor a, Tensor b) -> Tensor"
    ),
}

WRITTEN: dict[str, int] = {
    name: 0 if not name.endswith("_") else 2 if "scaled" in name else 1 for name in SCHEMAS
}
"""How many of its first arguments an operator writes into."""

REFERENCE: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in SCHEMAS}


def _fake_like_first(first: Tensor, *args: object) -> Tensor:
    return torch.empty_like(first)


def _fake_in_place(*args: object) -> None:
    return None


def _fake_like_two(z: Tensor, buffer: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(buffer)


def _fake_encode(x: Tensor, scale: Tensor, frac_bits: int, status: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int32)


def _fake_decode(
    z: Tensor, scale: Tensor, frac_bits: int, copies: int, dtype: torch.dtype
) -> Tensor:
    return reference.empty_copies(z, copies, dtype)


def _fake_errors(
    theta: Tensor, ref: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    error = theta.new_empty(theta.shape[0], dtype=dtype)  # [B]
    return error, torch.empty_like(error), torch.empty_like(error)


_FAKE: dict[str, Callable[..., Any]] = {
    "lattice_encode": _fake_encode,
    "lattice_decode": _fake_decode,
    "preference_errors": _fake_errors,
    "preference_backward": _fake_like_first,
}


def _fake(name: str) -> Callable[..., Any]:
    if name in _FAKE:
        return _FAKE[name]
    if name.endswith("_"):
        return _fake_in_place
    return _fake_like_two if "scaled" in name else _fake_like_first


def _checked(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel with the checks of its arguments, as the native kernels have them.

    The dispatcher goes by the most special of the tensors: one on the meta device or a sparse one
    leads past the native kernel, which would have refused it.
    """

    def checked(*args: Any) -> Any:
        CHECKS[name](*args)
        return kernel(*args)

    return checked


def _triton_kernel(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(triton_module(), name)
        return found(*args)

    return kernel


def _cuda_kernel(name: str) -> Callable[..., Any]:
    """Return the kernel for CUDA tensors where the native extension has none."""
    choices = {"reference": REFERENCE[name], "triton": _triton_kernel(name)}

    def kernel(first: Tensor, *args: Any) -> Any:
        return choices[automatic(first.device)](first, *args)

    return _checked(name, kernel)


def _define(namespace: str, kernels: Callable[[str], Callable[..., Any]]) -> torch.library.Library:
    """Define every operator in the namespace, which lives as long as the result."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, kernels(name), "CompositeExplicitAutograd")
        fake = _checked(name, _fake(name))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


def _operators(namespace: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS}


_library = _define(NAMESPACE, lambda name: _checked(name, REFERENCE[name]))
_triton_library = _define(TRITON_NAMESPACE, _triton_kernel)
if "cuda" not in native.DEVICES:
    for _name in SCHEMAS:
        _library.impl(_name, _cuda_kernel(_name), "CUDA")

OPS = _operators(NAMESPACE)
"""What torch's dispatcher chooses: the native kernels, where there are some."""

KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": REFERENCE,
    "native": OPS,
    "triton": _operators(TRITON_NAMESPACE),
}
"""For each backend the operators by name, as they may be called under torch.compile too."""

EAGER: dict[str, dict[str, Callable[..., Any]]] = {
    # What torch.ops.*.default calls in turn.
    backend: {name: getattr(kernel, "_op", kernel) for name, kernel in kernels.items()}
    for backend, kernels in KERNELS.items()
}
"""The same for a caller that is not being compiled, a tenth of a call faster."""
