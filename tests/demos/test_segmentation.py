"""Segmentation: matching images and masks, mIoU without void, and int8 networks in every mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from qat_lightning import QuantizationAwareTraining, evaluate_variants
from qat_lightning.demos import (
    DeepLabMobileNet,
    DigitMasksDataModule,
    SegmentationFolderDataModule,
    SegmentationModule,
    UNet,
)
from qat_lightning.demos.data.augment import batch_generator
from qat_lightning.errors import ConfigurationError
from tests.app.test_train import FAST, train
from tests.callbacks.lit import trainer

CLASSES, VOID = 3, 9


def scenes(folder: Path, count: int = 4, size: tuple[int, int] = (12, 10)) -> Path:
    """Images whose red channel is 20 times the label in the mask."""
    draw = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            labels = draw.choice([0, 1, 2, VOID], size=size[::-1]).astype(np.uint8)
            Image.fromarray(labels).save(folder / split / "masks" / f"{number}.png")
            red = np.stack([20 * labels, labels * 0, labels * 0], -1)
            Image.fromarray(red).save(folder / split / "images" / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return scenes(tmp_path / "scenes")


def folder_data(path: Path, **settings: Any) -> SegmentationFolderDataModule:
    plain: dict[str, Any] = {"num_classes": CLASSES, "ignore_index": VOID, "mean": [0, 0, 0], "std": [1, 1, 1]}
    return SegmentationFolderDataModule(path=path, **{**plain, "batch_size": 4, **settings})


def labels_of(images: Tensor) -> Tensor:
    return (images[:, 0] * 255 / 20).round().long()


# Data


def test_images_come_with_their_masks(folder: Path) -> None:
    data = folder_data(folder)
    data.setup("fit")
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape, masks.dtype) == ((4, 3, 10, 12), (4, 10, 12), torch.int64)
    assert torch.equal(labels_of(images), masks)


def test_images_and_masks_are_resized_alike_and_labels_stay_labels(folder: Path) -> None:
    data = folder_data(folder, image_size=[5, 6])
    data.setup("fit")
    image, mask = data.splits.train[0]
    assert (image.shape, mask.shape) == ((3, 5, 6), (5, 6))
    assert set(mask.unique().tolist()) <= {0, 1, 2, VOID}


def test_a_mask_moves_with_its_image_and_padding_is_void(folder: Path) -> None:
    data = folder_data(folder, crop_padding=3, flip=True)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    images, masks = data.augment(batch, batch_generator(0, 1))
    inside = (images[:, 0] > 0) | (masks != VOID)
    assert torch.equal(labels_of(images)[inside], masks[inside])
    assert (~inside).any()
    again = data.augment(batch, batch_generator(0, 1))
    assert torch.equal(images, again[0])
    assert torch.equal(masks, again[1])
    assert not torch.equal(masks, data.augment(batch, batch_generator(0, 2))[1])


def spoil(folder: Path, what: str) -> None:
    mask, image = folder / "val" / "masks" / "1.png", folder / "val" / "images" / "1.png"
    labels = np.asarray(Image.open(mask)).copy()
    if what == "no mask":
        mask.unlink()
    elif what == "no image":
        image.unlink()
    elif what == "no folder":
        (folder / "test" / "masks").rename(folder / "test" / "labels")
    elif what == "smaller":
        Image.fromarray(labels[:-1]).save(mask)
    elif what == "colour":
        Image.fromarray(labels).convert("RGB").save(mask)
    elif what == "label":
        labels[2, 3] = 7
        Image.fromarray(labels).save(mask)
    else:
        Image.fromarray(labels[:-1]).save(mask)
        Image.fromarray(labels[:-1]).convert("RGB").save(image)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no mask", r"images/1\.png has no mask 1\.\* in .*val/masks, as 1 of 4"),
        ("no image", r"masks/1\.png has no image 1\.\* in .*val/images"),
        ("no folder", r"test/masks does not exist\. Say where images and masks are"),
        ("smaller", r"masks/1\.png is 12x9 and its image 1\.png is 12x10"),
        ("colour", r"masks/1\.png has the mode RGB\. Expected a label in one byte a pixel"),
        ("label", r"has the label 7\. Expected 0 to 2, or 9 .* data\.num_classes=8 or data\.ignore_index=7"),
        ("another size", r"data\.image_size=\[10,12\], height and width"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_first_step(what: str, says: str, folder: Path) -> None:
    spoil(folder, what)
    with pytest.raises(ConfigurationError, match=says):
        folder_data(folder).setup("fit")
    if what == "another size":
        folder_data(folder, image_size=[10, 12]).setup("fit")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_classes": 1}, "an integer from 2 to 256"),
        ({"masks": "masks"}, "has no {split}"),
        ({"image_size": 64}, "give height and width"),
        ({"image_size": [0, 3]}, "give height and width"),
        ({"crop_padding": -1}, "crop_padding=-1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        folder_data(folder, **settings)


def test_other_folders_can_be_named(folder: Path) -> None:
    for split in ("train", "val", "test"):
        (folder / split / "masks").rename(folder / f"{split}annot")
    data = folder_data(folder, masks="{split}annot")
    assert [len(split) for split in data.splits] == [4, 4, 4]  # type: ignore[arg-type]


def test_scenes_of_digits_have_every_class_and_void_in_each_set_whatever_the_seed() -> None:
    first, second = DigitMasksDataModule(seed=0).splits, DigitMasksDataModule(seed=1).splits
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)  # type: ignore[attr-defined]
        assert one.labels.unique().tolist() == [*range(11), 255]  # type: ignore[attr-defined]


# Metrics


class Says(nn.Module):
    """Returns scores of given classes for any input."""

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.scores + 0 * x[:, :1]


def test_void_counts_in_no_metric_and_no_loss() -> None:
    said = torch.tensor([[[0, 0, 1, 1, 2, 2]]])
    masks = torch.tensor([[[0, 0, 1, 0, VOID, VOID]]])
    module = SegmentationModule(Says(said), CLASSES, ignore_index=VOID)
    loader = torch.utils.data.DataLoader([(torch.zeros(1, 1, 6), masks[0])])
    (found,) = trainer().validate(module, loader, verbose=False)
    # class 0: 2 of 3, class 1: 1 of 2; class 2 is nowhere but in void
    assert found["val/miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["val/acc"] == pytest.approx(3 / 4)
    only_void = torch.full_like(masks, VOID)
    assert module._loss(module(torch.zeros(1, 1, 1, 6)), only_void).item() == 0


# Networks


@pytest.mark.parametrize("network", [UNet(5, 1, width=4, depth=2), DeepLabMobileNet(5, 1, width=4, blocks=1)])
def test_a_network_takes_images_of_any_size_and_a_batch_of_one(network: nn.Module) -> None:
    for size in ((2, 1, 19, 30), (1, 1, 24, 17)):
        assert network(torch.randn(size)).shape == (size[0], 5, *size[2:])


def small(name: str) -> nn.Module:
    if name == "unet":
        return UNet(11, 1, width=4, depth=2)
    return DeepLabMobileNet(11, 1, width=4, blocks=1, rates=(2,))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("unet", "fx"),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for name, modes in (("unet", ("eager", "pt2e")), ("deeplab_mobilenet", ("fx", "eager", "pt2e")))
            for mode in modes
        ),
    ],
)
def test_every_convolution_is_int8_in_every_mode(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")  # pt2e: the same results, sooner
    seed_everything(0, verbose=False)
    module, data = SegmentationModule(small(name), 11), DigitMasksDataModule(batch_size=64)
    callback = QuantizationAwareTraining(mode=mode, start=0.5)
    run = trainer(callback, max_epochs=2, limit_train_batches=3)
    run.fit(module, datamodule=data)
    summary = evaluate_variants(run, module, datamodule=data)
    assert summary["int8/mac_share"] == 1
    assert summary["int8/agreement"] > 0.99
    assert summary["int8/test/miou"] == pytest.approx(summary["fake_quant/test/miou"], abs=0.01)


def fit(run: Trainer, path: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    module = SegmentationModule(UNet(CLASSES, 3, width=2, depth=1), CLASSES, ignore_index=VOID)
    data = folder_data(path, batch_size=2, crop_padding=2, seed=3)
    run.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module.state_dict()


def test_a_run_resumed_within_an_epoch_ends_where_the_uninterrupted_one_ends(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(Trainer(**settings, callbacks=[saving]), folder)
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) == 4
    for path in saved:
        resumed = fit(Trainer(**settings, enable_checkpointing=False), folder, path)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), path.name


# train.py


@pytest.mark.slow
def test_the_experiment_runs_and_the_best_is_chosen_by_miou(folder: Path, tmp_path: Path) -> None:
    words = ["experiment=segmentation", f"data.datamodule.path={folder}", "data.num_classes=3"]
    small_net = ["model.module.net.width=4", "model.module.net.depth=1", "data.datamodule.crop_padding=2"]
    done = train(tmp_path, *words, *small_net, f"data.ignore_index={VOID}", "export=onnx", "logger=none", *FAST)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {"float/test/miou", "int8/test/miou", "onnx/test/miou", "int8/agreement"} <= result["metrics"].keys()
    assert {"val/miou", "val/acc"} <= result["fit_metrics"].keys()


@pytest.mark.slow
def test_a_label_out_of_range_ends_train_py_in_one_panel(folder: Path, tmp_path: Path) -> None:
    spoil(folder, "label")
    words = ["data=segmentation_folder", "model=unet", f"data.datamodule.path={folder}", "data.num_classes=3"]
    done = train(tmp_path, *words, f"data.ignore_index={VOID}", "logger=none", *FAST)
    assert done.returncode == 1
    assert "has the label 7" in " ".join(done.stderr.replace("│", " ").split())
