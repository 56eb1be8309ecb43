"""Images with boxes: reading, errors before training, and joint augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qat_lightning.demos import DetectionCsvDataModule
from qat_lightning.demos.data.augment import augment_boxes, batch_generator
from qat_lightning.errors import ConfigurationError
from tests.support.boxed_images import make_boxed_images, write_table


def data(folder: Path, **settings: Any) -> DetectionCsvDataModule:
    settings = {"num_classes": 2, "suffix": ".png", "image_size": 64, "batch_size": 4} | settings
    return DetectionCsvDataModule(path=str(folder), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_boxed_images(tmp_path / "data")


def test_a_batch_has_images_boxes_labels_and_numbers(folder: Path) -> None:
    module = data(folder)
    assert [len(split) for split in module.splits] == [8, 4, 4]  # type: ignore[arg-type]
    images, boxes, labels, numbers = next(iter(module.val_dataloader()))
    assert images.shape == (4, 3, 64, 64)
    assert boxes.shape == (*labels.shape, 4)
    assert numbers.tolist() == [0, 1, 2, 3]
    assert ((labels >= 0).sum(1) >= 3).all()
    corner = labels[:, -1] >= 0  # of an image with the most boxes
    assert boxes[corner, -1].unique(dim=0).tolist() == [[56, 56, 64, 64]]
    assert module.classes == ("blue", "red")
    for image, some, named in zip(images, boxes, labels, strict=True):
        for box, label in zip(some[named >= 0][-2:], named[named >= 0][-2:], strict=True):  # those that nothing covers
            left, upper, right, lower = box.int().tolist()
            pixels = image[:, upper:lower, left:right].mean((1, 2))
            assert (pixels[0] > pixels[2]) == (label == 1)


def test_images_of_other_sizes_are_fitted_with_their_boxes(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for split in ("train", "val", "test"):
        image = Image.new("L", (200, 100), 0)
        image.paste(255, (150, 50, 200, 100))
        image.save(tmp_path / "pictures" / f"{split}.png")
    rows: list[Any] = [(split, f"{split}.png", "a", 150, 50, 200, 100) for split in ("train", "val", "test")]
    write_table(tmp_path / "t.csv", rows, ("set", "image", "kind", "x1", "y1", "x2", "y2"))
    columns = {"split": "set", "label": "kind", "xmin": "x1", "ymin": "y1", "xmax": "x2", "ymax": "y2"}
    module = data(
        tmp_path,
        num_classes=1,
        suffix="",
        columns=columns,
        boxes="t.csv",
        images="pictures",
        image_size=[64, 96],
        mean=[0.0],
        std=[1.0],
    )
    image, boxes, labels, _ = module.splits.train[0]
    assert image.shape == (1, 64, 96)
    torch.testing.assert_close(boxes, torch.tensor([[72.0, 24, 96, 48]]))
    assert image[0, 26:46, 74:94].min() > 0.9
    assert image[0, 48:].abs().max() == 0
    assert labels.tolist() == [0]


ROW = ("train", "train0", "red", 1, 1, 9, 9)
FAULTS: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"boxes": "none.csv"}, r"none\.csv is not a file"),
    (None, {"columns": {"xmin": "left"}}, r"no column 'left'; it has split, image.*columns\.xmin=NAME"),
    (None, {"columns": {"x": "left"}}, "unknown keys x: use split, image"),
    (None, {"num_classes": 3}, r"2 classes \(blue, red\), not 3: set data\.num_classes=2"),
    (None, {"suffix": ".jpg"}, r"16 of 16 images are missing\. line 2: .* and \d+ more rows.*suffix=\.jpg"),
    (None, {"images": "elsewhere"}, "images are missing"),
    (None, {"image_size": 60}, r"multiples of 32, like data\.image_size=256"),
    (None, {"image_size": [64]}, "height and width"),
    (None, {"scale_jitter": 1.0}, "scale_jitter=1.0"),
    ((*ROW[:3], 5, 5, 5, 9), {}, r"a box has no area\. line \d+: red at 5, 5, 5, 9 in train0.*skip_empty=true"),
    ((*ROW[:3], 9, 1, 5, 9), {}, "a box has no area"),
    ((*ROW[:3], 1, 1, 65, 9), {}, r"not within its image, which is 64 x 64 pixels\. line \d+: red at 1, 1, 65, 9"),
    ((*ROW[:3], -1, 1, 9, 9), {}, "not within its image"),
    ((*ROW[:3], "a", 1, 9, 9), {}, r"line \d+: xmin is 'a', and must be a number"),
    ((*ROW[:3], "nan", 1, 9, 9), {}, "must be a number"),
    (("dev", *ROW[1:]), {}, r"the split is 'dev', and must be one of train, val, test"),
    (("val", *ROW[1:]), {}, "an image is in two splits"),
    (("train", "", *ROW[2:]), {}, "the image in column 'image' is missing"),
    (("val", "val0", "green", 1, 1, 9, 9), {}, "the label 'green' is not in the split train"),
    (("train", "train9", *ROW[2:]), {}, r"1 of 17 images are missing\. line \d+: red at 1, 1, 9, 9 in train9"),
]


@pytest.mark.parametrize(("row", "settings", "says"), FAULTS, ids=[says[:24] for _, _, says in FAULTS])
def test_what_is_wrong_is_said_before_training(row: Any, settings: dict[str, Any], says: str, folder: Path) -> None:
    if row is not None:
        with (folder / "boxes.csv").open("a") as file:
            file.write(",".join(map(str, row)) + "\n")
    with pytest.raises(ConfigurationError, match=says):
        data(folder, **settings).setup("fit")


def test_a_split_without_boxes_and_a_file_that_is_no_image_are_refused(folder: Path) -> None:
    (folder / "images" / "test1.png").write_text("not an image")
    with pytest.raises(ConfigurationError, match=r"test1\.png is not an image"):
        data(folder).setup("fit")
    write_table(folder / "boxes.csv", [ROW])
    with pytest.raises(ConfigurationError, match="no box of the split val"):
        data(folder, num_classes=1)


def test_boxes_without_an_area_are_left_out_on_request(folder: Path) -> None:
    before = len(data(folder).rows)
    with (folder / "boxes.csv").open("a") as file:
        file.write("train,train0,red,5,5,5,9\n")
    module = data(folder, skip_empty=True)
    module.setup("fit")
    assert len(module.rows) == before


def edges_of(image: torch.Tensor) -> list[float]:
    bright = image[0] > 0.5
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]  # type: ignore[list-item]


def test_boxes_move_with_what_they_are_around() -> None:
    images = torch.zeros(40, 1, 64, 96)
    images[:, :, 20:40, 30:60] = 1
    boxes = torch.tensor([[30.0, 20, 60, 40], [0, 0, 0, 0]]).repeat(40, 1, 1)
    labels = torch.tensor([[1, -1]]).repeat(40, 1)
    new, moved, kept = augment_boxes(images, boxes, labels, batch_generator(7), scale_jitter=0.4, flip=True)
    assert new.shape == images.shape
    assert (kept[:, 1] == -1).all()
    assert (moved[:, 1] == 0).all()
    assert moved[:, 0, 0].std() > 3
    for image, box, label in zip(new, moved[:, 0], kept[:, 0], strict=True):
        assert label == 1
        assert edges_of(image) == pytest.approx(box.tolist(), abs=1.0)
    again = augment_boxes(images, boxes, labels, batch_generator(7), scale_jitter=0.4, flip=True)
    assert all(torch.equal(one, other) for one, other in zip((new, moved, kept), again, strict=True))


def test_a_box_of_which_little_is_left_is_none() -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 40, 40]]]).repeat(50, 1, 1)
    labels = torch.zeros(50, 2, dtype=torch.int64)
    _, moved, kept = augment_boxes(torch.zeros(50, 1, 64, 64), boxes, labels, batch_generator(1), scale_jitter=0.9)
    gone = kept[:, 0] < 0
    assert 0 < gone.sum() < 50
    assert (moved[gone, 0] == 0).all()
    assert (moved >= 0).all()
    assert (moved <= 64).all()
