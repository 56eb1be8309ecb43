"""What is printed is the text itself: names and paths may have brackets, which are no markup."""

import pytest
from rich.console import Console

from qat_lightning.__main__ import main
from qat_lightning.modes.coverage import coverage_table
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.terminal import LiteralTable, console

BRACKETS = "[pkg://conf] [bold]x[/bold] [/red]"


def test_the_console_prints_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(BRACKETS)
    assert capsys.readouterr().out == f"{BRACKETS}\n"


@pytest.mark.parametrize("place", ["title", "caption", "column", "cell"])
def test_a_table_shows_brackets_on_any_console(place: str) -> None:
    header, cell = (BRACKETS if place == wanted else "x" for wanted in ("column", "cell"))
    table = LiteralTable(
        header,
        "a column that makes the table wide enough for it",
        **({place: BRACKETS} if place in ("title", "caption") else {}),
    )
    table.add_row(cell)
    markup = Console(width=120, markup=True)
    with markup.capture() as shown:
        markup.print(table)
    assert BRACKETS in " ".join(shown.get().split())


def test_the_table_of_coverage_shows_a_reason_with_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=120).print(coverage_table([LayerCoverage("net", "Linear", False, f"use {BRACKETS}")]))
    assert BRACKETS in capsys.readouterr().out


def test_the_command_says_what_goes_into_the_search_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    assert "hydra.searchpath: [pkg://qat_lightning.conf]" in capsys.readouterr().out
