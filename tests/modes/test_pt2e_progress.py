"""Messages during long operations."""

from __future__ import annotations

import logging
import sys
import time

import lightning.pytorch
import pytest

from qat_lightning.modes.decomposed.progress import said_while_it_lasts

assert lightning.pytorch  # whose log it is said in


def is_said(messages: list[str]) -> bool:
    first, *between, last = messages
    assert first == "Somebody compiles …"
    assert between
    assert all("s so far" in message for message in between)
    return last == "Somebody compiles: done after 0 s."


def test_the_begin_the_time_so_far_and_the_end_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), said_while_it_lasts("Somebody compiles", every=0.05):
        time.sleep(0.2)
    assert is_said([record.getMessage() for record in caplog.records])


def test_without_lightning_it_is_said_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    with said_while_it_lasts("Somebody compiles", every=0.05):
        time.sleep(0.2)
    assert is_said(capsys.readouterr().err.splitlines())


def test_a_failure_ends_it_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError), said_while_it_lasts("It fails", every=0.01):
        raise ZeroDivisionError
    said = len(caplog.records)
    time.sleep(0.05)
    assert len(caplog.records) == said
