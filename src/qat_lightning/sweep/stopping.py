"""Turning SIGTERM into an exception, so that the run's record says how it ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM ended the program. The exit status is 143, as shells report it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "SIGTERM ended it before it was done"


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, which by default ends the process immediately.

    A second SIGTERM is ignored, because ``timeout`` sends two and the first one's cleanup has to finish. An existing
    handler, such as submitit's, is kept.

    Raises:
        Terminated: On SIGTERM.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker of a DataLoader, which has nothing to clean up
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def as_failure(error: BaseException) -> BaseException:
    """Return the error to end with: Lightning ends fits after SIGTERM with exit status 0, which would mean success."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # imported here because it imports torch

    if isinstance(error, SIGTERMException):
        return Terminated()
    if isinstance(error, SystemExit) and not error.code:
        return SystemExit(1)
    return error


def interrupted(error: BaseException) -> bool:
    """Whether the error is Ctrl-C, which Lightning turns into a `SystemExit`."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
