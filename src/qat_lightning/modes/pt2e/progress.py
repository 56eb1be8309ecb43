"""Saying that something takes long, while it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info

EVERY = 20.0
"""Seconds between two messages."""


@contextmanager
def said_while_it_lasts(what: str, *, every: float = EVERY) -> Iterator[None]:
    """Say what begins, from time to time how long it has taken, and that it ended.

    Args:
        what: A clause in the present tense, such as "Inductor compiles the network".
        every: Seconds between two messages.
    """
    rank_zero_info(f"{what} …")
    began, ended = time.monotonic(), threading.Event()

    def go_on_saying() -> None:
        while not ended.wait(every):
            rank_zero_info(f"{what}: {time.monotonic() - began:.0f} s so far.")

    speaker = threading.Thread(target=go_on_saying, daemon=True, name="qat-lightning-progress")
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()
        rank_zero_info(f"{what}: done after {time.monotonic() - began:.0f} s.")
