"""Reading and checking a CSV file with one box per row."""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_lightning.errors import ConfigurationError

COLUMNS = ("split", "image", "label", "xmin", "ymin", "xmax", "ymax")
"""Default names of the columns."""

SPLITS = ("train", "val", "test")

SHOWN = 3
"""Maximum number of invalid rows named in an error."""


@dataclass(frozen=True)
class Row:
    """A box.

    Attributes:
        line: Line number in the file, from 1 for the header.
        split: ``train``, ``val`` or ``test``.
        image: Name of the image file.
        label: Name of the class.
        box: Left, upper, right and lower edge, in pixels.
    """

    line: int
    split: str
    image: str
    label: str
    box: tuple[float, float, float, float]

    @property
    def is_empty(self) -> bool:
        """Whether it has no area."""
        left, upper, right, lower = self.box
        return not (left < right and upper < lower)


def read_boxes(path: Path, columns: Mapping[str, str] | None = None, *, skip_empty: bool = False) -> list[Row]:
    """Read a CSV file of boxes.

    Args:
        path: The file, with a header.
        columns: Names of columns that differ from `COLUMNS`.
        skip_empty: Skip boxes without area; otherwise they are an error.

    Returns:
        The rows in order.

    Raises:
        ConfigurationError: The file does not exist, a column is missing or unknown, or a row is invalid: its split is
            not in `SPLITS`, a coordinate is not a number, a box has no area, an image is in two splits, or a label is
            not in the training set.
    """
    names = _names(columns)
    if not path.is_file():
        raise ConfigurationError(
            f"{path} is not a file. Expected a CSV file with the columns {', '.join(names.values())}."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        for column, name in names.items():
            if name not in header:
                raise ConfigurationError(
                    f"{path} has no column {name!r}; it has {', '.join(header) or 'none'}. If it is called otherwise: "
                    f"set data.datamodule.columns.{column}=NAME."
                )
        rows = [_row(path, reader.line_num, entry, names) for entry in reader]
    empty = [row for row in rows if row.is_empty]
    if empty and not skip_empty:
        raise _faulty(path, empty, "a box has no area", "Correct it, or set data.datamodule.skip_empty=true")
    rows = [row for row in rows if not row.is_empty]
    _check_splits(path, rows)
    return rows


def check_images(path: Path, rows: Sequence[Row], size_of: Callable[[str], tuple[int, int] | None]) -> None:
    """Check that images exist and contain their boxes.

    Args:
        path: Path of the table, for messages.
        rows: Its rows.
        size_of: Returns width and height in pixels of the image with a name; None if it does not exist.

    Raises:
        ConfigurationError: An image is missing, or a box is not within its image.
    """
    sizes = {name: size_of(name) for name in dict.fromkeys(row.image for row in rows)}
    if missing := [row for row in rows if sizes[row.image] is None]:
        lost = sum(size is None for size in sizes.values())
        raise _faulty(
            path,
            missing,
            f"{lost} of {len(sizes)} images are missing",
            "Give the folder that they are in as data.datamodule.images=FOLDER, relative to path, and a suffix that "
            "the table leaves out as data.datamodule.suffix=.jpg",
        )
    if outside := [row for row in rows if not _within(row.box, sizes[row.image])]:
        sides = " x ".join(map(str, sizes[outside[0].image] or ()))
        raise _faulty(
            path,
            outside,
            f"a box is not within its image, which is {sides} pixels",
            "Boxes are in pixels from the upper left corner of the image's file",
        )


def _names(columns: Mapping[str, str] | None) -> dict[str, str]:
    given = dict(columns or {})
    if unknown := given.keys() - set(COLUMNS):
        raise ConfigurationError(
            f"columns has the unknown keys {', '.join(sorted(map(str, unknown)))}: use {', '.join(COLUMNS)}, each with "
            "the name that the file has for it."
        )
    return {column: given.get(column) or column for column in COLUMNS}


def _row(path: Path, line: int, entry: Mapping[str, str | None], names: Mapping[str, str]) -> Row:
    values = {column: (entry.get(name) or "").strip() for column, name in names.items()}
    if values["split"] not in SPLITS:
        raise ConfigurationError(
            f"{path}, line {line}: the split is {values['split']!r}, and must be one of {', '.join(SPLITS)}."
        )
    for column in ("image", "label"):
        if not values[column]:
            raise ConfigurationError(f"{path}, line {line}: the {column} in column {names[column]!r} is missing.")
    edges = [_number(path, line, names[column], values[column]) for column in COLUMNS[3:]]
    left, upper, right, lower = edges
    return Row(line, values["split"], values["image"], values["label"], (left, upper, right, lower))


def _number(path: Path, line: int, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigurationError(f"{path}, line {line}: {name} is {value!r}, and must be a number of pixels.")
    return number


def _check_splits(path: Path, rows: Sequence[Row]) -> None:
    for split in SPLITS:
        if not any(row.split == split for row in rows):
            raise ConfigurationError(f"{path} has no box of the split {split}: each of {', '.join(SPLITS)} needs some.")
    home: dict[str, str] = {}
    if moved := [row for row in rows if home.setdefault(row.image, row.split) != row.split]:
        raise _faulty(path, moved, "an image is in two splits", "Give it to one of them")
    trained = {row.label for row in rows if row.split == "train"}
    if strange := [row for row in rows if row.label not in trained]:
        raise _faulty(
            path, strange, f"the label {strange[0].label!r} is not in the split train", "Correct it, or leave it out"
        )


def _within(box: tuple[float, float, float, float], size: tuple[int, int] | None) -> bool:
    width, height = size or (0, 0)
    left, upper, right, lower = box
    return left >= 0 and upper >= 0 and right <= width and lower <= height


def _faulty(path: Path, rows: Sequence[Row], what: str, instead: str) -> ConfigurationError:
    return ConfigurationError(f"{path}: {what}. {'; '.join(_shown(rows))}. {instead}.")


def _shown(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows[:SHOWN]:
        edges = ", ".join(f"{edge:g}" for edge in row.box)
        yield f"line {row.line}: {row.label} at {edges} in {row.image}"
    if len(rows) > SHOWN:
        yield f"and {len(rows) - SHOWN} more rows"
