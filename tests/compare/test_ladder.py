"""The ladder of a run, from its file to the run that is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_lightning.compare.find import find_runs
from qat_lightning.compare.ladder import Ladder, LadderRow, read_ladder
from qat_lightning.errors import RunFileError

LADDER = Ladder(
    "a drop of at most 0",
    "val/acc",
    "pp",
    (LadderRow("static", "fx x86, static", 0.0, None, 1.0, 2.0, 0.1, 0.2, "keeps the target", True),),
    "static keeps the target.",
)


def test_a_run_has_its_ladder_and_the_rungs_are_no_runs(tmp_path: Path) -> None:
    rung = tmp_path / "ladder" / "rungs" / "static" / "csv"
    rung.mkdir(parents=True)
    (rung / "metrics.csv").write_text("step,int8/val/acc\n0,0.9\n")
    (tmp_path / "ladder" / "ladder.json").write_text(json.dumps(LADDER.to_dict()))
    (tmp_path / "result.json").write_text(json.dumps({"status": "completed", "metrics": {"int8/test/acc": 0.9}}))
    (run,) = find_runs([tmp_path])
    assert run.ladder == LADDER
    assert run.metrics == {"int8/test/acc": 0.9}


def test_what_is_no_ladder_is_said(tmp_path: Path) -> None:
    assert read_ladder(tmp_path) is None
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "ladder.json").write_text('{"rows": 3}')
    with pytest.raises(RunFileError, match="is not the result of a search"):
        read_ladder(tmp_path)
