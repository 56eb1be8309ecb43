"""Where tables are printed, and how a command ends that was given something wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from qat_lightning.errors import QuantizationError

WIDTH = 120
"""Columns where there is no terminal, as in a log of CI: Rich takes 80, at which tables of figures wrap."""

WRONG_INPUT = 2
"""The exit status of a command that was given something wrong."""


def status_of(run: Callable[[], int]) -> int:
    """What ``run`` returns; where it raises an error of ours, this on stderr and `WRONG_INPUT`."""
    try:
        return run()
    except QuantizationError as error:
        Console(stderr=True).print(Text(f"{type(error).__name__}: {error}", style="red"))
        return WRONG_INPUT


def console() -> Console:
    """A console on stdout, as wide as the terminal, as ``COLUMNS`` says, or `WIDTH`."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return Console()
    # With a height as well: without one, Rich takes 80 columns wherever TERM is "dumb".
    return Console(width=WIDTH, height=25)
