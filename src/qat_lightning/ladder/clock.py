"""The time that a search may take: over several launches, and inside of a rung."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time of a ladder is over in the middle of a rung; no ``except Exception`` on the way takes it for a fault."""


class Clock:
    """Counts the minutes of what is done.

    Args:
        most: How many there are; None for no limit.
        spent: Those of earlier launches, of what they finished.
    """

    def __init__(self, most: float | None, spent: float = 0.0) -> None:
        self._most = math.inf if most is None else most
        self._spent = spent
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Minutes; infinite without a limit."""
        return self._most - self._spent - self.since(self._began)

    @staticmethod
    def since(moment: float) -> float:
        """Minutes since a moment of `time.monotonic`."""
        return (time.monotonic() - moment) / 60


@contextmanager
def ends_after(minutes: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once so many minutes have passed.

    It takes a signal, which Python gives to the main thread only, and Windows has not: elsewhere only trainings end in
    time, by ``max_time`` of the Trainer.

    Example:
        >>> with ends_after(math.inf):
        ...     pass
    """
    main = threading.current_thread() is threading.main_thread()
    if math.isinf(minutes) or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, end)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, max(minutes * 60, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest:  # somebody else's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(rest - (time.monotonic() - began), 0.001), interval)
