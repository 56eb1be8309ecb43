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
    """A run, as a comparison reads it.

    Args:
        name: Name in the logger, else the name of its folder.
        folder: Its folder, or its address in W&B.
        status: ``unfinished`` is a run that is still running or was killed, ``pruned`` one that was not worth
            finishing.
        config: The whole configuration, nested.
        metrics: What `qat_lightning.run.evaluate.evaluate_variants` returned, or as much of it as was logged.
        overrides: Overrides of the command line, as ``key=value``.
        curves: Metrics logged during training, by name.
        layers: The per-layer table, a mapping for each layer.
        seconds: How long the run took.
        reason: Why it is not ``finished``.
        wandb_id: Its id in W&B.
        model_file: The int8 network that it saved.
        ladder: What was tried to reach its target, with ``method=auto``.
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
    """Keep what is a finite number, of nested mappings as ``key.inner``.

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


def curves_of(rows: Iterable[Mapping[str, Any]], step_key: str) -> dict[str, Curve]:
    """Turn logged rows into a curve for each metric.

    Args:
        rows: What was logged together, in order. Rows without a step take that of the row before.
        step_key: The key of the optimizer step.

    Returns:
        Curves of the metrics that are no bookkeeping of the logger and were logged more than once.

    Example:
        >>> curves_of([{"step": 0, "loss": 2.0}, {"loss": 1.5}, {"step": 9, "loss": 1.0, "acc": 0.5}], "step")
        {'loss': Curve(steps=[0.0, 0.0, 9.0], values=[2.0, 1.5, 1.0])}
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
    return {key: curve for key, curve in curves.items() if len(curve.steps) > 1}
