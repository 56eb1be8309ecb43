"""The console for tables, loggers of other libraries, and the exit status of a command with invalid input."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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
    """A console on stdout, as wide as the terminal, ``COLUMNS`` or `WIDTH`."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return Console()
    # Pass a height as well: without one, Rich uses 80 columns wherever TERM is "dumb".
    return Console(width=WIDTH, height=25)


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
