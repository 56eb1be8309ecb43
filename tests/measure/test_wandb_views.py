"""What W&B stores, read with its own reader. Runs are offline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from qat_lightning.errors import ConfigurationError, MissingExtraError
from qat_lightning.measure.wandb_views import define_summaries, log_int8, log_variants, report

SUMMARY = {
    "float/test/acc": 0.98,
    "float/size_mb": 4.0,
    "float/latency_ms": 3.0,
    "float/step": 20.0,
    "fake_quant/test/acc": 0.97,
    "int8/test/acc": 0.96,
    "int8/size_mb": 1.0,
    "int8/latency_ms": 1.5,
    "int8/agreement": 0.99,
    "int8/sqnr_db": 55.0,
    "speedup": 2.0,
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One offline run with everything in it."""
    folder = tmp_path_factory.mktemp("run")
    logger = WandbLogger(save_dir=folder, offline=True, group="digits net", name="qat-fx")
    define_summaries(logger, [ModelCheckpoint(monitor="val/acc", mode="max"), EarlyStopping("val/loss", mode="min")])
    for step, (acc, loss) in enumerate([(0.5, 1.0), (0.9, 0.4), (0.8, 0.6)]):
        logger.log_metrics({"val/acc": acc, "val/loss": loss}, step)
    log_variants(logger, SUMMARY, 30)
    (folder / "model.int8").write_bytes(b"weights")
    log_int8(logger, folder / "model.int8", SUMMARY | {"int8/odd": float("inf")}, ["seed-0"])
    run = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def bodies(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def summary_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for body in bodies(records, "summary") for key, value in body.get("update", {}).items()}


def test_the_summary_has_the_best_and_the_last_of_what_is_monitored(records: list[dict[str, Any]]) -> None:
    summary = summary_of(records)
    assert summary["val/acc"] == {"max": 0.9, "last": 0.8}
    assert summary["val/loss"] == {"min": 0.4, "last": 0.6}


def test_the_summary_has_every_figure(records: list[dict[str, Any]]) -> None:
    summary = summary_of(records)
    assert {key: summary[key] for key in SUMMARY} == SUMMARY


def test_the_variants_are_a_table_and_plots(records: list[dict[str, Any]]) -> None:
    (row,) = (body["item"] for body in bodies(records, "history") if "variants/table._type" in body["item"])
    assert row["variants/table.nrows"] == 3
    assert row["variants/table.ncols"] == 4  # the variant, the accuracy, size and latency
    assert row["trainer/global_step"] == 30
    plots = [key for body in bodies(records, "config") for key in body.get("update", {}) if "visualize" in key]
    assert {key.partition("visualize.")[2] for key in plots} == {
        "variants/test/acc",
        "variants/test/acc_against_size_mb",
        "variants/test/acc_against_latency_ms",
    }


def test_the_int8_file_is_an_artifact_with_figures_that_is_uploaded_from_its_place(
    records: list[dict[str, Any]],
) -> None:
    (artifact,) = (body for body in bodies(records, "artifact") if body["type"] == "int8-network")
    assert artifact["name"] == "digits-net-qat-fx"
    assert set(artifact["aliases"]) == {"latest", "seed-0"}
    (content,) = artifact["manifest"]["contents"]
    assert content["path"] == "model.int8"
    assert Path(content["local_path"]).read_bytes() == b"weights"
    metadata = artifact["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    assert metadata["int8/test/acc"] == 0.96
    assert "float/test/acc" not in metadata
    assert "int8/odd" not in metadata


def test_a_report_compares_the_runs_of_the_group() -> None:
    made = report("me", "project", "digits 'net'", save=False)
    assert (made.entity, made.project, made.title) == ("me", "project", "Int8 networks of digits 'net'")
    grids = [block for block in made.blocks if hasattr(block, "runsets")]
    assert len(grids) == 3
    assert all("digits" in str(grid.runsets[0].filters) for grid in grids)
    panels = [panel._to_model().model_dump(by_alias=True, exclude_none=True) for grid in grids for panel in grid.panels]
    spec = json.dumps(panels)
    for key in ("int8/test/acc", "int8/latency_ms", "int8/size_mb", "quant/fake_quant_enabled", "val/acc"):
        assert key in spec
    assert [panel["viewType"] for panel in panels[:3]] == ["Scatter Plot", "Scatter Plot", "Bar Chart"]


def test_a_report_needs_names() -> None:
    with pytest.raises(ConfigurationError, match="group=''"):
        report("me", "project", "", save=False)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(MissingExtraError, match=r"qat-lightning\[reports\]"):
        report("me", "project", "group", save=False)
