"""Which of two models draws better, by any scorer, from the same noise: `inpo-fast eval`."""

from .compare import Comparison, Settings, compare
from .scorers import SCORERS, Scorer, ScorerError, make_scorer
from .statistics import Interval, bootstrap, wilson

__all__ = [
    "SCORERS",
    "Comparison",
    "Interval",
    "Scorer",
    "ScorerError",
    "Settings",
    "bootstrap",
    "compare",
    "make_scorer",
    "wilson",
]
