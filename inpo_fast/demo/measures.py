"""Statistics of the demo's tables."""

from __future__ import annotations

from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of the mean of independent values [B]; the error of one value is
    0."""
    exact = values.double()
    error = float(exact.std()) / len(exact) ** 0.5 if len(exact) > 1 else 0.0
    return float(exact.mean()), error
