"""The detector of the demos: its network in every mode, its fit, resume, and comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("pycocotools")

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, QuantizedModelExport, evaluate_variants
from qat_lightning.compare.metric import choose_metric
from qat_lightning.compare.run import Run
from qat_lightning.demos import DetectionCsvDataModule, DetectionModule, SingleShot
from qat_lightning.demos.boxes import assign
from qat_lightning.demos.data.images import Splits
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import trainer
from tests.demos.test_resume import SETTINGS
from tests.support.boxed_images import make_boxed_images

SMALL: dict[str, Any] = {"num_classes": 2, "width": 4, "channels": 8, "tower": 1}
SHARED = {"head.class_tower.0", "head.box_tower.0", "head.scores", "head.distances", "head.quality"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxed_images(tmp_path_factory.mktemp("detection") / "data")


def data(folder: Path, **settings: Any) -> DetectionCsvDataModule:
    settings = {"image_size": 64, "batch_size": 4} | settings
    return DetectionCsvDataModule(path=str(folder), num_classes=2, suffix=".png", **settings)


def module(**settings: Any) -> DetectionModule:
    seed_everything(0, verbose=False)
    return DetectionModule(SingleShot(**SMALL), 2, **settings)


def test_the_network_has_one_head_for_all_levels_and_one_to_three_million_parameters() -> None:
    net = SingleShot(num_classes=3)
    assert 1e6 < sum(parameter.numel() for parameter in net.parameters()) < 3e6
    graph = torch.fx.symbolic_trace(net).graph
    assert sum(node.target == "head.scores" for node in graph.nodes) == len(net.strides) == 3
    levels = net.eval()(torch.zeros(1, 3, 96, 64))
    assert [scores.shape[-2:] for scores, _, _ in levels] == [(12, 8), (6, 4), (3, 2)]
    chances = torch.cat([scores.flatten() for scores, _, _ in levels]).sigmoid()
    assert chances.mean().item() == pytest.approx(0.01, rel=0.3)


def test_every_parameter_gets_a_gradient_and_an_image_without_boxes_has_a_loss(folder: Path) -> None:
    images, boxes, labels, _ = next(iter(data(folder).train_dataloader()))
    model = module()
    model.loss(model.look(images), boxes, labels).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    nothing = model.loss(model.look(images), boxes, torch.full_like(labels, -1))
    assert nothing.isfinite()


def test_the_loss_of_what_is_right_is_small(folder: Path) -> None:
    images, boxes, labels, _ = next(iter(data(folder).val_dataloader()))
    model = module()
    found = model.look(images)
    chosen = assign(found.where, boxes, labels)
    taken, index = chosen >= 0, chosen.clamp(min=0)
    right = torch.where(taken[..., None], boxes.gather(1, index[..., None].expand(-1, -1, 4)), found.boxes)
    scores = torch.full_like(found.scores, -9.0)
    scores[taken] = 18.0 * nn.functional.one_hot(labels.gather(1, index)[taken], 2) - 9.0
    sure = found._replace(boxes=right, scores=scores, quality=torch.where(taken, 9.0, -9.0))
    assert model.loss(sure, boxes, labels) < 0.01 < model.loss(found, boxes, labels)
    detections = model.detect(sure)
    assert sum(len(each.scores) for each in detections) <= (labels >= 0).sum()


@pytest.mark.parametrize("mode", ["fx", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("eager", "pt2e"))])
def test_the_shared_head_is_int8_on_every_level_and_equals_fake_quant(mode: str, folder: Path) -> None:
    model, qat = module(), QuantizationAwareTraining(mode=mode, start=0)
    run = trainer(qat, max_epochs=2)
    run.fit(model, datamodule=data(folder))
    summary = evaluate_variants(run, model, datamodule=data(folder))
    assert {row.name for row in qat.quantized.coverage if row.quantized} >= SHARED
    assert not [row for row in qat.quantized.coverage if not row.quantized]
    assert summary["int8/mac_share"] == 1
    assert summary["int8/sqnr_db"] > 50
    for name in ("map", "map_50"):
        assert summary[f"int8/test/{name}"] == pytest.approx(summary[f"fake_quant/test/{name}"], abs=0.02)
    assert summary["int8/test/loss"] == pytest.approx(summary["fake_quant/test/loss"], rel=1e-3)


@pytest.mark.slow
def test_a_detector_learns_and_stays_right_in_int8(folder: Path) -> None:
    seed_everything(0, verbose=False)
    model = DetectionModule(SingleShot(2, width=8, channels=16, tower=1), 2, lr=5e-3)
    qat = QuantizationAwareTraining(mode="fx", start=0.5)
    run = trainer(qat, max_epochs=60)
    shown = data(folder, scale_jitter=0.0, flip=False)
    shown._splits = Splits(*3 * [shown.splits.train])  # what it was trained on
    run.fit(model, datamodule=shown)
    summary = evaluate_variants(run, model, datamodule=shown)
    assert summary["fake_quant/test/map_50"] > 0.8
    assert summary["int8/test/map_50"] == pytest.approx(summary["fake_quant/test/map_50"], abs=0.05)


@pytest.mark.nightly
def test_calibration_after_training_and_an_onnx_file_run_the_same_boxes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, ptq = module(), PostTrainingQuantization(mode="fx", calibration_batches=2)
    export = QuantizedModelExport(["onnx"], dirpath=tmp_path)
    run = trainer(export, ptq, max_epochs=1)
    run.fit(model, datamodule=data(folder))
    summary = evaluate_variants(run, model, datamodule=data(folder))
    assert summary["onnx/test/loss"] == pytest.approx(summary["int8/test/loss"], rel=2e-3)
    assert {"float/test/map", "int8/test/map", "onnx/test/map"} <= summary.keys()
    chosen = choose_metric([Run("a", "a", metrics=summary)])
    assert (chosen.name, chosen.larger_is_better, chosen.is_share) == ("test/map", True, True)


def fit(folder: Path, run: Trainer, checkpoint: Path | None = None) -> LightningModule:
    model = module()
    run.fit(model, datamodule=data(folder, seed=5), ckpt_path=None if checkpoint is None else str(checkpoint))
    return model


def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"max_epochs": 2}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(folder, Trainer(**settings, callbacks=[saving])).state_dict()
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 4
    for path in saved[:3]:
        resumed = fit(folder, Trainer(**settings, enable_checkpointing=False), path).state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), path.name


def test_data_without_boxes_is_refused_with_what_to_choose() -> None:
    images = DataLoader([(torch.zeros(3, 64, 64), 1)] * 2)
    with pytest.raises(ConfigurationError, match="data=detection_csv"):
        trainer(max_epochs=1).fit(module(scheduler="constant"), images)


def test_a_network_without_strides_and_an_impossible_threshold_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Conv2d does not say the pixels between places"):
        DetectionModule(nn.Conv2d(1, 1, 1), 1)
    with pytest.raises(ConfigurationError, match=r"iou_threshold=1\.5"):
        module(iou_threshold=1.5)
