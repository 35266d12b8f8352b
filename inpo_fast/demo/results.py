"""What the parts of the demo found, before it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .align import AlignResult
from .edit import EditResult
from .roundtrip import RoundTripResult


@dataclass(frozen=True)
class Results:
    """Everything that the report needs.

    Attributes:
        settings: `inpo_fast.demo.Settings`.
        seeds: by part.
        device: where the model ran.
        seconds: of all parts together, loading included.
    """

    roundtrip: RoundTripResult
    edit: EditResult
    align: AlignResult
    settings: Any
    seeds: dict[str, int]
    device: str
    seconds: float
