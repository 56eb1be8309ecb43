"""Showing a mistake in the configuration in one panel; without torch, which takes seconds to import."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from qat_lightning.errors import QuantizationError


@contextmanager
def in_one_panel(*others: type[Exception]) -> Iterator[None]:
    """Show a mistake in the configuration as one panel on stderr and exit with 1.

    Other errors are bugs, and keep their traceback. With ``HYDRA_FULL_ERROR=1`` all do.

    Args:
        others: Additional classes of errors that count as mistakes.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (QuantizationError, InstantiationException, OmegaConfBaseException, *others)):
            raise
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        title, message = explain(error)
        hint = Text("\n\nHYDRA_FULL_ERROR=1 shows where it was raised.", style="dim")
        panel = Panel(Text(message).append_text(hint), title=title, title_align="left", border_style="red")
        Console(stderr=True).print(panel)
        raise SystemExit(1) from error


def explain(error: BaseException) -> tuple[str, str]:
    """A title and the most informative message: that of the mistake itself, not Hydra's message around it.

    Example:
        >>> from qat_lightning.errors import ConfigurationError
        >>> explain(ConfigurationError("mode=fxx is unknown"))
        ('ConfigurationError', 'mode=fxx is unknown')
    """
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    where = str(error).rpartition("full_key: ")[2].strip() if isinstance(error, InstantiationException) else ""
    message = str(cause).removesuffix(f"full_key: {where}").strip()
    return type(cause).__name__, f"{message}\n\nIn the configuration: {where}" if where else message


def explained(error: BaseException) -> dict[str, str]:
    """`explain` in the form of ``result.json``."""
    kind, message = explain(error)
    return {"type": kind, "message": message}
