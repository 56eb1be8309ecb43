"""Mistakes in single trials, which are known before the first trial starts; and what the table says of trials."""

from pathlib import Path

import pytest

from qat_lightning.sweep.folder import varying
from qat_lightning.sweep.report import sweep_table
from qat_lightning.sweep.result import TrialResult
from tests.sweep.running import sweep


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["scheme=null,w4a8"],
            "scheme=null: a config group cannot be null on the command line: scheme=default is the same.",
        ),
        (["recipe=distillation,null"], "recipe=none is the same."),
        (["debug=fast,null"], "use anomaly, fast, overfit, or leave it out."),
        (["scheme=w4a8,nonsense"], "scheme=nonsense"),
        (["quantization.strat=0,1"], "Could not override 'quantization.strat'."),
    ],
    ids=["null with a default", "null with none", "null", "no such option", "no such key"],
)
def test_a_mistake_in_one_trial_is_known_before_the_first_starts(words: list[str], says: str, tmp_path: Path) -> None:
    done = sweep(tmp_path, *words)
    assert done.returncode == 1
    said = " ".join(done.stderr.replace("│", " ").split())
    assert "No trial was started. " in said
    assert says in said
    assert "Traceback" not in said
    assert not done.stdout, "there is no table of trials"
    assert not list((tmp_path / "sweep").glob("[0-9]*"))


def test_a_trial_that_never_began_is_not_started_and_names_no_file(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "1" / "output.log").write_text("killed")
    done = {0: TrialResult("failed", ["seed=0"], error={"type": "E", "message": "it broke"})}
    table = sweep_table({number: [f"seed={number}"] for number in range(3)}, done, tmp_path)
    ended, why = ([str(cell) for cell in table.columns[place].cells] for place in (2, 5))
    assert ended == ["failed", "broken off", "not started"]
    assert why == ["E: it broke", f"no result: see {tmp_path / '1' / 'output.log'}", ""]
    assert "1 failed, 1 broken off, 1 not started" in str(table.title)
    assert "resume=true runs only what is missing" in str(table.caption)


def test_trials_of_a_search_are_labelled_with_short_numbers_unless_they_would_look_alike() -> None:
    assert varying([["lr=0.018224988220277075"], ["lr=0.5"]]) == ["lr=0.018225", "lr=0.5"]
    alike = [["lr=0.018224988220277075"], ["lr=0.018224988220277078"]]
    assert varying(alike) == [word for (word,) in alike]
