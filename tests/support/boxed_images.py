"""A tiny dataset of boxes: red and blue rectangles on gray, in PNG files and a CSV file."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from PIL import Image

HEADER = ("split", "image", "label", "xmin", "ymin", "xmax", "ymax")
COLOURS = {"blue": (30, 40, 220), "red": (220, 40, 30)}


def make_boxed_images(folder: Path, *, train: int = 8, val: int = 4, test: int = 4, size: int = 64) -> Path:
    """Write `images/*.png` and `boxes.csv`; each image has one to three rectangles."""
    drawn = random.Random(0)
    (folder / "images").mkdir(parents=True)
    rows: list[tuple[object, ...]] = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        for number in range(count):
            name = f"{split}{number}"
            image = Image.new("RGB", (size, size), (128, 128, 128))
            for _ in range(drawn.randint(1, 3)):
                label = drawn.choice(sorted(COLOURS))
                side = drawn.randint(size // 5, size // 2)
                left, upper = drawn.randint(0, size - side), drawn.randint(0, size - side)
                image.paste(COLOURS[label], (left, upper, left + side, upper + side))
                rows.append((split, name, label, left, upper, left + side, upper + side))
            for label, corner in zip(COLOURS, (0, size - 8), strict=True):  # both classes in every image
                image.paste(COLOURS[label], (corner, corner, corner + 8, corner + 8))
                rows.append((split, name, label, corner, corner, corner + 8, corner + 8))
            image.save(folder / "images" / f"{name}.png")
    write_table(folder / "boxes.csv", rows)
    return folder


def write_table(path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = HEADER) -> None:
    """Write a CSV file of boxes."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
