"""A ladder as its file holds it: what was tried to reach a target, what it cost and what it brought."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat_lightning.errors import RunFileError

FOLDER = "ladder"
"""Where ``method=auto`` of train.py keeps a ladder, in the folder of the run."""

FILE = "ladder.json"


@dataclass(frozen=True)
class LadderRow:
    """One rung.

    Attributes:
        rung: Its name.
        tried: What it tried, in words.
        drop: Mean loss against float on the validation data, in the unit that is shown; None without a network.
        low: Of the interval; None where it has no end, or there is no network.
        high: Likewise.
        speedup: Times faster than float; None where it is not known.
        size_mb: Of what is shipped; likewise.
        minutes: That it took.
        verdict: In few words.
        chosen: Whether it is what is kept.
    """

    rung: str
    tried: str
    drop: float | None
    low: float | None
    high: float | None
    speedup: float | None
    size_mb: float | None
    minutes: float
    verdict: str
    chosen: bool


@dataclass(frozen=True)
class Ladder:
    """What was tried, in its order.

    Attributes:
        target: In words.
        metric: What the drop is of.
        drop_unit: ``pp``, or nothing.
        rows: The rungs.
        conclusion: What came of it.
    """

    target: str
    metric: str
    drop_unit: str
    rows: tuple[LadderRow, ...]
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ladder:
        """Undo `to_dict`."""
        return cls(**{**values, "rows": tuple(LadderRow(**row) for row in values["rows"])})


def holds_ladder(folder: Path) -> bool:
    """Whether a folder is that of a ladder."""
    return (folder / FILE).is_file()


def read_ladder(folder: Path) -> Ladder | None:
    """The ladder of a run's folder; None if there is none.

    Raises:
        RunFileError: The file is of something else.
    """
    path = folder / FOLDER / FILE
    if not holds_ladder(path.parent):
        return None
    try:
        return Ladder.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFileError(f"{path} is not a ladder: {error}") from error
