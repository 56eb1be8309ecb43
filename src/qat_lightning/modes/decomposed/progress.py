"""Messages about the progress of a long operation."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 20.0
"""Seconds between two messages."""


def _say(text: str) -> None:
    """Log through Lightning if it is loaded; a program that only runs a file does not import it."""
    if "lightning.pytorch" not in sys.modules:
        sys.stderr.write(f"{text}\n")
        return
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(text)


@contextmanager
def said_while_it_lasts(what: str, *, every: float = EVERY) -> Iterator[None]:
    """Log the beginning of an operation, its duration from time to time, and its end.

    Args:
        what: A clause in the present tense, such as "Inductor compiles the network".
        every: Seconds between two messages.
    """
    _say(f"{what} …")
    began, ended = time.monotonic(), threading.Event()

    def go_on_saying() -> None:
        while not ended.wait(every):
            _say(f"{what}: {time.monotonic() - began:.0f} s so far.")

    speaker = threading.Thread(target=go_on_saying, daemon=True, name="qat-lightning-progress")
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()
        _say(f"{what}: done after {time.monotonic() - began:.0f} s.")
