import csv
import io
import json
from pathlib import Path

import pytest

from qat_lightning.compare.__main__ import main


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    """Five trials with results and no logs."""
    for place, (mode, seed, acc, latency) in enumerate(
        [("fx", 0, 0.97, 2.0), ("fx", 1, 0.98, 2.2), ("pt2e", 0, 0.96, 1.0), ("pt2e", 1, 0.96, 1.0)]
    ):
        folder = tmp_path / str(place)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text(f"mode: {mode}\nseed: {seed}\n")
        (folder / ".hydra" / "overrides.yaml").write_text(f"- mode={mode}\n- seed={seed}\n")
        metrics = {"float/test/acc": 0.98, "int8/test/acc": acc, "int8/latency_ms": latency, "int8/size_mb": 1.0}
        (folder / "result.json").write_text(json.dumps({"status": "completed", "metrics": metrics}))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "result.json").write_text(
        json.dumps(
            {
                "status": "failed",
                "error": {"type": "E", "message": "it [bold]broke[/bold] | <b>"},
                "overrides": ["mode=eager"],
            }
        )
    )
    (tmp_path / "0" / "model.int8").write_bytes(b"x")
    return tmp_path


def test_the_table_names_the_winner_and_what_failed(
    trials: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # which xdist sets
    assert main([str(trials), "--max-drop", "1"]) == 0
    shown = capsys.readouterr().out
    assert "97.50 ± 0.71" in shown
    assert "fx is the only one of 2 int8 configurations that keeps a drop of at most 1 pp" in " ".join(shown.split())
    assert "[bold]broke[/bold]" in shown
    assert "model.int8" in "".join(shown.split())


def test_json_has_the_decision_and_every_figure(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trials), "--max-latency", "1.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["winner"] == "pt2e"
    assert [c["label"] for c in found["configurations"]] == ["fx", "pt2e"]
    assert found["configurations"][0]["score"]["mean"] == pytest.approx(0.975)
    assert found["configurations"][1]["drop"] == {"mean": pytest.approx(2.0), "deviation": pytest.approx(0), "seeds": 2}
    assert found["left_out"][0]["status"] == "failed"


def test_csv_has_a_row_for_each_configuration(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trials), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["configuration"], row["n"], row["on_front"]) for row in rows] == [("fx", "2", "1"), ("pt2e", "2", "1")]
    assert float(rows[1]["latency_ms_mean"]) == 1.0


def test_markdown_is_written_to_a_file_and_escaped(trials: Path, tmp_path: Path) -> None:
    assert main([str(trials), "--markdown", str(tmp_path / "out.md"), "--max-drop", "1"]) == 0
    text = (tmp_path / "out.md").read_text()
    assert "| ● | fx | int8 | 97.50 ± 0.71 |" in text
    assert r"it \[bold\]broke\[/bold\] \| &lt;b&gt;" in text


def test_the_exit_status_says_that_nothing_qualifies(trials: Path) -> None:
    never = [str(trials), "--max-latency", "0.1"]
    assert main(never) == 0
    assert main([*never, "--fail-if-none"]) == 1
    assert main([str(trials), "--max-latency", "1", "--fail-if-none"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name folders of runs"),
        (["none"], "does not exist"),
        (["--fail-if-none", "."], "needs a limit"),
        (["--max-size", "-1", "."], "max_size=-1.0"),
        (["--wandb", "project"], "entity/project"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_status_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_two_outputs_cannot_share_stdout(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trials), "--json", "--csv"]) == 2
    assert "Only one" in capsys.readouterr().err


def test_the_page_is_written(trials: Path, tmp_path: Path) -> None:
    assert main([str(trials), "--html", str(tmp_path / "page.html"), "--title", "mine"]) == 0
    assert "<title>mine</title>" in (tmp_path / "page.html").read_text()
    assert main([str(trials), "--html", str(tmp_path / "no" / "page.html")]) == 2


def test_runs_of_several_tasks_are_compared_one_task_at_a_time(
    trials: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(4):
        path = trials / str(place) / ".hydra" / "config.yaml"
        path.write_text(f"{path.read_text()}data:\n  name: {'digits' if place < 2 else 'photos'}\n")
    assert main([str(trials), "--max-drop", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["winner"], [c["task"] for c in found["configurations"]]) == (None, ["digits", "photos"])
    assert main([str(trials), "--max-drop", "3", "--only", "data.name=photos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["winner"] == found["configurations"][0]["label"]
    assert [c["task"] for c in found["configurations"]] == [""]


def test_a_glob_that_matches_nothing_is_said(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trials), "--ignore", "nonsense.*", "--ignore", "mode"]) == 0
    assert capsys.readouterr().err == "--ignore 'nonsense.*' matches no setting of these runs.\n"
