"""Exact inversion and editing on stock diffusers pipelines.

    inversion = invert(pipe, image, prompt="a cat", solver="bdia", guidance_scale=3.0)
    edited = inversion.edit(prompt="a dog").images[0]

`adapter.py` says what a pipeline family must provide; `plan.py` chooses the programs; `steps.py`
follows a run; `inverting.py` and `inversion.py` put them together, there and back.
"""

from __future__ import annotations

from .inversion import Inversion
from .inverting import invert
from .outputs import EditOutput, ReconstructionOutput

__all__ = ["EditOutput", "Inversion", "ReconstructionOutput", "invert"]
