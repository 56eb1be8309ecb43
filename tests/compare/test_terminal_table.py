"""The table on a terminal breaks no words, and reports columns without room."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from qat_lightning.compare import Limits, compare, decide
from qat_lightning.compare.table import rich_table
from tests.compare.making import plain, qat

RUNS = [
    dataclasses.replace(run, config=run.config | {"model": {"width_of_the_network": k % 2}})
    for k, run in enumerate([plain(0), plain(1), qat("fx", 0), qat("fx", 1), qat("pt2e", 0), qat("eager", 1)])
]
FIGURES = ["variant", "test/acc (%)", "drop (pp)", "latency (ms)", "size (MB)", "speed-up", "n"]


def shown(width: int) -> str:
    comparison = compare(RUNS)
    console = Console(width=width, height=50)
    with console.capture() as captured:
        console.print(rich_table(comparison, decide(comparison, Limits(max_drop=5))))
    return captured.get()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_no_word_is_broken_and_what_is_left_out_is_said(width: int) -> None:
    text = shown(width)
    assert "…" not in text
    head, *rows = text.split("test/acc: larger")[0].splitlines()
    words = {word for line in (head, *rows) for word in line.split()}
    assert {"fx", "pt2e", "eager", "test/acc", "97.00"} <= words
    assert width < 80 or "width_of_the_network=0" in words or "width_of_the_network" in words
    said = " ".join(text.split()).partition("No room for: ")[2].partition(". --csv")[0]
    gone = [name for name in said.split(", ") if name]
    assert all((name in text.split("test/acc: larger")[0]) == (name not in gone) for name in FIGURES)
    assert bool(gone) == (width <= 100)
    assert {"test/acc (%)", "drop (pp)", "n"}.isdisjoint(gone)


def test_settings_have_columns_of_their_own_where_there_is_room() -> None:
    assert "configuration" in shown(100).splitlines()[1]
    assert "configuration" not in shown(160).splitlines()[1]
