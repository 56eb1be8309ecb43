"""Fits whose checkpoints, artifacts and figures are in remote storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from qat_lightning import QuantizationMonitor, QuantizedModelExport, float_state_dict, load_quantized
from qat_lightning.errors import ConfigurationError, MissingExtraError
from tests.callbacks.lit import Lit, assert_same_state, dataset, loader, qat, state, trainer


def find(folder: str) -> list[str]:
    return [name.removeprefix("/bucket/") for name in fsspec.filesystem("memory").find(folder)]


@pytest.mark.slow
def test_a_fit_writes_its_artifacts_below_the_root_of_the_trainer(bucket: str) -> None:
    export, callback = QuantizedModelExport(["torchscript"], batches=1), qat()
    trainer(callback, export, default_root_dir=bucket).fit(Lit(), loader(), loader())
    assert export.results["torchscript"].path == f"{bucket}/export/model.torchscript.pt"
    assert find("/bucket") == ["export/export.json", "export/model.torchscript.pt"]
    callback.save(f"{bucket}/model.int8")
    images = dataset()[:8][0]
    assert torch.equal(load_quantized(f"{bucket}/model.int8")(images), callback.quantized(images))


@pytest.mark.parametrize("where", ["dirpath", "default_root_dir"])
def test_a_missing_package_stops_the_fit_before_its_first_step(where: str) -> None:
    fsspec.register_implementation(
        "absent", "no_such_package.FileSystem", clobber=True, errtxt="Install no_such_package"
    )
    if where == "dirpath":
        with pytest.raises(MissingExtraError, match="Install no_such_package"):
            QuantizedModelExport(["pt2"], dirpath="absent://bucket")
        return
    fitting = trainer(qat(), QuantizedModelExport(["pt2"]))
    if where == "default_root_dir":
        fitting._default_root_dir = "absent://bucket"  # which the Trainer would refuse by itself with some releases
    with pytest.raises(MissingExtraError, match="Install no_such_package"):
        fitting.fit(Lit(), loader(), loader())
    assert fitting.global_step == 0


def test_auto_goes_on_as_its_checkpoint_in_other_storage_says(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = ModelCheckpoint(f"{bucket}/checkpoints", filename="{epoch}", save_top_k=-1)
    first = Lit()
    whole = qat("auto")
    trainer(whole, checkpoints, enable_checkpointing=True).fit(first, loader())
    from qat_lightning.callbacks.parts.preparation import Preparation

    def again(*args: Any) -> Any:
        raise AssertionError("it was decided anew")

    monkeypatch.setattr(Preparation, "_decide", again)
    second, resumed = Lit(), qat("auto")
    trainer(resumed).fit(second, loader(), ckpt_path=f"{bucket}/checkpoints/epoch=0.ckpt")
    assert resumed.chosen_modes == whole.chosen_modes
    assert_same_state(state(first), state(second))


def test_float_weights_are_read_from_other_storage(bucket: str) -> None:
    checkpoints = ModelCheckpoint(f"{bucket}/float", filename="last")
    model = Lit()
    trainer(checkpoints, enable_checkpointing=True).fit(model, loader())
    assert_same_state(float_state_dict(f"{bucket}/float/last.ckpt"), state(model))
    callback = qat(float_checkpoint=f"{bucket}/float/last.ckpt")
    trainer(callback, max_epochs=1).fit(Lit(), loader())
    kept = callback.float_weights("net")
    assert kept is not None
    assert torch.equal(kept["head.weight"], model.net.head.weight)
    with pytest.raises(ConfigurationError, match="is not a file"):
        qat(float_checkpoint=f"{bucket}/float/none.ckpt")


def test_the_monitor_adds_to_its_table_in_other_storage(bucket: str, tmp_path: Path) -> None:
    tables = []
    for folder in (bucket, str(tmp_path)):
        torch.manual_seed(0)
        logger = CSVLogger(folder, name="run", version=0)
        trainer(qat(), QuantizationMonitor(every_n_steps=2), logger=logger, max_epochs=1).fit(Lit(), loader())
        with fsspec.open(f"{logger.log_dir}/quantization_layers.csv", "rb") as file:
            tables.append(file.read())
    assert tables[0].count(b"\r\n") > 4
    assert tables[0] == tables[1]
