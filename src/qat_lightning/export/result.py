"""Results of exporting to each format: figures, files, and the fastest artifact that passed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from qat_lightning.export.call import Call
from qat_lightning.export.protocol import Kernels, Port
from qat_lightning.storage import Place, name_of
from qat_lightning.terminal import LiteralTable
from qat_lightning.whole_files import write_whole


@dataclass
class ExportResult:
    """One artifact, loaded again in a fresh process, compared and timed.

    Attributes:
        format: The format's name.
        runtime: The runtime.
        files: The artifact's files, the one to load first; empty if it was not written. Each is a `Path`, or a ``str``
            with a URL in remote storage.
        size_mb: Total size of the files in 10^6 bytes.
        size_ratio: Size of the float ``state_dict`` relative to the files.
        agreement: Share of outputs with the same top-1 as fake-quant, over the real batches; None without classes.
        sqnr_db: Signal-to-quantization-noise ratio relative to fake-quant's outputs, in dB.
        sqnr_db_of_outputs: The same for each output, by path in the result.
        max_difference: Largest absolute difference from fake-quant's outputs.
        metric: The value of the given metric; None without one.
        latency_ms: Median latency of one sample in its runtime.
        float_latency_ms: Latency of the float network in the same runtime, in alternating measurements; None if it
            has no float form.
        eager_latency_ms: Latency of the float network in PyTorch, in alternating measurements.
        source: Description of its weights, as `QuantizedNetwork.source`; empty if unknown.
        call: The network's signature, for `qat_lightning.export.run.open_artifact`.
        kernels: Number of layers that the runtime runs in int8; None if unknown.
        ports: Integer inputs and outputs of the file, with scale and zero point; empty if all are the network's own.
        remark: A suggestion for making it faster; empty if there is none.
        error: Why there is no artifact, or why it must not be used; empty if it passed.
    """

    format: str
    runtime: str
    files: list[Place] = field(default_factory=list)
    size_mb: float = math.nan
    size_ratio: float = math.nan
    agreement: float | None = None
    sqnr_db: float = math.nan
    sqnr_db_of_outputs: dict[str, float] = field(default_factory=dict)
    max_difference: float = math.nan
    metric: float | None = None
    latency_ms: float = math.nan
    float_latency_ms: float | None = None
    eager_latency_ms: float | None = None
    kernels: Kernels | None = None
    ports: tuple[Port, ...] = ()
    remark: str = ""
    error: str = ""
    source: str = ""
    call: Call | None = field(default=None, repr=False)

    @property
    def path(self) -> Place | None:
        """The file to load; None if there is none."""
        return self.files[0] if self.files else None

    @property
    def passed(self) -> bool:
        """Whether it was written and loaded, and its outputs agree with fake-quant's."""
        return bool(self.files) and not self.error

    @property
    def speedup(self) -> float | None:
        """Float latency in PyTorch divided by the artifact's latency."""
        return None if self.eager_latency_ms is None else self.eager_latency_ms / self.latency_ms

    @property
    def speedup_in_runtime(self) -> float | None:
        """Float latency in the same runtime divided by the artifact's latency."""
        return None if self.float_latency_ms is None else self.float_latency_ms / self.latency_ms

    def figures(self) -> dict[str, float]:
        """Return all numbers that are available."""
        found = {
            "size_mb": self.size_mb,
            "size_ratio": self.size_ratio,
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
            "max_difference": self.max_difference,
            "metric": self.metric,
            "latency_ms": self.latency_ms,
            "float_latency_ms": self.float_latency_ms,
            "eager_latency_ms": self.eager_latency_ms,
            "speedup": self.speedup,
            "speedup_in_runtime": self.speedup_in_runtime,
        }
        return {name: value for name, value in found.items() if value is not None and not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """Convert to values for JSON, which has no infinity."""
        plain = {key: value for key, value in vars(self).items() if key != "call"} | {
            "files": [name_of(file) for file in self.files],
            "kernels": None if self.kernels is None else vars(self.kernels),
            "ports": [vars(port) for port in self.ports],
            "passed": self.passed,
        }
        return {key: _finite(value) for key, value in plain.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fastest(results: Sequence[ExportResult]) -> ExportResult | None:
    """The fastest artifact that passed; None if none did.

    Example:
        >>> from pathlib import Path
        >>> slow = ExportResult("onnx", "ONNX Runtime", [Path("a.onnx")], latency_ms=2.0)
        >>> fast = ExportResult("pt2", "AOTInductor", [Path("a.pt2")], latency_ms=1.0)
        >>> wrong = ExportResult("openvino", "OpenVINO", [Path("a.xml")], latency_ms=0.5, error="agreement 80 %")
        >>> fastest([slow, fast, wrong]).format
        'pt2'
    """
    passed = [result for result in results if result.passed and not math.isnan(result.latency_ms)]
    return min(passed, key=lambda result: result.latency_ms, default=None)


def export_table(results: Sequence[ExportResult]) -> Table:
    """Format results as a table: a row for each format, the fastest that passed in bold, and errors below.

    Example:
        >>> export_table([ExportResult("onnx", "ONNX Runtime", error="no such op")]).row_count
        1
    """
    best = fastest(results)
    table = LiteralTable(title="Exported", caption=_caption(results), caption_justify="left")
    for column in ("format", "file"):
        table.add_column(column, overflow="fold")
    for column in ("size", "agreement", "SQNR", "latency", "fp32 there", "faster", "than eager fp32"):
        table.add_column(column, justify="right")
    if any(result.metric is not None for result in results):
        table.add_column("metric", justify="right")
    for result in results:
        cells = [
            result.format,
            name_of(result.path) if result.path is not None else "–",
            _cell(result.size_mb, "{:.2f} MB"),
            _cell(result.agreement, "{:.2%}"),
            "equal" if result.sqnr_db == math.inf else _cell(result.sqnr_db, "{:.1f} dB"),
            _cell(result.latency_ms, "{:.3f} ms"),
            _cell(result.float_latency_ms, "{:.3f} ms"),
            _cell(result.speedup_in_runtime, "{:.2f} x"),
            _cell(result.speedup, "{:.2f} x"),
        ]
        if len(table.columns) > len(cells):
            cells.append(_cell(result.metric, "{:.4f}"))
        style = "bold" if result is best else "red" if result.error else None
        table.add_row(*cells, style=style)
    return table


def write_json(results: Sequence[ExportResult], path: Place) -> None:
    """Write the figures beside the artifacts, with the name of the fastest that passed."""
    best = fastest(results)
    content = {
        "fastest": None if best is None else best.format,
        "results": [result.to_dict() for result in results],
    }
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _cell(value: float | None, layout: str) -> str:
    return "–" if value is None or math.isnan(value) else layout.format(value)


def _caption(results: Sequence[ExportResult]) -> str:
    best = fastest(results)
    lines = [f"{result.format}: {result.error}" for result in results if result.error]
    lines += [f"{result.format}: {result.remark}" for result in results if result.remark]
    lines += [f"weights of {source}" for source in dict.fromkeys(result.source for result in results) if source]
    lines += [f"{result.format}: {port}" for result in results if result.passed for port in result.ports]
    if best is not None and len(results) > 1:
        lines.append(f"fastest that passes: {best.format}")
    return "\n".join(lines)
