"""Fixtures of the operator tests."""

import contextlib
import ctypes

import pytest
import torch

from inpo_fast import ops

M_PERTURB = -6  # glibc: fill allocated memory with the complement of this byte


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill new memory with NaN (in torch) or with 0x7f bytes (below it).

    An element that a kernel forgets to write then differs from every expected value.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    perturb = None
    with contextlib.suppress(OSError, AttributeError):
        perturb = ctypes.CDLL(None).mallopt
        perturb(M_PERTURB, 0x80)
    yield
    if perturb is not None:
        perturb(M_PERTURB, 0)
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["reference", "native"])
def impl(request):
    """Every backend that can run here."""
    available, reason = ops.backends()[request.param]
    if not available:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["simd", "portable"])
def native(request):
    """The native backend, with the kernels for this processor and with the portable ones."""
    available, reason = ops.backends()["native"]
    if not available:
        pytest.skip(reason)
    from inpo_fast import _C

    _C.allow_simd(True)
    if request.param == "simd" and _C.simd() == "baseline":
        pytest.skip("no other kernels than the portable ones for this processor")
    _C.allow_simd(request.param == "simd")
    yield "native"
    _C.allow_simd(True)
