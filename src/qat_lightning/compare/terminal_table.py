"""The table of a comparison on a terminal, with as many columns as fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qat_lightning.terminal import LiteralTable

CONFIGURATION = "configuration"
_LAST_TO_GO = ("speed-up", "size (MB)", "latency (ms)", "variant")
"""Columns to leave out if there is no room, in this order; score, drop and n always stay."""
_ANY = 10_000  # columns, to measure the table's natural width


@dataclass(frozen=True)
class TerminalTable:
    """Rows laid out for the width of the terminal, without breaking words.

    If the settings do not fit beside the figures, they share one column. If the figures do not fit either, some columns
    are left out, which the caption reports.

    Args:
        header: The columns: the mark of the front, the settings, and the figures.
        rows: The cells.
        labels: The label of each row with all its settings.
        styles: The style of each row.
        settings: Number of columns with settings.
        caption: Text below the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: Sequence[str]
    styles: Sequence[str]
    settings: int
    caption: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the first layout that fits, otherwise the last."""
        for table in self._layouts():
            if Measurement.get(console, options.update(max_width=_ANY), table).minimum <= options.max_width:
                break
        yield table

    def _layouts(self) -> list[Table]:
        left, right = self.header[:1], list(self.header[1 + self.settings :])
        found = [self._table(self.header, self.rows, 1 + self.settings, [])]
        gone: list[str] = []
        for name in ("", *_LAST_TO_GO):
            gone += [name] if name in right else []
            kept = [place for place, title in enumerate(right) if title not in gone]
            rows = [
                [row[0], label, *(row[1 + self.settings + place] for place in kept)]
                for row, label in zip(self.rows, self.labels, strict=True)
            ]
            found.append(self._table([*left, CONFIGURATION, *(right[place] for place in kept)], rows, 2, gone))
        return found

    def _table(self, header: Sequence[str], rows: Sequence[Sequence[str]], names: int, gone: Sequence[str]) -> Table:
        said = f"\nNo room for: {', '.join(gone)}. --csv and --html have all columns." if gone else ""
        table = LiteralTable(box=box.SIMPLE_HEAD, caption=self.caption + said, caption_justify="left")
        for place, name in enumerate(header):
            is_broken = name == CONFIGURATION and place == 1
            widest = max(cell_len(text) for text in (name, *(row[place] for row in rows)))
            table.add_column(
                Text(name),
                justify="left" if place < names or name == "variant" else "right",
                no_wrap=not is_broken,
                overflow="fold",
                min_width=None if is_broken else widest,
            )
        for row, style in zip(rows, self.styles, strict=True):
            table.add_row(*(Text(cell) for cell in row), style=style)
        return table
