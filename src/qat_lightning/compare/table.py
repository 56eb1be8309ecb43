"""The table of a comparison: for the terminal, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qat_lightning.compare.comparison import Comparison, Configuration
from qat_lightning.compare.decision import Decision
from qat_lightning.compare.run import Run
from qat_lightning.compare.settings import ABSENT
from qat_lightning.compare.spread import Spread
from qat_lightning.compare.terminal_table import TerminalTable
from qat_lightning.terminal import LiteralTable

FRONT = "●"  # on the Pareto front
NOISY = "?"  # a latency measured while other work was running
OTHER = "*"  # a drop relative to another float network
_FIGURES = ("score", "drop", "latency_ms", "size_mb", "speedup", "agreement")


def rich_table(comparison: Comparison, decision: Decision) -> RenderableType:
    """Format a comparison for the terminal.

    Args:
        comparison: The comparison.
        decision: The decision; the chosen row is bold.

    Returns:
        The table, the decision, and runs that were left out with the reasons. For `rich.print`.
    """
    header, rows = cells(comparison)
    configurations = comparison.configurations
    styles = ["bold green" if c is decision.winner else "" if c.on_front else "dim" for c in configurations]
    labels = [configuration.label for configuration in configurations]
    table = TerminalTable(header, rows, labels, styles, len(comparison.settings) or 1, _caption(comparison))
    parts: list[RenderableType] = [table, Text(decision.reason, style="bold" if decision.winner else "")]
    if decision.winner is not None:
        parts += [Text(f"  {line}") for line in shipped(decision.winner)]
    if comparison.left_out:
        parts.append(_left_out(comparison.left_out))
    return Group(*parts)


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the table as text: a header, and a row per configuration.

    The first column marks the Pareto front.
    """
    metric = comparison.metric

    def row(configuration: Configuration) -> list[str]:
        named = list(configuration.values.values()) or [configuration.label]
        seeds = configuration.score.seeds
        return [
            FRONT if configuration.on_front else "",
            *named,
            configuration.variant,
            _with_spread(configuration.score, seeds, 2 if metric.is_share else 4, 100 if metric.is_share else 1),
            _of_own_float(
                _with_spread(configuration.drop, seeds, 2 if metric.is_share else 4), configuration, comparison
            ),
            _marked(_with_spread(configuration.latency_ms, seeds, 3), configuration),
            _with_spread(configuration.size_mb, seeds, 3),
            _marked(_with_spread(configuration.speedup, seeds, 2), configuration),
            str(seeds),
        ]

    names = [setting.label for setting in comparison.settings] or ["run"]
    score = f"{metric.name} (%)" if metric.is_share else metric.name
    drop = f"drop ({metric.drop_unit})" if metric.is_share else "drop"
    header = ["", *names, "variant", score, drop, "latency (ms)", "size (MB)", "speed-up", "n"]
    return header, [row(configuration) for configuration in comparison.configurations]


def _with_spread(figure: Spread | None, seeds: int, digits: int, factor: float = 1) -> str:
    """Return a figure as text, with its number of seeds where that is not the row's."""
    if figure is None:
        return ABSENT
    spread = "" if figure.deviation is None else f" ± {factor * figure.deviation:.{digits}f}"
    own = "" if figure.seeds == seeds else f" (n={figure.seeds})"
    return f"{round(factor * figure.mean, digits) + 0.0:.{digits}f}{spread}{own}"  # + 0.0: never -0.00


def _of_own_float(figure: str, configuration: Configuration, comparison: Comparison) -> str:
    """Mark a drop whose float is another than that of the first configuration that has one, so they do not compare."""
    return f"{figure} {OTHER}" if _is_other(configuration, comparison) else figure


def _is_other(configuration: Configuration, comparison: Comparison) -> bool:
    return bool(configuration.baseline) and configuration.baseline != _baselines(comparison)[0]


def _baselines(comparison: Comparison) -> list[str]:
    """Return what drops are relative to; float runs first."""
    found = dict.fromkeys(c.baseline for c in comparison.configurations if c.baseline)
    return sorted(found, key=lambda baseline: baseline != "float runs")


def _marked(figure: str, configuration: Configuration) -> str:
    return f"{figure} {NOISY}" if configuration.noise and figure != ABSENT else figure


def markdown(comparison: Comparison, decision: Decision) -> str:
    """Return the comparison as Markdown, for example for a comment on a pull request."""
    header, rows = cells(comparison)
    header[0] = "front"
    lines = [_markdown_row(header), _markdown_row(["---"] * len(header)), *map(_markdown_row, rows)]
    lines += ["", _escaped(_caption(comparison)), "", f"**{_escaped(decision.reason)}**"]
    if comparison.left_out:
        lines += ["", "Not compared:", ""]
        lines += [f"- {_escaped(f'{run.name} ({run.status}): {run.reason}')}" for run in comparison.left_out]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return the comparison as CSV: numbers without units; mean, deviation and number of seeds in separate columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    labels = [setting.label for setting in comparison.settings]
    figures = [f"{figure}_{part}" for figure in _FIGURES for part in Spread._fields]
    writer.writerow(["configuration", *labels, "variant", "n", "on_front", *figures, "baseline", "noise"])
    for configuration in comparison.configurations:
        spreads = [getattr(configuration, figure) for figure in _FIGURES]
        numbers = [number for spread in spreads for number in spread or [None] * len(Spread._fields)]
        writer.writerow(
            [
                *map(_harmless, (configuration.label, *configuration.values.values())),
                configuration.variant,
                configuration.score.seeds,
                int(configuration.on_front),
                *("" if number is None else number for number in numbers),
                configuration.baseline,
                configuration.noise,
            ]
        )
    return out.getvalue()


def as_json(comparison: Comparison, decision: Decision) -> str:
    """Return the comparison and the decision as JSON."""
    return json.dumps(plain(comparison, decision), indent=2) + "\n"


def plain(comparison: Comparison, decision: Decision) -> dict[str, Any]:
    """Return the comparison and the decision as plain data."""
    return {
        "metric": {
            "name": comparison.metric.name,
            "larger_is_better": comparison.metric.larger_is_better,
            "is_share": comparison.metric.is_share,
        },
        "settings": [{"key": setting.key, "label": setting.label} for setting in comparison.settings],
        "configurations": [
            {
                "label": c.label,
                "values": dict(c.values),
                "task": str(c.task) if len(comparison.tasks) > 1 else "",
                "variant": c.variant,
                "on_front": c.on_front,
                "baseline": c.baseline,
                "noise": c.noise,
                **{figure: spread and spread._asdict() for figure in _FIGURES for spread in [getattr(c, figure)]},
                "runs": [{"name": run.name, "folder": run.folder, "wandb_id": run.wandb_id} for run in c.runs],
            }
            for c in comparison.configurations
        ],
        "winner": decision.winner and decision.winner.label,
        "runner_up": decision.runner_up and decision.runner_up.label,
        "reason": decision.reason,
        "left_out": [
            {"name": run.name, "folder": run.folder, "status": run.status, "reason": run.reason}
            for run in comparison.left_out
        ],
    }


def shipped(winner: Configuration) -> list[str]:
    """Return the winner's networks: the saved int8 file of each run, otherwise its folder."""
    return [run.model_file or run.folder for run in winner.runs]


def _caption(comparison: Comparison) -> str:
    better = "larger" if comparison.metric.larger_is_better else "smaller"
    lines = [f"{comparison.metric.name}: {better} is better. ± sample standard deviation over n seeds."]
    if comparison.front:
        axes = "score and size" if comparison.noisy else "score, latency and size"
        of_each = " of each task" if len(comparison.tasks) > 1 else ""
        lines.append(f"{FRONT} Pareto front of {axes}{of_each}.")
    for configuration in comparison.configurations:
        if configuration.noise:
            lines.append(
                f"{NOISY} {configuration.label}: measured while other work was running, {configuration.noise}."
            )
    if comparison.noisy:
        lines.append("Latency is ignored: --remeasure on an idle machine times the int8 files and float again.")
    if baselines := _baselines(comparison):
        lines.append(f"Drop against float, paired by seed: {baselines[0]}.")
    for text in dict.fromkeys(c.unpaired for c in comparison.configurations if c.unpaired):
        lines.append(f"{text[0].upper()}{text[1:]}.")
    for other in baselines[1:]:
        labels = [c.label for c in comparison.configurations if c.baseline == other]
        lines.append(f"{OTHER} {', '.join(labels)}: against {other}, so drops with and without it do not compare.")
    if any(c.baseline == "float of the same run" for c in comparison.configurations):
        lines.append(
            "Float of the same run: with QAT the network when fake-quantization was enabled, trained for less time."
        )
    return "\n".join(lines)


def _left_out(runs: Sequence[Run]) -> Table:
    table = LiteralTable(box=box.SIMPLE_HEAD, title="Not compared", title_justify="left")
    for name in ("run", "status", "reason"):
        table.add_column(name, overflow="fold")
    for run in runs:
        what = " ".join(run.overrides) or run.name
        table.add_row(
            Text(what), Text(run.status, style="red" if run.status != "skipped" else "yellow"), Text(run.reason)
        )
    return table


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, row)) + " |"


def _escaped(text: str) -> str:
    """Escape text for Markdown and the HTML in it."""
    for character in "\\`*_[]|#":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def _harmless(text: str) -> str:
    """Escape text that a spreadsheet would treat as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
