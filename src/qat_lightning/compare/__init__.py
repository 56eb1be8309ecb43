"""Compare runs: fold seeds, find the Pareto front, choose what to ship, and draw one page."""

from qat_lightning.compare.comparison import Comparison, Configuration, compare
from qat_lightning.compare.decision import Decision, Limits, decide
from qat_lightning.compare.find import find_runs
from qat_lightning.compare.online import find_online
from qat_lightning.compare.page import page
from qat_lightning.compare.run import Curve, Run

__all__ = [
    "Comparison",
    "Configuration",
    "Curve",
    "Decision",
    "Limits",
    "Run",
    "compare",
    "decide",
    "find_online",
    "find_runs",
    "page",
]
