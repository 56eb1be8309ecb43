"""One run in a comparison, read from W&B, CSV logs, or the folder of a Hydra trial."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qat_lightning.compare.ladder import Ladder

Status = Literal["finished", "unfinished", "pruned", "failed", "skipped", "unreadable"]


class Curve(NamedTuple):
    """One metric over a run: optimizer steps, and the value logged at each."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A run as used in comparisons.

    Args:
        name: Its name in the logger, otherwise the name of its folder.
        folder: Its folder, or its address in W&B.
        status: ``unfinished``: still running or killed; ``pruned``: stopped early because it was not promising.
        config: The whole configuration, nested.
        metrics: Result of `qat_lightning.run.evaluate.evaluate_variants`, as far as it was logged.
        overrides: Overrides on the command line, as ``key=value``.
        curves: Metrics logged during training, by name.
        layers: The per-layer table, one mapping per layer.
        seconds: Duration of the run.
        reason: Why it is not ``finished``.
        wandb_id: Its id in W&B.
        model_file: Path of the saved int8 network.
        ladder: Log of the search for a target, with ``method=auto``.
    """

    name: str
    folder: str
    status: Status = "finished"
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()
    seconds: float | None = None
    reason: str = ""
    wandb_id: str = ""
    model_file: str = ""
    ladder: Ladder | None = None


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a mapping, with nested keys as ``key.inner``.

    Example:
        >>> numbers({"int8/test/acc": 0.98, "name": "x", "val/acc": {"max": 1}, "loss": float("nan"), "ok": True})
        {'int8/test/acc': 0.98, 'val/acc.max': 1.0}
    """
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[str(key)] = float(value)
    return found


def without_media(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return logged values without tables, images and other files, whose sizes are no metrics.

    W&B stores a file as a mapping with ``_type``, or as flat keys such as ``key._type``.

    Example:
        >>> without_media({"acc": 0.9, "table": {"_type": "table-file", "nrows": 2}})
        {'acc': 0.9}
        >>> without_media({"acc": 0.9, "table._type": "table-file", "table.nrows": 2})
        {'acc': 0.9}
    """
    files = tuple(key.removesuffix("_type") for key in values if key.endswith("._type"))
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(files) and not (isinstance(value, Mapping) and "_type" in value)
    }


def curves_of(rows: Iterable[Mapping[str, Any]], step_key: str) -> dict[str, Curve]:
    """Convert logged rows to one curve per metric.

    Args:
        rows: Values that were logged together, in order. Rows without a step have that of the previous row.
        step_key: The key of the optimizer step.

    Returns:
        The curves, without the logger's internal values.

    Example:
        >>> curves_of([{"step": 0, "loss": 2.0}, {"loss": 1.5}, {"step": 9, "loss": 1.0, "acc": 0.5}], "step")
        {'loss': Curve(steps=[0.0, 0.0, 9.0], values=[2.0, 1.5, 1.0]), 'acc': Curve(steps=[9.0], values=[0.5])}
    """
    curves: dict[str, Curve] = {}
    step = 0.0
    for row in rows:
        logged = numbers(row)
        step = logged.get(step_key, step)
        for key, value in logged.items():
            if key not in (step_key, "epoch", "step") and not key.startswith("_"):
                curve = curves.setdefault(key, Curve([], []))
                curve.steps.append(step)
                curve.values.append(value)
    return curves
