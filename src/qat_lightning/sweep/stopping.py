"""What ends a run from outside: SIGTERM as an exception, so that what the run leaves says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM ended the program. Its exit status is the one that shells give: 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "SIGTERM ended it before it was done"


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, whose default ends the process where it stands.

    A second SIGTERM is ignored: ``timeout`` sends two, and what the first one has to leave has to be written. A handler
    of somebody else's, as submitit's, stays.

    Raises:
        Terminated: On SIGTERM.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker of a DataLoader, which has nothing to leave
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def as_failure(error: BaseException) -> BaseException:
    """The error to end with: Lightning leaves fits that SIGTERM ended with an exit status of 0, which says success."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # torch comes with it

    if isinstance(error, SIGTERMException):
        return Terminated()
    if isinstance(error, SystemExit) and not error.code:
        return SystemExit(1)
    return error


def interrupted(error: BaseException) -> bool:
    """Whether it was Ctrl-C; Lightning makes a `SystemExit` of it."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
