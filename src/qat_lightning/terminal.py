"""Where tables are printed."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH = 120
"""Columns where there is no terminal, as in a log of CI: Rich takes 80, at which tables of figures wrap."""


def console() -> Console:
    """A console on stdout, as wide as the terminal, as ``COLUMNS`` says, or `WIDTH`."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return Console()
    # With a height as well: without one, Rich takes 80 columns wherever TERM is "dumb".
    return Console(width=WIDTH, height=25)
