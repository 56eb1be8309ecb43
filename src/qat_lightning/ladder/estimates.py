"""Which steps are worth a conversion and a validation, by the error of their outputs on a few batches."""

from __future__ import annotations

from collections.abc import Callable

from qat_lightning.errors import QuantizationError
from qat_lightning.ladder.plan import Plan
from qat_lightning.numerics.sqnr import EQUAL_DB

CLOSER_DB = 0.5
"""The gain in SQNR that a step must have, a ninth of the error's energy."""


def estimable(plan: Plan) -> bool:
    """Whether an estimate is much cheaper than a plan's network: calibrated, by no recipe that takes long.

    Example:
        >>> estimable(Plan(bias_correction=True)), estimable(Plan(adaround=100)), estimable(Plan(epochs=2))
        (True, False, False)
    """
    return plan.kind == "static" and not (plan.epochs or plan.adaround or plan.sequential_mse)


class Estimates:
    """Compares plans by the SQNR of their outputs, each measured once.

    Args:
        sqnr: Measures an `estimable` plan, in decibels.

    Example:
        >>> found = Estimates(lambda plan: 12.0 if plan.bias_correction else 6.5)
        >>> found.no_closer(Plan(bias_correction=True), Plan())
        ''
        >>> found.no_closer(Plan(bias_correction=True, equalization="exact"), Plan(bias_correction=True))
        'not validated: the SQNR of the outputs goes from 12.0 to 12.0 dB, and a step must gain 0.5 dB'
    """

    def __init__(self, sqnr: Callable[[Plan], float]) -> None:
        self._sqnr = sqnr
        self._known: list[tuple[Plan, float]] = []

    def no_closer(self, plan: Plan, best: Plan) -> str:
        """Why a plan is not worth more than an estimate; empty if it may be, or cannot be estimated.

        Args:
            plan: The plan to try.
            best: The one to compare with.
        """
        if not (estimable(plan) and estimable(best)):
            return ""
        try:
            before, now = self._of(best), self._of(plan)
        except QuantizationError:  # what fails here fails with its reason when the network is made
            return ""
        if now >= before + CLOSER_DB or not abs(before) < EQUAL_DB:
            return ""
        return (
            f"not validated: the SQNR of the outputs goes from {before:.1f} to {now:.1f} dB, and a step must gain "
            f"{CLOSER_DB:g} dB"
        )

    def _of(self, plan: Plan) -> float:
        for known, found in self._known:
            if known == plan:
                return found
        self._known.append((plan, self._sqnr(plan)))
        return self._known[-1][1]
