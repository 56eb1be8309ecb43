"""Bits by budget as values: what is asked for, what each layer costs, and the choice with what was measured of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.table import Table

from qat_lightning.errors import ConfigurationError
from qat_lightning.sensitivity.budget import drop_points
from qat_lightning.sensitivity.choice import Cost
from qat_lightning.settings.overrides import FLOAT

Candidate = int | Literal["float"]
"""A number of bits of a layer's weight, or ``"float"``."""


@dataclass(frozen=True)
class BitLimits:
    """What a choice of bits may cost.

    Args:
        max_drop: How much of the float network's metric may be lost, in its own unit.
        max_size_mb: The size of the file, in MB of 1,000,000 bytes.
        max_latency_ms: The latency of one sample on this machine's CPU.

    Raises:
        ConfigurationError: None is given, or one is not possible.

    Example:
        >>> BitLimits(max_size_mb=0.2)
        BitLimits(max_drop=None, max_size_mb=0.2, max_latency_ms=None)
    """

    max_drop: float | None = None
    max_size_mb: float | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse what limits nothing."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ConfigurationError("There is no limit: give max_drop, max_size_mb or max_latency_ms.")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigurationError(f"{name}={value!r} is not possible: give a number of 0 or more.")

    def excess(self, float_metric: float, measured: Measured) -> dict[str, float]:
        """By how much what was measured is past each limit, in its unit; only of those that it is past."""
        found = {
            "drop": (float_metric - measured.metric, self.max_drop),
            "size": (measured.size_mb, self.max_size_mb),
            "latency": (measured.latency_ms or 0.0, self.max_latency_ms),
        }
        return {
            name: value - limit for name, (value, limit) in found.items() if limit is not None and value - limit > 0
        }

    def distance(self, float_metric: float, measured: Measured) -> float:
        """By how much it is past all limits together, each as a share of itself."""
        limits = {"drop": self.max_drop, "size": self.max_size_mb, "latency": self.max_latency_ms}
        past = self.excess(float_metric, measured)
        return sum(excess / max(limits[name] or 0.0, 1e-9) for name, excess in past.items())


@dataclass(frozen=True)
class Measured:
    """A network that was prepared, calibrated, measured, converted and saved.

    Attributes:
        label: What it is, for tables.
        metric: What was measured; larger is better.
        size_mb: Of its file.
        latency_ms: Of one sample; None where there is no limit on it.
    """

    label: str
    metric: float
    size_mb: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class LayerBits:
    """What each candidate costs in one layer.

    Attributes:
        name: The layer, relative to the network.
        kind: Its type.
        parameters: How many numbers its weight has.
        loss: For each candidate what it loses when no other layer is rounded: of the metric, or of an SQNR the noise as
            a share of the signal; 0 at least.
        size: The bytes of its weights in the file.
        time: Milliseconds that it adds to the latency of the int8 network; 0 where there is no limit on it.
    """

    name: str
    kind: str
    parameters: int
    loss: dict[Candidate, float]
    size: dict[Candidate, int]
    time: dict[Candidate, float]

    def costs(self, candidates: Sequence[Candidate]) -> list[Cost]:
        """What `choose` is given."""
        return [Cost(self.loss[c], self.size[c], self.time[c]) for c in candidates]


@dataclass(frozen=True)
class BitChoice:
    """The bits of each layer, and what that gives.

    Attributes:
        limits: The limits that were given.
        metric_name: What was measured.
        float_metric: Of the float network.
        layers: What each candidate costs in each layer.
        overrides: For ``Scheme(overrides=)``.
        bits: The candidate that was chosen, by the layer's name.
        measured: The choice, prepared again, calibrated, converted and saved.
        uniform: Likewise all layers with the same bits.
        curve: Sizes in MB, and the metric that the sum of single layers' losses predicts for the best choice of each.
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
        """Whether the measured values keep the limits."""
        return not self.limits.excess(self.float_metric, self.measured)

    @property
    def points(self) -> float:
        """What drops are shown with; see `drop_points`."""
        return drop_points((self.float_metric, self.measured.metric, *(row.metric for row in self.uniform)))

    def override(self) -> str:
        """The choice for the command line of train.py."""
        return f"quantization.scheme.overrides={_words(self.overrides)}"

    def summary(self) -> str:
        """What was found, in a sentence or two."""
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
        """Which limits are not kept, and by how much; empty if all are."""
        past = self.limits.excess(self.float_metric, self.measured)
        unit = " pp" if self.points > 1 else ""
        words = {
            "drop": lambda by: f"the drop is {by * self.points:.4g}{unit} too large",
            "size": lambda by: f"the file is {by:.4f} MB too large",
            "latency": lambda by: f"it is {by:.3f} ms too slow",
        }
        return "; ".join(words[name](by) for name, by in past.items())

    def table(self) -> Table:
        """What each candidate costs in each layer, for `rich.print`."""
        rows = " · ".join(
            f"{row.label}: {row.metric:.4f}, {row.size_mb:.4f} MB" for row in (*self.uniform, self.measured)
        )
        table = Table(title="Bits", title_justify="left", caption=rows, caption_justify="left")
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
        """The same for a CSV file, with bytes and times."""
        return [
            {"layer": row.name, "kind": row.kind, "parameters": row.parameters}
            | {f"loss_{c}": row.loss[c] for c in row.loss}
            | {f"bytes_{c}": row.size[c] for c in row.size}
            | {f"ms_{c}": row.time[c] for c in row.time}
            | {"chosen": self.bits[row.name]}
            for row in self.layers
        ]

    def write(self, path: str | Path) -> None:
        """Write the overrides as a file for a config group of Hydra, such as conf/experiment."""
        lines = yaml.safe_dump(self.overrides, width=math.inf, sort_keys=False).splitlines()
        said = ["# @package _global_", f"# {self.summary()}", "quantization:", "  scheme:"]
        empty = ["    overrides: null # every layer has the bits of the scheme"]
        made = ["    overrides: # the last pattern that matches a layer decides", *(f"      {line}" for line in lines)]
        Path(path).write_text("\n".join([*said, *(made if self.overrides else empty), ""]))


def _of(candidate: Candidate) -> str:
    return "float" if candidate == FLOAT else f"{candidate} bits"


def _words(value: Any) -> str:
    """A mapping as Hydra's command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(key)}:{_words(inner)}" for key, inner in value.items()) + "}"
    return str(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_*?][\w.*?]*", name) else json.dumps(name)
