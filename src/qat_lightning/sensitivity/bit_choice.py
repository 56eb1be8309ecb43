"""Choosing bits per layer within limits: the limits, the cost per layer, and the choice with its measured figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.table import Table

from qat_lightning.errors import ConfigurationError
from qat_lightning.sensitivity.budget import drop_points, hydra_word
from qat_lightning.sensitivity.choice import Cost
from qat_lightning.settings.overrides import FLOAT
from qat_lightning.terminal import LiteralTable

Candidate = int | Literal["float"]
"""Bits of a layer's weight, or ``"float"``."""


@dataclass(frozen=True)
class BitLimits:
    """Limits for a choice of bits.

    Args:
        max_drop: Largest drop of the float network's metric, in its own unit.
        max_size_mb: Largest file size, in MB of 1,000,000 bytes.
        max_latency_ms: Largest latency of one sample on this machine's CPU.

    Raises:
        ConfigurationError: No limit is given, or one is invalid.

    Example:
        >>> BitLimits(max_size_mb=0.2)
        BitLimits(max_drop=None, max_size_mb=0.2, max_latency_ms=None)
    """

    max_drop: float | None = None
    max_size_mb: float | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ConfigurationError("There is no limit: give max_drop, max_size_mb or max_latency_ms.")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigurationError(f"{name}={value!r} is not valid: give a number of 0 or more.")

    def excess(self, float_metric: float, measured: Measured) -> dict[str, float]:
        """Return each limit that is exceeded, and by how much in its unit."""
        found = {
            "drop": (float_metric - measured.metric, self.max_drop),
            "size": (measured.size_mb, self.max_size_mb),
            "latency": (measured.latency_ms or 0.0, self.max_latency_ms),
        }
        return {
            name: value - limit for name, (value, limit) in found.items() if limit is not None and value - limit > 0
        }

    def distance(self, float_metric: float, measured: Measured) -> float:
        """Return the sum of the relative excesses over all limits."""
        limits = {"drop": self.max_drop, "size": self.max_size_mb, "latency": self.max_latency_ms}
        past = self.excess(float_metric, measured)
        return sum(excess / max(limits[name] or 0.0, 1e-9) for name, excess in past.items())


@dataclass(frozen=True)
class Measured:
    """Figures of a network that was prepared, calibrated, measured, converted and saved.

    Attributes:
        label: Its label in tables.
        metric: Its metric; larger is better.
        size_mb: Size of its file.
        latency_ms: Latency of one sample; None without a limit on latency.
    """

    label: str
    metric: float
    size_mb: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class LayerBits:
    """Cost of each candidate in one layer.

    Attributes:
        name: The layer, relative to the network.
        kind: Its type.
        parameters: Number of values in its weight.
        loss: For each candidate, the loss if only this layer is quantized; at least 0. For SQNR it is the noise
            relative to the signal.
        size: For each candidate, the size of its weights in the file, in bytes.
        time: For each candidate, milliseconds added to the int8 network's latency; 0 without a limit on latency.
    """

    name: str
    kind: str
    parameters: int
    loss: dict[Candidate, float]
    size: dict[Candidate, int]
    time: dict[Candidate, float]

    def costs(self, candidates: Sequence[Candidate]) -> list[Cost]:
        """Return the costs for `choose`."""
        return [Cost(self.loss[c], self.size[c], self.time[c]) for c in candidates]


@dataclass(frozen=True)
class BitChoice:
    """The bits of each layer, and the resulting figures.

    Attributes:
        limits: The given limits.
        metric_name: The metric.
        float_metric: The metric of the float network.
        layers: Cost of each candidate in each layer.
        overrides: The choice, for ``Scheme(overrides=)``.
        bits: The chosen candidate by layer name.
        measured: The choice, prepared again, calibrated, converted and saved.
        uniform: The same with equal bits in all layers.
        curve: File sizes in MB, and the best metric for each as predicted by the sum of single layers' losses.
    """

    limits: BitLimits
    metric_name: str
    float_metric: float
    layers: list[LayerBits]
    overrides: dict[str, Any]
    bits: dict[str, Candidate]
    measured: Measured
    uniform: tuple[Measured, ...]
    curve: tuple[tuple[float, float], ...]

    @property
    def reached(self) -> bool:
        """Whether the measured figures are within the limits."""
        return not self.limits.excess(self.float_metric, self.measured)

    @property
    def points(self) -> float:
        """The factor for displayed drops; see `drop_points`."""
        return drop_points((self.float_metric, self.measured.metric, *(row.metric for row in self.uniform)))

    def override(self) -> str:
        """The choice for the command line of train.py."""
        return f"quantization.scheme.overrides={_words(self.overrides)}"

    def summary(self) -> str:
        """Summarize the result in one or two sentences."""
        counts: dict[Candidate, int] = {}
        for candidate in self.bits.values():
            counts[candidate] = counts.get(candidate, 0) + 1
        parts = ", ".join(f"{count} in {_of(candidate)}" for candidate, count in sorted(counts.items(), key=str))
        time = "" if self.measured.latency_ms is None else f", {self.measured.latency_ms:.3f} ms"
        found = (
            f"{parts}: {self.metric_name} {self.measured.metric:.4f} (float {self.float_metric:.4f}), "
            f"{self.measured.size_mb:.4f} MB{time}."
        )
        return found if self.reached else f"No choice of bits keeps the limits: {self.why_not}. The best: {found}"

    @property
    def why_not(self) -> str:
        """Return which limits are exceeded, and by how much; empty if none is."""
        past = self.limits.excess(self.float_metric, self.measured)
        unit = " pp" if self.points > 1 else ""
        words = {
            "drop": lambda by: f"the drop is {by * self.points:.4g}{unit} too large",
            "size": lambda by: f"the file is {by:.4f} MB too large",
            "latency": lambda by: f"it is {by:.3f} ms too slow",
        }
        return "; ".join(words[name](by) for name, by in past.items())

    def table(self) -> Table:
        """Return a table of each candidate's cost in each layer, for `rich.print`."""
        rows = " · ".join(
            f"{row.label}: {row.metric:.4f}, {row.size_mb:.4f} MB" for row in (*self.uniform, self.measured)
        )
        table = LiteralTable(title="Bits", title_justify="left", caption=rows, caption_justify="left")
        candidates = list(self.layers[0].loss)
        for column in ("layer", "kind", "parameters"):
            table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
        for candidate in candidates:
            table.add_column(f"loss at {candidate}" if candidate != FLOAT else "float", justify="right")
        table.add_column("chosen", justify="right")
        for layer in self.layers:
            losses = [f"{layer.loss[c]:.2e}" for c in candidates]
            table.add_row(layer.name, layer.kind, str(layer.parameters), *losses, str(self.bits[layer.name]))
        return table

    def rows(self) -> list[dict[str, Any]]:
        """Return the same for a CSV file, with sizes and times."""
        return [
            {"layer": row.name, "kind": row.kind, "parameters": row.parameters}
            | {f"loss_{c}": row.loss[c] for c in row.loss}
            | {f"bytes_{c}": row.size[c] for c in row.size}
            | {f"ms_{c}": row.time[c] for c in row.time}
            | {"chosen": self.bits[row.name]}
            for row in self.layers
        ]

    def write(self, path: str | Path) -> None:
        """Write the overrides to a file for a Hydra config group, such as conf/experiment."""
        lines = yaml.safe_dump(self.overrides, width=math.inf, sort_keys=False).splitlines()
        said = ["# @package _global_", f"# {self.summary()}", "quantization:", "  scheme:"]
        empty = ["    overrides: null # every layer has the bits of the scheme"]
        made = ["    overrides: # the last pattern that matches a layer decides", *(f"      {line}" for line in lines)]
        Path(path).write_text("\n".join([*said, *(made if self.overrides else empty), ""]))


def _of(candidate: Candidate) -> str:
    return "float" if candidate == FLOAT else f"{candidate} bits"


def _words(value: Any) -> str:
    """Format a mapping for Hydra's command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{hydra_word(key)}:{_words(inner)}" for key, inner in value.items()) + "}"
    return str(value)
