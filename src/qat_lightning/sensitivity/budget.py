"""Mixed precision: the limits, and which layers stay float to keep them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from qat_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Budget:
    """Limits such as "at most 0.3 points" or "at least 3 times smaller".

    Args:
        max_drop: Largest loss of the float network's metric, in its own unit: 0.003 for 0.3 points of an
            accuracy between 0 and 1.
        min_size_ratio: Smallest factor by which the weights must shrink.

    Raises:
        ConfigurationError: Neither is given, or one is invalid.

    Example:
        >>> Budget(max_drop=0.003)
        Budget(max_drop=0.003, min_size_ratio=None)
    """

    max_drop: float | None = None
    min_size_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.max_drop is None and self.min_size_ratio is None:
            raise ConfigurationError("A budget needs a limit: give max_drop, min_size_ratio, or both.")
        for name, least in (("max_drop", 0.0), ("min_size_ratio", 1.0)):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least
            ):
                raise ConfigurationError(f"{name}={value!r} is not valid: give a number of {least:g} or more.")


@dataclass(frozen=True)
class MixedPrecision:
    """Which layers stay float, and the result.

    Attributes:
        exclude: Globs of the layers, for ``exclude=``.
        budget: The limits.
        metric_name: The metric.
        metric: The metric of a network prepared with ``exclude`` and calibrated.
        float_metric: The metric of the float network.
        quantized_metric: The metric with all layers quantized.
        size_ratio: How many times smaller the weights are in the file.
    """

    exclude: tuple[str, ...]
    budget: Budget
    metric_name: str
    metric: float
    float_metric: float
    quantized_metric: float
    size_ratio: float

    @property
    def drop(self) -> float:
        """The drop of the metric relative to the float network."""
        return self.float_metric - self.metric

    @property
    def why_not(self) -> str:
        """Return why the budget is not kept; empty if it is."""
        missed = []
        if self.budget.max_drop is not None and self.drop > self.budget.max_drop:
            points = drop_points((self.float_metric, self.metric))
            unit = " pp" if points > 1 else ""
            missed.append(
                f"the drop is {self.drop * points:.4g}{unit}, where at most {self.budget.max_drop * points:.4g}{unit} "
                "is allowed"
            )
        if self.budget.min_size_ratio is not None and self.size_ratio < self.budget.min_size_ratio:
            missed.append(
                f"it is {self.size_ratio:.2f} times smaller, where {self.budget.min_size_ratio:g} is the least"
            )
        return "; ".join(missed)

    @property
    def reached(self) -> bool:
        """Whether the budget is kept."""
        return not self.why_not

    def override(self) -> str:
        """The exclude list for the command line of train.py."""
        return f"quantization.exclude=[{','.join(map(hydra_word, self.exclude))}]"

    def summary(self) -> str:
        """Summarize the result in one or two sentences."""
        layers = f"{len(self.exclude)} layer{'' if len(self.exclude) == 1 else 's'} left float"
        found = (
            f"{layers}: {self.metric_name} {self.metric:.4f} (float {self.float_metric:.4f}, all quantized "
            f"{self.quantized_metric:.4f}), {self.size_ratio:.2f} times smaller."
        )
        return found if self.reached else f"No choice of layers keeps the budget: {self.why_not}. The best: {found}"

    def write(self, path: str | Path) -> None:
        """Write the exclude list to a file for a Hydra config group, such as conf/experiment."""
        lines = yaml.safe_dump(list(self.exclude), width=math.inf).splitlines() if self.exclude else []
        text = "\n".join(
            [
                "# @package _global_",
                f"# {self.summary()}",
                "quantization:",
                "  exclude: # the layers that stay float" if lines else "  exclude: [] # no layer stays float",
                *(f"    {line}" for line in lines),
                "",
            ]
        )
        Path(path).write_text(text)


def drop_points(metrics: Iterable[float]) -> float:
    """Return the factor for displayed drops; percentage points as in `qat_lightning.compare`.

    Args:
        metrics: The metric of several networks; larger is better.

    Returns:
        100 for a score between 0 and 1; 1 for a (negated) loss, an SQNR, or any other metric.

    Example:
        >>> drop_points([0.98, 0.97]), drop_points([300.0, 41.5]), drop_points([-0.2, -0.3])
        (100.0, 1.0, 1.0)
    """
    return 100.0 if all(0 <= value <= 1 for value in metrics) else 1.0


def shown_drop(drop: float, points: float) -> str:
    """Format a drop for a table.

    Example:
        >>> shown_drop(0.0031, 100), shown_drop(1.25, 1)
        ('+0.31', '+1.2500')
    """
    return f"{drop * points:+.2f}" if points > 1 else f"{drop:+.4f}"


def hydra_word(name: str) -> str:
    """Format a glob as a string for Hydra's command line, quoted if it would otherwise be parsed as another type."""
    return name if re.fullmatch(r"[A-Za-z_*?][\w.*?]*", name) else json.dumps(name)


def size_ratio(total: int, quantized: int, stored: int) -> float:
    """Return how many times smaller a network's parameters are if some are stored with fewer than 32 bits.

    Args:
        total: Number of parameters.
        quantized: Number of quantized parameters.
        stored: Number of bits of all quantized parameters in the file.

    Example:
        >>> size_ratio(100, 100, 800), size_ratio(100, 50, 400)
        (4.0, 1.6)
    """
    return 32 * total / (32 * (total - quantized) + stored) if total else 1.0
