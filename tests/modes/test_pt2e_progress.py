"""What takes long says so while it does."""

from __future__ import annotations

import logging
import time

import pytest

from qat_lightning.modes.decomposed.progress import said_while_it_lasts


def test_the_begin_the_time_so_far_and_the_end_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), said_while_it_lasts("Somebody compiles", every=0.05):
        time.sleep(0.2)
    first, *between, last = [record.getMessage() for record in caplog.records]
    assert first == "Somebody compiles …"
    assert between
    assert all("s so far" in message for message in between)
    assert last == "Somebody compiles: done after 0 s."


def test_a_failure_ends_it_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError), said_while_it_lasts("It fails", every=0.01):
        raise ZeroDivisionError
    said = len(caplog.records)
    time.sleep(0.05)
    assert len(caplog.records) == said
