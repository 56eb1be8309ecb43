"""The drop of a metric and its confidence interval, by a paired bootstrap over parts of the validation data.

The user's own metric is computed on each part of the validation data, with the float network and with the int8 one.
The drop is the mean of the differences, weighted by samples. For a metric that is a mean over samples, such as an
accuracy or a loss, this equals the difference of the metric itself. For others, such as F1 or a perplexity, it is the
mean of the differences within the parts, which is close to it if the parts are large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qat_lightning.errors import ConfigurationError
from qat_lightning.run.metric import settled

CONFIDENCE = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Drop:
    """How much worse than float a network is, in the metric's own unit; negative if it is better.

    Attributes:
        mean: The drop on the validation data.
        low: Lower end of the interval; minus infinity with a single part, which has no spread.
        high: Upper end of the interval; infinity with a single part.
        parts: The number of parts of the validation data.
    """

    mean: float
    low: float
    high: float
    parts: int

    def undecided(self, most: float | None) -> bool:
        """Whether a limit is within the interval, so that other validation data could change the verdict.

        Example:
            >>> Drop(0.002, 0.001, 0.005, 20).undecided(0.003), Drop(0.002, 0.001, 0.0025, 20).undecided(0.003)
            (True, False)
        """
        return most is not None and self.low <= most < self.high

    def judged(self, *, confident: bool) -> float:
        """The value that is compared with the limit: the mean, or the upper end of the interval.

        Example:
            >>> Drop(0.002, 0.001, 0.005, 20).judged(confident=True)
            0.005
        """
        return self.high if confident else self.mean

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        ends = {name: value if math.isfinite(value) else None for name, value in vars(self).items()}
        return ends | {"parts": self.parts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Drop:
        """Undo `to_dict`."""
        low, high = values["low"], values["high"]
        return cls(
            values["mean"], -math.inf if low is None else low, math.inf if high is None else high, values["parts"]
        )


def check_finite(values: Sequence[float]) -> None:
    """Refuse a metric that is not finite on a part of the validation data.

    Raises:
        ConfigurationError: It is not.
    """
    if not all(map(math.isfinite, values)):
        raise ConfigurationError(
            "The metric is not finite on a part of the validation data, so networks cannot be judged by it: give "
            "another metric=, or use larger validation batches."
        )


def paired_drop(
    base: Sequence[float],
    other: Sequence[float],
    samples: Sequence[int],
    *,
    larger_is_better: bool = True,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
) -> Drop:
    """Compare two networks on the same parts of the validation data.

    Parts are drawn with replacement, and both networks are compared on the drawn parts, so that parts that are hard for
    both do not widen the interval. The interval is the percentile interval of Efron and Tibshirani, 1993, "An
    Introduction to the Bootstrap", chapter 13, extended to contain the mean if it does not.

    Args:
        base: The metric of the float network on each part.
        other: The metric of the network to judge, in the same order.
        samples: The number of samples in each part.
        larger_is_better: Whether larger values of the metric are better.
        confidence: The confidence level of the interval, in (0, 1).
        draws: The number of bootstrap samples; the random numbers are the same in each call.

    Raises:
        ConfigurationError: There are no parts, the lengths differ, or a metric is not finite.

    Example:
        >>> paired_drop([1.0, 0.5], [0.5, 0.5], [1, 1]).mean
        0.25
    """
    if not base or not len(base) == len(other) == len(samples):
        raise ConfigurationError(f"There are no pairs: {len(base)} values, {len(other)} values, {len(samples)} sizes.")
    check_finite((*base, *other))
    losses = np.asarray(base, np.float64) - np.asarray(other, np.float64)
    losses = losses if larger_is_better else -losses
    weights = np.asarray(samples, np.float64)
    scale = max(map(abs, (*base, *other)))
    mean = settled(float((weights * losses).sum() / weights.sum()), scale)
    if len(base) == 1:
        return Drop(mean, -math.inf, math.inf, 1)
    chosen = np.random.default_rng(0).integers(len(base), size=(draws, len(base)))
    means = (weights * losses)[chosen].sum(1) / weights[chosen].sum(1)
    ends = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = (settled(float(end), scale) for end in ends)
    return Drop(mean, min(low, mean), max(high, mean), len(base))
