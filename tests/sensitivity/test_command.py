"""python -m qat_lightning.sensitivity on a run of train.py, in this process."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from qat_lightning import QuantizationAwareTraining
from qat_lightning.sensitivity import Budget, MixedPrecision
from qat_lightning.sensitivity.__main__ import main
from qat_lightning.sensitivity.run import Options, config_of_run, measure_run
from tests.configs.conftest import CONF, composed  # noqa: F401 (a fixture)

FEW = ("--validation-batches", "1", "--calibration-batches", "1", "--no-plot")


def run_of(cfg: DictConfig, folder: Path, **settings: Any) -> Path:
    """A run of one epoch, as train.py leaves it."""
    model, datamodule = instantiate(cfg.model.module), instantiate(cfg.data.datamodule)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet, **settings)
    trainer.fit(model, datamodule)
    (folder / ".hydra").mkdir()
    (folder / "checkpoints").mkdir()
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def run(composed: Callable[..., DictConfig], tmp_path: Path) -> Path:  # noqa: F811
    """A float run."""
    return run_of(composed(), tmp_path)


def test_a_run_is_ranked_drawn_and_given_a_budget(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = [str(run), "--max-drop", "0.5", "--validation-batches", "1", "--calibration-batches", "1"]
    assert main(words) == 0
    with (run / "sensitivity" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"stem.0", "classifier"} <= {row["name"] for row in rows}
    assert (run / "sensitivity" / "layers.png").is_file()
    assert "  exclude: [] # no layer stays float" in (run / "sensitivity" / "mixed_precision.yaml").read_text()
    assert "python train.py 'quantization.exclude=[]'" in capsys.readouterr().out


def test_what_is_wrong_with_the_input_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        ([], "There is nothing to measure"),
        ([str(CONF)], "is not a run of train.py"),
        ([str(run), "--metric", "val/f1"], "validation_step logs val/"),
        ([str(run), "--checkpoint", str(run / "none.ckpt")], "is not a file"),
        ([str(run), "model.module.net.width=8"], "does not match this model"),
        ([str(run), "--max-drop", "-1"], "max_drop=-1.0 is not valid"),
        ([str(run), "--metric", "sqnr", "--smaller-is-better"], "leave out --smaller-is-better"),
    ):
        assert main([*words, "--validation-batches", "1", "--no-plot"]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("config", [{"data": {"batch_size": 64}, "lr": 0.1}, {"model": "resnet18", "data": None}])
def test_a_run_of_another_program_is_told_so_before_anything_else(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), tmp_path / ".hydra" / "config.yaml")
    assert main([str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "This is not a run of train.py: its configuration has no model.module and no data.datamodule." in said
    assert "use qat_lightning.sensitivity(network, batches, metric=...)" in said


@pytest.mark.slow
def test_overrides_stand_where_they_like(run: Path) -> None:
    overrides = ("mode.name=eager", "quantization.mode=eager")
    for words in (
        [str(run), *FEW, *overrides],
        [*overrides, str(run), *FEW],
        [overrides[0], *FEW, str(run), overrides[1]],
    ):
        assert main(words) == 0
        assert all(row["kind"] != "add" for row in layers(run))  # eager rounds layers only


def layers(run: Path) -> list[dict[str, str]]:
    with (run / "sensitivity" / "layers.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_metric_is_the_one_that_the_model_states(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in (
        ([], "val/acc: float"),
        (["model.metric.name=loss", "model.metric.mode=min"], "-val/loss: float"),
    ):
        assert main([str(run), *words, *FEW]) == 0
        assert f" {shown}" in " ".join(["", *capsys.readouterr().out.split()])
    early = OmegaConf.create({"model": {"name": "of an earlier release"}})
    assert Options().with_metric_of(early) == Options("val/acc")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_layers_are_ranked_by_the_noise_of_the_outputs(
    run: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([str(run), "--metric", "sqnr", f"quantization.mode={mode}", "quantization.scheme.weight_bits=4", *FEW])
        == 0
    )
    assert "SQNR of the outputs in dB: float 300.0000" in " ".join(capsys.readouterr().out.split())
    rows = [row for row in layers(run) if int(row["parameters"])]
    assert len(rows) > 10
    assert all(5 < float(row["alone"]) < 300 for row in rows)
    assert rows == sorted(rows, key=lambda row: -float(row["loss"]))


def test_a_run_is_ranked_on_the_grids_of_its_kind(run: Path) -> None:
    words = ["quantization.kind=dynamic", "quantization.scheme.activation_granularity=per_token"]
    assert main([str(run), "--metric", "sqnr", *words, *FEW]) == 0
    assert [row["name"] for row in layers(run)] == ["classifier"]  # convolutions have no dynamic kernel


def test_sqnr_is_that_of_the_validation_data(run: Path) -> None:
    """Two of its batches, processed by hand."""
    cfg = config_of_run(run, [])
    found = measure_run(cfg, run / "checkpoints" / "last.ckpt", Options("sqnr", validation_batches=2))
    datamodule = instantiate(cfg.data.datamodule)
    datamodule.setup("validate")
    images = [batch[0] for batch in datamodule.val_dataloader()][:2]
    kept = found._metric.examples
    assert [example.args[0].tolist() for example in kept] == [batch.tolist() for batch in images]
    assert not any(example.args[0].is_inference() for example in kept)
    assert found.metric_name == "SQNR of the outputs in dB"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["lsq", "w4a8_lsq"])
def test_learned_steps_are_calibrated_and_that_is_said(
    composed: Callable[..., DictConfig],  # noqa: F811
    tmp_path: Path,
    scheme: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a run that trained them."""
    cfg = composed(f"scheme={scheme}", "quantization.start=0.0")
    callback = instantiate(cfg.quantization)
    run = run_of(cfg, tmp_path, callbacks=[callback], limit_train_batches=3)
    words = [str(run), "--metric", "sqnr", *FEW]
    capsys.readouterr()
    assert main(words) == 0
    note = "Measured with calibrated steps instead of learned_step='lsq', which needs training."
    assert capsys.readouterr().out.splitlines().count(note) == 1
    with_learned = layers(run)
    assert main([*words, "quantization.scheme.learned_step=none"]) == 0
    assert "calibrated steps" not in capsys.readouterr().out
    assert layers(run) == with_learned


# What comes of it


def plan(*exclude: str) -> MixedPrecision:
    return MixedPrecision(exclude, Budget(max_drop=0.01), "val/acc", 0.98, 0.985, 0.74, 3.5)


@pytest.mark.parametrize(
    "exclude",
    [(), ("net.stem.0", "net.stages.1.project.0"), ("*.depthwise.0", "net.st?m.*", "net.[ch]*"), ("0", "1.5")],
)
@pytest.mark.usefixtures("composed")
def test_the_file_is_an_experiment_and_the_override_says_the_same(exclude: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    plan(*exclude).write(tmp_path / "experiment" / "mixed_precision.yaml")
    where = f"hydra.searchpath=[pkg://qat_lightning.conf,file://{tmp_path}]"
    by_file = compose("config", [where, "experiment=mixed_precision", "scheme=w4a8"])
    by_word = compose("config", [plan(*exclude).override(), "scheme=w4a8"])
    assert by_file == by_word
    assert OmegaConf.to_container(by_file.quantization.exclude) == list(exclude)
    callback = instantiate(by_file.quantization)
    assert isinstance(callback, QuantizationAwareTraining)
    assert tuple(callback.exclude) == exclude
