import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from qat_lightning.compare import find, find_runs
from qat_lightning.compare.offline import join
from qat_lightning.compare.run import Curve, Run, Status, curves_of
from qat_lightning.errors import RunFileError
from tests.compare.offline_runs import log_offline


def test_an_offline_run_is_read_with_wandbs_own_reader(offline: Path) -> None:
    (run,) = find_runs([offline])
    assert (run.name, run.status, run.wandb_id) == ("run aaaa", "finished", "aaaa")
    assert run.config == {"lr": 0.1, "seed": 0}
    assert run.metrics["int8/test/acc"] == 0.75
    assert run.curves["val/acc"] == Curve([0.0, 10.0, 20.0], pytest.approx([0.5, 0.6, 0.7]))
    assert run.layers == ({"layer": "stem", "weight_sqnr_db": 41.5}, {"layer": "head", "weight_sqnr_db": 38.25})


def test_a_run_that_was_killed_is_unfinished_and_keeps_what_it_logged(offline: Path, tmp_path: Path) -> None:
    (source,) = offline.glob("wandb/offline-run-*")
    shutil.copytree(source, tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-400])
    (run,) = find_runs([tmp_path])
    assert run.status == "unfinished"
    assert run.config["lr"] == 0.1
    assert "val/acc" in run.curves


def test_a_run_that_ended_with_an_error_failed(tmp_path: Path) -> None:
    log_offline(tmp_path, "bbbb", finish=False)
    (run,) = find_runs([tmp_path])
    assert (run.status, run.reason) == ("failed", "it ended with code 1")


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_broken_file_costs_its_run_only(content: bytes, offline: Path, tmp_path: Path) -> None:
    (tmp_path / "offline-run-1-cccc").mkdir()
    (tmp_path / "offline-run-1-cccc" / "run-cccc.wandb").write_bytes(content)
    good, broken = find_runs([offline, tmp_path])
    assert (good.status, broken.status) == ("finished", "unreadable")
    assert "offline-run-1-cccc" in broken.reason


def test_parts_of_a_resumed_run_are_one_run() -> None:
    first = Run("a", "a", "unfinished", curves={"loss": Curve([0.0, 1.0, 2.0], [4.0, 3.0, 9.0])}, metrics={"x": 1.0})
    second = Run("a", "b", curves={"loss": Curve([2.0, 3.0], [2.0, 1.0])}, metrics={"y": 2.0})
    joined = join([first, second])
    assert joined.curves["loss"] == Curve([0.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0])
    assert (joined.status, joined.metrics) == ("finished", {"x": 1.0, "y": 2.0})


def test_csv_logs_are_read(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    logger.log_hyperparams({"lr": 0.1, "seed": 2})
    for step in range(3):
        logger.log_metrics({"val/acc": 0.5 + 0.1 * step}, step)
    logger.log_metrics({"int8/test/acc": 0.75, "int8/size_mb": 0.5}, 3)
    logger.save()
    (run,) = find_runs([tmp_path])
    assert (run.status, run.config) == ("finished", {"lr": 0.1, "seed": 2})
    assert run.curves["val/acc"] == Curve([0.0, 1.0, 2.0], pytest.approx([0.5, 0.6, 0.7]))
    assert run.metrics["int8/test/acc"] == 0.75


def test_the_layers_of_the_last_measured_step_are_read_from_csv(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,int8/test/acc\n0,0.5\n")
    table = "step,layer,weight_sqnr_db\n1,stem,10\n1,head,11\n9,stem,40.5\n9,head,\n"
    (tmp_path / "quantization_layers.csv").write_text(table)
    (run,) = find_runs([tmp_path])
    assert run.layers == ({"layer": "stem", "weight_sqnr_db": 40.5}, {"layer": "head"})


def trial(folder: Path, **result: object) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(
        "mode: {name: fx}\nlr: ${base}\nbase: 2\nout: ${hydra:runtime.output_dir}\n"
    )
    (folder / ".hydra" / "overrides.yaml").write_text("- mode=fx\n- seed=1\n")
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def test_a_trial_with_a_result_needs_no_logger(tmp_path: Path) -> None:
    trial(tmp_path / "0", status="completed", metrics={"int8/test/acc": 0.9}, seconds=3.5)
    trial(tmp_path / "1", status="failed", error={"type": "ValueError", "message": "no"})
    trial(tmp_path / "2", status="skipped", error={"type": "CombinationError", "message": "no such pair"})
    trial(tmp_path / "3", status="pruned", metrics={"int8/test/acc": 0.1})
    trial(tmp_path / "10")
    trial(tmp_path / "0" / "earlier-1", status="completed", metrics={"int8/test/acc": 0.1})
    found = find_runs([tmp_path])
    assert [run.status for run in found] == ["finished", "failed", "skipped", "pruned", "unfinished"]
    assert found[0].metrics == {"int8/test/acc": 0.9}
    assert (found[0].seconds, found[0].overrides) == (3.5, ("mode=fx", "seed=1"))
    assert found[0].config == {"mode": {"name": "fx"}, "lr": 2, "base": 2}
    assert [run.reason for run in found[1:3]] == ["ValueError: no", "CombinationError: no such pair"]


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": '])
def test_a_broken_result_is_reported_with_its_file(content: str, tmp_path: Path) -> None:
    trial(tmp_path / "0")
    (tmp_path / "0" / "result.json").write_text(content)
    (run,) = find_runs([tmp_path])
    assert run.status == "unreadable"
    assert "result.json" in run.reason


def test_settings_that_ask_for_python_objects_are_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,int8/test/acc\n0,0.5\n")
    (tmp_path / "hparams.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    (run,) = find_runs([tmp_path])
    assert run.config == {"x": f"os.mkdir ['{tmp_path / 'made'}']"}
    assert not (tmp_path / "made").exists()


def test_a_path_without_a_run_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="no offline W&B run"):
        find_runs([tmp_path])
    with pytest.raises(RunFileError, match="does not exist"):
        find_runs([tmp_path / "none"])


def wandb_folders(folder: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Run | None]) -> None:
    """Folders of offline runs, and a reader that returns these parts, or finds none in them."""
    for name in parts:
        (folder / name).mkdir(parents=True)
        (folder / name / f"run-{name}.wandb").touch()

    def read(path: Path) -> Run:
        found = parts[path.name]
        if found is None:
            raise RunFileError(f"{path} holds no run")
        return replace(found, folder=str(path))

    monkeypatch.setattr(find, "read_offline", read)


def part(status: Status, start: float, **metrics: float) -> Run:
    curves = {"loss": Curve([start, start + 1], [9 - start, 8 - start])}
    return Run("a", "", status, curves=curves, metrics=metrics, wandb_id="aaaa")


@pytest.mark.parametrize("stub", ["offline-run-1-aaaa", "offline-run-3-aaaa"])
def test_a_trial_that_was_killed_before_it_logged_is_read_from_its_other_parts(
    stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial(tmp_path / "0")
    parts = {stub: None, "offline-run-2-aaaa": part("finished", 0.0, acc=0.9)}
    wandb_folders(tmp_path / "0" / "wandb", monkeypatch, parts)
    (run,) = find_runs([tmp_path])
    assert (run.status, run.metrics) == ("finished", {"acc": 0.9})


def test_a_result_is_read_without_any_readable_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path / "0", status="completed", metrics={"int8/test/acc": 0.9})
    trial(tmp_path / "1")
    for name in ("0", "1"):
        wandb_folders(tmp_path / name / "wandb", monkeypatch, {"offline-run-1-aaaa": None})
    complete, killed = find_runs([tmp_path])
    assert (complete.status, complete.metrics) == ("finished", {"int8/test/acc": 0.9})
    assert killed.status == "unreadable"
    assert "holds no run" in killed.reason


@pytest.mark.parametrize("names", [("offline-run-1-aaaa", "offline-run-2-aaaa"), ("run-1-aaaa", "offline-run-2-aaaa")])
def test_parts_of_a_run_that_was_resumed_outside_of_a_trial_are_joined_in_their_order(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = dict(zip(names, (part("unfinished", 0.0, x=1.0), part("finished", 2.0, y=2.0)), strict=True))
    wandb_folders(tmp_path, monkeypatch, parts)
    (run,) = find_runs([tmp_path])
    assert (run.status, run.metrics) == ("finished", {"x": 1.0, "y": 2.0})
    assert run.curves["loss"].steps == [0.0, 1.0, 2.0, 3.0]


def test_logs_that_a_trial_contains_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(tmp_path / "0", status="completed", metrics={"int8/test/acc": 0.9})
    wandb_folders(tmp_path / "0" / "wandb", monkeypatch, {"offline-run-1-aaaa": part("finished", 0.0)})
    (run,) = find_runs([*(tmp_path / "0" / "wandb").iterdir(), tmp_path])
    assert run.overrides == ("mode=fx", "seed=1")


def test_a_resumed_part_of_one_epoch_is_on_the_curve(tmp_path: Path) -> None:
    rows = [{"step": step, "val/acc": step / 10} for step in range(4)]
    parts = [Run("a", "a", curves=curves_of(some, "step")) for some in (rows[:3], rows[3:])]
    assert join(parts).curves["val/acc"].steps == [0.0, 1.0, 2.0, 3.0]


def test_hyperparameters_that_are_python_objects_are_text(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    given = {
        "lr": np.logspace(-3, -2, 3)[1],
        "act": nn.ReLU,
        "data": tmp_path / "data",
        "loss": nn.functional.cross_entropy,
        "sizes": (3, 4),
        "make": functools.partial(nn.Linear, 3),
    }
    logger.log_hyperparams(given)
    logger.log_metrics({"test/acc": 0.9}, 1)
    logger.save()
    (run,) = find_runs([tmp_path / "csv"])
    assert run.status == "finished"
    assert run.config["act"] == "torch.nn.modules.activation.ReLU"
    assert "cross_entropy" in run.config["loss"]
    assert run.config["sizes"] == [3, 4]
    assert set(run.config) == set(given)
    assert run.config["lr"] == given["lr"]


def test_wandbs_whole_numbers_are_read_as_hydra_wrote_them(tmp_path: Path) -> None:
    config = {"seed": 0, "freeze": {"freeze_observers": 1.0, "lr": 0.5}, "classes": 10}
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(
        "seed: 0\nfreeze: {freeze_observers: 1.0, lr: 0.1}\nclasses: null\n"
    )
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=0\n- resume=True\n")
    log_offline(tmp_path, "dddd", **config)
    (run,) = find_runs([tmp_path])
    assert run.config == config
    assert isinstance(run.config["freeze"]["freeze_observers"], float)
    assert run.overrides == ("seed=0",), "resume=true says how it was launched"
