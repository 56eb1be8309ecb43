"""The result of a search: the choice, the table, and the file for the page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from torch import nn

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.compare.ladder import Ladder, LadderRow
from qat_lightning.compare.metric import Metric
from qat_lightning.errors import ConversionError
from qat_lightning.ladder.choice import Attempt, nearest
from qat_lightning.ladder.sources import ErrorSources
from qat_lightning.ladder.store import NETWORK
from qat_lightning.ladder.target import Target
from qat_lightning.terminal import LiteralTable


@dataclass(frozen=True)
class Reached:
    """The result of a search.

    Attributes:
        target: The target.
        metric: The validation metric whose drop is limited.
        attempts: All attempts, in order.
        why_ended: Why the search ended.
        folder: The folder with the networks.
        float_metrics: The float network's metrics on the validation data.
        metrics: The result of `qat_lightning.evaluate_variants` on the test data; empty without a test.
        sources: The source of the error, which orders the rungs for accuracy; empty if it was not measured.
    """

    target: Target
    metric: Metric
    attempts: tuple[Attempt, ...]
    why_ended: str
    folder: Path
    float_metrics: Mapping[str, float]
    metrics: Mapping[str, float] = field(default_factory=dict)
    sources: ErrorSources = field(default_factory=ErrorSources)

    @property
    def best(self) -> Attempt | None:
        """The first attempt that meets the target, otherwise the nearest; None if no attempt has a network."""
        return nearest(self.attempts, self.target)

    @property
    def kept(self) -> bool:
        """Whether the target is reached."""
        return self.best is not None and not self.best.missed(self.target)

    @property
    def network_file(self) -> Path:
        """The file of the chosen int8 network in PyTorch, also if another format is shipped.

        Raises:
            ConversionError: There is none.
        """
        if self.best is None:
            raise ConversionError(f"There is no int8 network: {self.conclusion()}")
        return self.folder / "rungs" / self.best.rung / NETWORK

    @property
    def files(self) -> list[Path]:
        """The files to ship: the int8 network's file, or those of another format."""
        if self.best is None:
            return []
        exported = self.network_file.parent / "export"
        written = sorted(path for path in exported.glob("*") if path.suffix != ".json")
        return written if self.best.plan.file else [self.network_file]

    def load(self, network: nn.Module | None = None) -> QuantizedNetwork:
        """The chosen int8 network in PyTorch.

        Args:
            network: As for `qat_lightning.load_quantized`.

        Raises:
            ConversionError: There is none.
        """
        return load_quantized(self.network_file, network=network)

    def conclusion(self) -> str:
        """The result in a sentence or two."""
        best, asked = self.best, self.target.words()
        if best is None:
            return f"The target ({asked}) is not reached: there is no int8 network. {self.why_ended}"
        doubt = ""
        if best.drop is not None and best.drop.undecided(self.target.max_drop):
            doubt = f" The drop is uncertain: its interval is {self._interval(best)}, on both sides of the target."
        if self.kept:
            return f"{best.rung} keeps the target ({asked}): {best.plan.words()}.{doubt}"
        return (
            f"The target ({asked}) is not reached. {self.why_ended} Nearest is {best.rung}, which "
            f"{best.verdict(self.target)}: {best.plan.words()}.{doubt}"
        )

    def _interval(self, attempt: Attempt) -> str:
        assert attempt.drop is not None
        unit = f" {self.metric.drop_unit}".rstrip()
        return f"{_points(self.metric, attempt.drop.low)} to {_points(self.metric, attempt.drop.high)}{unit}"

    def ladder(self) -> Ladder:
        """The content of the page of a comparison."""
        rows = tuple(self._row(attempt) for attempt in self.attempts)
        words = self.sources.words()
        return Ladder(self.target.words(), self.metric.name, self.metric.drop_unit, rows, self.conclusion(), words)

    def _row(self, attempt: Attempt) -> LadderRow:
        shown = self.metric.shown
        ends = {} if attempt.drop is None else attempt.drop.to_dict()
        mean, low, high = (None if (v := ends.get(key)) is None else shown(v) for key in ("mean", "low", "high"))
        return LadderRow(
            attempt.rung,
            attempt.plan.words(self.attempts[0].plan),
            mean,
            low,
            high,
            attempt.speedup,
            attempt.size_mb,
            attempt.minutes,
            _short(attempt.verdict(self.target)),
            attempt is self.best,
        )

    def table(self) -> Table:
        """The attempts, for `rich.print`."""
        return ladder_table(self.ladder())


def ladder_table(ladder: Ladder) -> Table:
    """A search for the terminal.

    Args:
        ladder: The search.

    Returns:
        A table for `rich.print` with a row for each rung; the chosen one is bold.
    """
    table = LiteralTable(title=f"Target: {ladder.target}", title_justify="left", caption_justify="left")
    table.caption = (
        f"Drop of {ladder.metric} against float on the validation data; interval: 95 % of a paired bootstrap."
    ) + (f"\n{ladder.sources}" if ladder.sources else "")
    unit = f" ({ladder.drop_unit})" if ladder.drop_unit else ""
    for name in ("rung", "tried", f"drop{unit}", "interval", "speed-up", "size (MB)", "minutes", "verdict"):
        words = name in ("rung", "tried", "verdict")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    digits = 2 if ladder.drop_unit else 4
    for row in ladder.rows:
        ends = [row.low, row.high]
        table.add_row(
            row.rung,
            row.tried,
            _cell(row.drop, f"+.{digits}f"),
            "–" if row.drop is None else " to ".join("∞" if e is None else f"{e:+.{digits}f}" for e in ends),
            _cell(row.speedup, ".2f"),
            _cell(row.size_mb, ".3f"),
            _cell(row.minutes, ".1f"),
            row.verdict,
            style="bold green" if row.chosen else "",
        )
    return table


def _short(text: str) -> str:
    """A reason, shortened for a table; the rung's ``measured.json`` has all of it."""
    return text if len(text) <= _ROOM else f"{text[: _ROOM - 1].rstrip()}…"


_ROOM = 240


def _cell(value: float | None, layout: str) -> str:
    return "–" if value is None else format(value, layout)


def _points(metric: Metric, value: float) -> str:
    return f"{metric.shown(value):+.2f}" if metric.is_share else f"{value:+.4f}"
