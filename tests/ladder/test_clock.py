"""The time of a search."""

from __future__ import annotations

import math
import signal
import time

import pytest

from qat_lightning.ladder.clock import Clock, OutOfTime, ends_after


def work_on() -> None:
    """As a measurement that must not cost a fit: it goes on whatever happens."""
    while True:
        try:
            time.sleep(0.001)
        except Exception:  # noqa: BLE001, S112
            continue


def test_a_block_is_ended_in_the_middle_whatever_it_catches() -> None:
    with pytest.raises(OutOfTime), ends_after(0.05 / 60):
        work_on()


def test_somebody_elses_timer_and_handler_stay() -> None:
    handler, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        for minutes in (1.0, math.inf):
            with ends_after(minutes):
                pass
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) == handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_what_earlier_launches_took_counts() -> None:
    assert Clock(None, 5).left == math.inf
    assert Clock(2.0, 1.5).left == pytest.approx(0.5, abs=0.01)
    assert Clock(2.0, 3.0).left < 0
