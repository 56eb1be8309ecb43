"""Each network of the zoo has its own process and time limit, and every outcome is in the table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.zoo.report import table
from benchmarks.zoo.server import apart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def test_what_was_noted_before_a_failure_is_kept(tmp_path: Path) -> None:
    def work(note: Callable[..., None]) -> None:
        note(stage="fit", steps=2)
        raise ValueError("no")

    noted = apart(work, 30, tmp_path / "log.txt")
    assert (noted["stage"], noted["steps"], noted["error"]) == ("fit", 2, "ValueError: no")
    assert "in work" in (tmp_path / "log.txt").read_text()


def test_a_network_that_takes_too_long_is_stopped_and_the_log_says_where(tmp_path: Path) -> None:
    def work(note: Callable[..., None]) -> None:
        note(stage="prepare")
        time.sleep(60)

    noted = apart(work, 1, tmp_path / "log.txt")
    assert (noted["stage"], noted["error"]) == ("prepare", "stopped after 1 s")
    assert noted["seconds"] < 20
    assert "in work" in (tmp_path / "log.txt").read_text()


def test_a_process_that_dies_is_a_failure(tmp_path: Path) -> None:
    noted = apart(lambda note: os._exit(3), 30, tmp_path / "log.txt")
    assert noted["error"] == "the process ended with status 3"


def test_the_table_counts_what_ended_well_and_names_what_did_not() -> None:
    common = {"mode": "auto", "parameters": 1_000_000, "input": [3, 64, 64]}
    rows = [
        common | {"family": "a", "network": "a0", "stage": "done", "took": "fx", "share": 1.0, "whole_db": 40.0},
        common
        | {"family": "b", "network": "b0", "stage": "done", "took": "pt2e", "share": 0.5, "left": [["mm", "", 50, ""]]},
        common | {"family": "c", "network": "c0", "stage": "fit", "steps": 1, "error": "NaN | everywhere"},
        {"family": "a", "mode": "upstream fx", "stage": "prepare and convert", "error": "no"},
    ]
    shown = table(rows, ["a", "b", "c", "d"], ["auto"], ["upstream fx"])
    assert "2 of 4 families" in shown
    assert "(fx 1, pt2e 1); 1 of them have at least 90 %" in shown
    assert "After the first step 1 failed. 1 were not run." in shown
    assert "- upstream fx: 0 of 1" in shown
    assert "| b | b0 | 1.00 | 64x64 | pt2e | 50.0 % |" in shown
    assert "fit: NaN / everywhere" in shown
