"""The console for tables, loggers of other libraries, and the exit status of a command with invalid input."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qat_lightning.errors import QuantizationError

WIDTH = 120
"""Width without a terminal, as in a CI log. Rich's default of 80 columns would wrap tables of figures."""

WRONG_INPUT = 2
"""Exit status of a command with invalid input."""


def status_of(run: Callable[[], int]) -> int:
    """Result of ``run``; on an error of this package, print it to stderr and return `WRONG_INPUT`."""
    try:
        return run()
    except QuantizationError as error:
        Console(stderr=True).print(Text(f"{type(error).__name__}: {error}", style="red"))
        return WRONG_INPUT


def console() -> Console:
    """A console on stdout, as wide as the terminal, ``COLUMNS`` or `WIDTH`; brackets in text are no markup."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return Console(markup=False)
    # Pass a height as well: without one, Rich uses 80 columns wherever TERM is "dumb".
    return Console(width=WIDTH, height=25, markup=False)


def short_number(text: str) -> str:
    """A number with many digits, as a search draws them, with six; other text as it is.

    Example:
        >>> short_number("0.018224988220277075"), short_number("0.3"), short_number("resnet20")
        ('0.018225', '0.3', 'resnet20')
    """
    return f"{float(text):.6g}" if _LONG_NUMBER.fullmatch(text) else text


_LONG_NUMBER = re.compile(r"-?\d*\.\d{7,}(e[+-]?\d+)?")


class LiteralTable(Table):
    """A table that shows its text as it is, on any console: names and paths may have brackets.

    Example:
        >>> table = LiteralTable("export options", box=None, pad_edge=False)
        >>> table.add_row("formats=[onnx]")
        >>> Console(width=40).print(table)
        export options
        formats=[onnx]
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render text without markup."""
        shown = copy.copy(self)
        for name in ("title", "caption"):
            text = getattr(self, name)
            if isinstance(text, str):
                setattr(shown, name, Text(text, style=getattr(self, f"{name}_style") or f"table.{name}"))
        yield from Table.__rich_console__(shown, console, options.update(markup=False))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure text without markup."""
        return super().__rich_measure__(console, options.update(markup=False))


class Without(logging.Filter):
    """Leaves out the messages of a logger and of those below it.

    Example:
        >>> record = logging.makeLogRecord({"name": "lightning.pytorch"})
        >>> Without("lightning").filter(record), Without("wandb").filter(record)
        (False, True)
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a message."""
        return not super().filter(record)


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Within the block, loggers of these names report errors only.

    Example:
        >>> before = logging.getLogger("some").level
        >>> with errors_only("some"):
        ...     logging.getLevelName(logging.getLogger("some").level)
        'ERROR'
        >>> logging.getLogger("some").level == before
        True
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
