"""python -m qat_lightning.sensitivity on a run of train.py, in this process."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from qat_lightning.sensitivity.__main__ import main
from tests.configs.conftest import CONF, composed  # noqa: F401 (a fixture)


@pytest.fixture
def run(composed: Callable[..., DictConfig], tmp_path: Path) -> Path:  # noqa: F811
    """A float run of one epoch, as train.py leaves it."""
    cfg = composed()
    model, datamodule = instantiate(cfg.model.module), instantiate(cfg.data.datamodule)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoints").mkdir()
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path


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
        ([str(CONF)], "is no run of train.py"),
        ([str(run), "--metric", "val/f1"], "validation_step logs val/"),
        ([str(run), "--checkpoint", str(run / "none.ckpt")], "is not a file"),
        ([str(run), "model.module.net.width=8"], "is not of this model"),
        ([str(run), "--max-drop", "-1"], "max_drop=-1.0 is not possible"),
    ):
        assert main([*words, "--validation-batches", "1", "--no-plot"]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
