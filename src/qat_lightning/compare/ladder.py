"""The log of a search for a target (`reach`) as stored in its file: steps tried, their cost and result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat_lightning.errors import RunFileError

FOLDER = "ladder"
"""Name of the file with the search's log, in a run's folder, as written by ``method=auto`` of train.py."""

FILE = "ladder.json"


@dataclass(frozen=True)
class LadderRow:
    """One step (rung) of the search.

    Attributes:
        rung: Its name.
        tried: Description of what it tried.
        drop: Mean drop relative to float on the validation data, in the displayed unit; None without a network.
        low: Lower end of the confidence interval; None if it is unbounded, or without a network.
        high: Upper end, likewise.
        speedup: Float latency divided by its latency; None if unknown.
        size_mb: Size of the deployed file; None if unknown.
        minutes: Duration.
        verdict: The result in a few words.
        chosen: Whether it was chosen.
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
    """All steps of a search, in order.

    Attributes:
        target: Description of the target.
        metric: The metric that the drop refers to.
        drop_unit: ``pp``, or empty.
        rows: The steps.
        conclusion: The outcome.
        sources: The source of the error, in words; empty if it was not measured.
    """

    target: str
    metric: str
    drop_unit: str
    rows: tuple[LadderRow, ...]
    conclusion: str
    sources: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ladder:
        """Create from the result of `to_dict`."""
        return cls(**{**values, "rows": tuple(LadderRow(**row) for row in values["rows"])})


def holds_ladder(folder: Path) -> bool:
    """Whether a folder contains the log of a search."""
    return (folder / FILE).is_file()


def read_ladder(folder: Path) -> Ladder | None:
    """Read the log of a search from a run's folder; None if there is none.

    Raises:
        RunFileError: The file has other content.
    """
    path = folder / FOLDER / FILE
    if not holds_ladder(path.parent):
        return None
    try:
        return Ladder.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFileError(f"{path} is not the result of a search: {error}") from error
