"""benchmarks.tasks: each run once, interrupted runs resumed, and the accuracy that training recovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tasks

TINY = ["--tasks", "digits", "--epochs", "1", "1", "--formats", "--override", "debug=fast", "model.module.net.width=8"]


def test_a_run_is_trained_once_and_one_that_the_time_ended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"metric": "acc", "goal": "max", "score": 0.9, "size_mb": 1.0, "speedup": 2.0, "files": {}}
    trained: list[str] = []

    def train(runs: tasks.Runs, words: Any, name: str) -> dict[str, Any]:
        if len(trained) == 4:
            raise tasks.TimeIsUpError
        trained.append(name)
        return figures

    monkeypatch.setattr(tasks.Runs, "_train", train)
    words = [*TINY, "--out", str(tmp_path), "--json"]
    assert tasks.main(words) == 1
    said = capsys.readouterr()
    assert "missing: digits, trained on, then ptq, per channel, seed 0: the time was up" in said.err
    assert len(json.loads(said.out.splitlines()[-1])["rows"]) == 4
    trained.clear()
    assert tasks.main(words) == 0
    assert trained == ["-".join(("digits", *method.split(", "), "0")) for method in list(tasks.METHODS)[4:]]
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["method"] for row in again["rows"]] == list(tasks.METHODS)
    assert not again["missing"]


def run(score: float, goal: str = "max", **files: float) -> dict[str, Any]:
    known = {name: {"speedup": speed} for name, speed in files.items()}
    made = {"metric": "miou", "goal": goal, "score": score, "size_mb": 1.0, "speedup": 2.0, "mode": "fx"}
    return {**made, "files": known}


def test_what_training_wins_back_is_a_share_of_what_ptq_of_its_granularity_loses() -> None:
    by_method = {
        "float": [run(0.5), run(0.6)],
        "ptq, per tensor": [run(0.4, onnx=3.0, openvino=4.0), run(0.5, onnx=5.0, openvino=4.5)],
        "qat, per tensor": [run(0.48), run(0.57)],
        "ptq, per channel": [run(0.5), run(0.6)],
        "qat, per channel": [run(0.5), run(0.6)],
    }
    rows = {row["method"]: row for row in tasks.summarize("t", by_method)}
    assert rows["ptq, per tensor"]["drop"] == pytest.approx(0.1)
    assert rows["qat, per tensor"]["won_back"] == pytest.approx(0.75)
    assert rows["qat, per channel"]["won_back"] is None, "nothing was lost"
    assert (rows["ptq, per tensor"]["file"], rows["ptq, per tensor"]["file_speedup"]) == ("openvino", 4.25)
    smaller = {"float": [run(4.0, "min")], "ptq, per tensor": [run(5.0, "min")], "qat, per tensor": [run(4.25, "min")]}
    rows = {row["method"]: row for row in tasks.summarize("t", smaller)}
    assert (rows["ptq, per tensor"]["drop"], rows["qat, per tensor"]["won_back"]) == (1.0, 0.75)


def test_a_seed_that_failed_costs_no_other_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(runs: tasks.Runs, words: Any, name: str) -> dict[str, Any]:
        if name == "digits-ptq-per channel-0":
            raise tasks.RunFailedError(f"{name}: it broke")
        return run(0.5 + int(name[-1]) / 10)

    monkeypatch.setattr(tasks.Runs, "_train", train)
    words = ["--tasks", "digits", "--seeds", "0", "1", "2", "--methods", "float", "ptq, per channel"]
    assert tasks.main([*words, "--formats", "--out", str(tmp_path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["missing"] == ["digits-ptq-per channel-0: it broke"]
    assert [(row["seeds"], row["score"]) for row in said["rows"]] == [([1, 2], pytest.approx(0.65))] * 2


def test_a_task_on_data_of_your_own_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tasks.parse(["--tasks", "camvid_unet"])
    assert "--data camvid_unet=PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tasks.parse(["--data", "camvid=photos"])
    assert "there is no such task" in capsys.readouterr().err
    assert tasks.parse([]).tasks == ["digits", "digit_masks"]
    assert tasks.parse(["--data", "text=book.txt"]).tasks == ["digits", "digit_masks", "text"]


@pytest.mark.nightly
def test_float_ptq_and_qat_are_trained_by_train_py(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *TINY,
        "mode=fx",
        "--methods",
        "float",
        "ptq, per tensor",
        "qat, per tensor",
        "--out",
        str(tmp_path),
        "--json",
    ]
    assert tasks.main(words) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert [rows[method]["modes"] for method in rows] == [[], ["fx"], ["fx"]]
    assert rows["ptq, per tensor"]["size_mb"] < rows["float"]["size_mb"]
    assert {row["metric"] for row in rows.values()} == {"acc"}


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--tasks",
        "digits",
        "--methods",
        "float",
        "--override",
        "model.module.scheduler=steps",
        "--out",
        str(tmp_path),
    ]
    assert tasks.main(words) == 1
    said = capsys.readouterr().err
    assert "missing: digits-float-0" in said
    assert "use one of cosine, constant" in said
    assert not (tmp_path / "results.jsonl").exists()
