"""A number that changes during a training: a pure function of the share that is done.

Example:
    >>> threshold = Cosine.parse((0.1, 0.01), name="freezing")
    >>> [round(threshold.at(done), 3) for done in (0.0, 0.5, 1.0)]
    [0.1, 0.055, 0.01]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from qat_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Cosine:
    """Changes from one number to another along half a cosine.

    Args:
        begin: Value before the first step.
        end: Value at the end of the planned training.

    Example:
        >>> Cosine(0.0, 1.0).at(0.25) < 0.25
        True
    """

    begin: float
    end: float

    @classmethod
    def parse(cls, value: Any, *, name: str, most: float = math.inf) -> Cosine | None:
        """Read a value as users write it, in Python or in YAML.

        Args:
            value: A number for a constant; a pair of numbers (OmegaConf's list too) for begin and end; None for none.
            name: The argument's name in an error message.
            most: The largest allowed number; the smallest is 0.

        Raises:
            ConfigurationError: The value has none of these forms.

        Example:
            >>> Cosine.parse(0.02, name="freezing")
            Cosine(begin=0.02, end=0.02)
        """
        if value is None:
            return None
        pair = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        ends = list(value) if pair else [value, value]
        if len(ends) != 2 or not all(_is_number(end) and 0 <= end <= most for end in ends):
            bound = f"from 0 to {most:g}" if math.isfinite(most) else "of at least 0"
            raise ConfigurationError(
                f"{name}={value!r} is not valid: give a number {bound}, two of them for its values at the beginning "
                "and at the end of the training, or null (None) to leave it out."
            )
        return cls(float(ends[0]), float(ends[1]))

    @property
    def changes(self) -> bool:
        """Whether its value depends on how much of the training is done."""
        return self.begin != self.end

    def at(self, done: float) -> float:
        """The value when a share of the planned training is done.

        Args:
            done: From 0 to 1; larger values count as 1.
        """
        left = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
        return self.end + (self.begin - self.end) * left


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
