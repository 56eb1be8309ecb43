"""The time limit of a search, over several launches and within a rung."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time limit passed during a rung. Not an Exception, so that no ``except Exception`` on the way handles it."""


class Clock:
    """Counts the minutes of a search.

    Args:
        most: The limit; None for no limit.
        spent: Minutes that earlier launches spent on finished measurements.
    """

    def __init__(self, most: float | None, spent: float = 0.0) -> None:
        self._most = math.inf if most is None else most
        self._spent = spent
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """The remaining minutes; infinite without a limit."""
        return self._most - self._spent - self.since(self._began)

    @staticmethod
    def since(moment: float) -> float:
        """Minutes since a moment of `time.monotonic`."""
        return (time.monotonic() - moment) / 60


@contextmanager
def ends_after(minutes: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after this many minutes.

    This uses a signal, which Python delivers to the main thread only and Windows does not have. Elsewhere only
    trainings end in time, by ``max_time`` of the Trainer.

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
        if rest:  # a timer of other code continues
            signal.setitimer(signal.ITIMER_REAL, max(rest - (time.monotonic() - began), 0.001), interval)
