"""The reversible solvers as diffusers schedulers, drop-ins for `DDIMScheduler`, and their inverses.

pipe.scheduler = BDIAScheduler.from_config(pipe.scheduler.config)
"""

from .scheduling_bdia import BDIAInverseScheduler, BDIAScheduler
from .scheduling_edict import EDICTInverseScheduler, EDICTScheduler
from .scheduling_obelm import OBELMInverseScheduler, OBELMScheduler

__all__ = [
    "BDIAInverseScheduler",
    "BDIAScheduler",
    "EDICTInverseScheduler",
    "EDICTScheduler",
    "OBELMInverseScheduler",
    "OBELMScheduler",
]
