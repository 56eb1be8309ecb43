"""Saying that something takes long, while it does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 20.0
"""Seconds between two messages."""


def _say(text: str) -> None:
    """In Lightning's log where Lightning is in use; who only runs a file does not import it."""
    if "lightning.pytorch" not in sys.modules:
        sys.stderr.write(f"{text}\n")
        return
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(text)


@contextmanager
def said_while_it_lasts(what: str, *, every: float = EVERY) -> Iterator[None]:
    """Say what begins, from time to time how long it has taken, and that it ended.

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
