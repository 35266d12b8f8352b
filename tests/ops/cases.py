"""Random operands of operators, and comparison of results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inpo_fast.lattice import ratio_row

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {}

SHAPES = [
    (2, 4, 8, 8),  # whole vectors
    (3, 5, 7, 11),  # no power of two
    (2, 2, 17, 31),  # samples longer than a tile of 256, not a multiple of it
    (1, 1, 1, 1),
    (2, 3, 1, 4),  # a dimension whose stride means nothing
    (0, 4, 8, 8),
    (2, 0, 8, 8),
]


def layout(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Register a function that gives a tensor [B, C, H, W] another layout and the same values."""
    LAYOUTS[function.__name__] = function
    return function


@layout
def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


@layout
def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@layout
def sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


@layout
def batch_inside(x: Tensor) -> Tensor:
    """Dense, but with the batch as the innermost dimension."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@layout
def transposed(x: Tensor) -> Tensor:
    """Dense, with H and W exchanged in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(shape: Sequence[int], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def lattice(shape: Sequence[int], rng: torch.Generator, bits: int = 24) -> Tensor:
    return torch.randint(-(2**bits), 2**bits, shape, generator=rng, dtype=torch.int32)


def rows(batch: int | None, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Coefficients [4], or [batch, 4]."""
    return floats((4,) if batch is None else (batch, 4), dtype, rng)


def ratios(batch: int | None, rng: torch.Generator) -> Tensor:
    """Rows (n, d, mul_n, mul_d), [4] or [batch, 4]."""
    terms = torch.randint(1, 2**16 + 1, (batch or 1, 2), generator=rng).tolist()
    table = torch.stack([torch.from_numpy(ratio_row(n, d)) for n, d in terms] or [torch.empty(0)])
    if batch == 0:
        return torch.empty(0, 4, dtype=torch.int64)
    return table[0] if batch is None else table


def identical(got: Any, expected: Any) -> bool:
    """Same values, NaN for NaN, same dtype and same strides."""
    if isinstance(expected, tuple):
        return all(identical(g, e) for g, e in zip(got, expected, strict=True))
    if got is None or expected is None:
        return got is expected
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and got.stride() == expected.stride()
        and torch.equal(got.isnan(), expected.isnan())
        and torch.equal(got.nan_to_num(), expected.nan_to_num())
    )
