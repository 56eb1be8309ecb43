"""Where the error of a quantized network comes from: its weights or its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["", "weights", "activations"]

_APART_DB = 3.0
"""The difference from which one side has the larger part of the error: twice the energy of the other's."""

_FAR_APART_DB = 10.0
"""The difference from which the other side's part is negligible: a tenth of the energy."""


@dataclass(frozen=True)
class ErrorSources:
    """The SQNR of the network's outputs with only its weights, and with only its activations fake-quantized.

    Attributes:
        weights_db: With quantized weights and float activations; None where it is not known.
        activations_db: With float weights and quantized activations; likewise.
    """

    weights_db: float | None = None
    activations_db: float | None = None

    @property
    def larger(self) -> Side:
        """The side with the larger part of the error; empty where they are alike or not known.

        Example:
            >>> ErrorSources(12.0, 30.0).larger, ErrorSources(30.0, 29.0).larger
            ('weights', '')
        """
        return self._larger_by(_APART_DB)

    @property
    def negligible(self) -> Side:
        """The side whose part is at most a tenth of the other's; empty where there is none, or it is not known.

        Example:
            >>> ErrorSources(12.0, 30.0).negligible, ErrorSources(12.0, 18.0).negligible
            ('activations', '')
        """
        others: dict[Side, Side] = {"weights": "activations", "activations": "weights", "": ""}
        return others[self._larger_by(_FAR_APART_DB)]

    def _larger_by(self, decibels: float) -> Side:
        """The side whose SQNR is lower by so much; empty where there is none, or it is not known."""
        if self.weights_db is None or self.activations_db is None:
            return ""
        difference = self.activations_db - self.weights_db
        if abs(difference) < decibels:
            return ""
        return "weights" if difference > 0 else "activations"

    def words(self) -> str:
        """The measurement and what follows from it, in a sentence; empty where it is not known.

        Example:
            >>> ErrorSources(12.0, 30.0).words().partition("; ")[0]
            'SQNR of the outputs: 12.0 dB with only weights quantized, 30.0 dB with only activations'
            >>> ErrorSources(12.0, 30.0).words().partition("; ")[2]
            'steps for weights first, those for activations last.'
        """
        if self.weights_db is None or self.activations_db is None:
            return ""
        first = f"steps for {self.larger} first" if self.larger else "both are alike, so the cheap steps first"
        first += f", those for {self.negligible} last" if self.negligible else ""
        return (
            f"SQNR of the outputs: {self.weights_db:.1f} dB with only weights quantized, {self.activations_db:.1f} dB "
            f"with only activations; {first}."
        )
