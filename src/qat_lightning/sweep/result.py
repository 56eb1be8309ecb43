"""What a trial leaves in its folder: how it ended, and with which figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json, write_json

FILE = "result.json"
IDENTITY = "trial.json"
"""What a trial is, and what it began with: its overrides, the id of its W&B run, the checkpoint it goes on from."""
STATUSES = ("completed", "pruned", "skipped", "failed")
DONE = ("completed", "pruned", "skipped")
"""How a trial ends that needs not be run again."""


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended. The file ``result.json`` in its folder holds just these fields.

    Attributes:
        status: ``"completed"``, ``"pruned"`` (stopped early, with figures), ``"skipped"`` (its settings do not go
            together) or ``"failed"``.
        overrides: Hydra's overrides of the trial.
        metrics: What `evaluate_variants` returned; empty if it did not get so far.
        fit_metrics: What the fit had logged when it ended, for example ``val/acc``.
        objective: What the sweeper is told, if it was asked for something.
        seconds: How long the trial took.
        error: ``type`` and ``message`` of what went wrong, or why the trial was skipped or pruned.
        wandb: ``id`` and ``dir`` of the W&B run, if there is one.

    Raises:
        ConfigurationError: There is no such status.

    Example:
        >>> TrialResult("completed", ["seed=1"], {"int8/test/acc": 0.98}, seconds=12.5).status
        'completed'
    """

    status: str
    overrides: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    fit_metrics: dict[str, float] = field(default_factory=dict)
    objective: list[float] | None = None
    seconds: float = 0.0
    error: dict[str, str] | None = None
    wandb: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigurationError(f"status={self.status!r} is not possible: use one of {', '.join(STATUSES)}.")

    @property
    def done(self) -> bool:
        """Whether the trial needs not be run again."""
        return self.status in DONE

    def write(self, folder: Path) -> None:
        """Write ``result.json`` into the trial's folder: whole, or not at all.

        JSON has no infinity: the SQNR of equal outputs is written as `EQUAL_DB`, as in the loggers; NaN as null.
        """
        fields = dataclasses.asdict(self)
        fields |= {name: _finite(fields[name]) for name in ("metrics", "fit_metrics")}
        write_json(folder / FILE, fields)

    @classmethod
    def read(cls, folder: Path) -> TrialResult | None:
        """The result in a trial's folder; None where there is none.

        Raises:
            ConfigurationError: The file is of something else.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise ConfigurationError(f"{path} is not the result of a trial ({error}): remove it.") from error


def identity(overrides: Iterable[Any]) -> list[str]:
    """The overrides that make a trial what it is: all but those that only say how it is run.

    Example:
        >>> identity(["mode=fx", "resume=true"])
        ['mode=fx']
    """
    return [str(word) for word in overrides if str(word).lstrip("+").partition("=")[0] not in ("resume", "isolate")]


def written(overrides: Any) -> list[str]:
    """The overrides as they were written: iterating over them would resolve a reference like ``x=${seed}``."""
    words = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    assert isinstance(words, list)
    return [str(word) for word in words]


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    if not metrics:
        return {}
    from qat_lightning.numerics.sqnr import EQUAL_DB  # torch comes with it

    return {
        name: value if math.isfinite(value) else None if math.isnan(value) else math.copysign(EQUAL_DB, value)
        for name, value in metrics.items()
    }
