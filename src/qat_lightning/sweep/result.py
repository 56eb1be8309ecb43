"""The record of a trial in its folder: how it ended, and its metrics."""

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
"""Keys that identify a trial and its start: its overrides, the id of its W&B run, and the checkpoint to resume from."""
STATUSES = ("completed", "pruned", "skipped", "failed")
DONE = ("completed", "pruned", "skipped")
"""Statuses of trials that need not be run again."""


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended. The file ``result.json`` in its folder contains exactly these fields.

    Attributes:
        status: ``"completed"``, ``"pruned"`` (stopped early, with metrics), ``"skipped"`` (incompatible settings) or
            ``"failed"``.
        overrides: Hydra's overrides of the trial.
        metrics: Result of `evaluate_variants`; empty if the trial ended before that.
        fit_metrics: Metrics logged at the end of the fit, for example ``val/acc``.
        objective: The values for the sweeper, if ``objective=`` was given and the run has these metrics.
        seconds: Duration of the trial.
        error: ``type`` and ``message`` of the error, or why the trial was skipped or pruned, or has no objective.
        wandb: ``id`` and ``dir`` of the W&B run, if there is one.

    Raises:
        ConfigurationError: The status is unknown.

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
            raise ConfigurationError(f"status={self.status!r} is not valid: use one of {', '.join(STATUSES)}.")

    @property
    def done(self) -> bool:
        """Whether the trial need not be run again."""
        return self.status in DONE

    def write(self, folder: Path) -> None:
        """Write ``result.json`` into the trial's folder, atomically.

        JSON has no infinity: the SQNR of equal outputs is written as `EQUAL_DB`, as in the loggers, and other values
        that are not finite as null.
        """
        fields = dataclasses.asdict(self)
        fields |= {name: _finite(fields[name]) for name in ("metrics", "fit_metrics")}
        if self.objective is not None:
            fields["objective"] = [value if math.isfinite(value) else None for value in self.objective]
        write_json(folder / FILE, fields)

    @classmethod
    def read(cls, folder: Path) -> TrialResult | None:
        """Read the result in a trial's folder; None if there is none.

        Raises:
            ConfigurationError: The file has other content.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        fields = read_json(path)
        if fields.get("objective") is not None:
            fields["objective"] = [math.nan if value is None else value for value in fields["objective"]]
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigurationError(f"{path} is not the result of a trial ({error}): remove it.") from error


def identity(overrides: Iterable[Any]) -> list[str]:
    """Return the overrides that identify a trial, without those that only affect how it is run.

    Example:
        >>> identity(["mode=fx", "resume=true"])
        ['mode=fx']
    """
    return [str(word) for word in overrides if str(word).lstrip("+").partition("=")[0] not in ("resume", "isolate")]


def written(overrides: Any) -> list[str]:
    """Return the overrides as written; iterating over them would resolve references like ``x=${seed}``."""
    words = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    assert isinstance(words, list)
    return [str(word) for word in words]


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    if not metrics:
        return {}
    from qat_lightning.numerics.sqnr import finite  # imported here because it imports torch

    return dict.fromkeys(metrics) | finite(metrics)
