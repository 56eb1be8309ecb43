"""Reading a run from the folder of an offline W&B run, with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qat_lightning.compare.run import Curve, Run, curves_of, numbers, without_media
from qat_lightning.errors import RunFileError

STEP = "trainer/global_step"  # WandbLogger's own axis
LAYERS = "quant/layers"  # the table of QuantizationMonitor
_INCOMPLETE = "incomplete .wandb file"


def read_offline(folder: Path) -> Run:
    """Read an offline W&B run.

    Args:
        folder: The ``offline-run-…`` folder (or ``run-…``, which W&B writes while online).

    Returns:
        The run. One that did not end is ``unfinished``, with the values logged so far.

    Raises:
        RunFileError: W&B cannot read it; the message has W&B's reason.
    """
    records = list(_records(folder))
    run: dict[str, Any] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records:
        record_type = record["type"]
        body = record.get(record_type) or {}
        if record_type == "run":
            run |= body
        if record_type in ("run", "config"):
            config |= (body.get("config", body)).get("update") or {}
        elif record_type == "summary":
            summary |= body.get("update") or {}
    if not run:
        raise RunFileError(f"{folder} holds no run: W&B wrote nothing into it before it was stopped.")
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = {key: value for row in rows for key, value in row.items()} | summary
    ends = [record["exit"] for record in records if record["type"] == "exit"]
    code = ends[-1].get("exit_code", 0) if ends else None
    return Run(
        name=run.get("display_name") or run["run_id"],
        folder=str(folder),
        status="unfinished" if code is None else "failed" if code else "finished",
        config={key: value for key, value in config.items() if not key.startswith("_wandb")},
        metrics=numbers({key: value for key, value in without_media(logged).items() if not key.startswith("_")}),
        curves=curves_of(map(without_media, rows), STEP),
        layers=read_layers(folder / "files", logged),
        seconds=ends[-1].get("runtime") if ends else None,
        reason="" if code == 0 else f"it ended with code {code}" if code else "it was stopped, or is still running",
        wandb_id=run["run_id"],
    )


def join(parts: list[Run]) -> Run:
    """Merge the parts of one run that was stopped and resumed with the same id.

    Args:
        parts: The parts in chronological order.

    Returns:
        The last part, with the curves of all parts; where steps were repeated, the later part is used.
    """
    last = parts[-1]
    curves: dict[str, Curve] = {}
    for part in parts:
        for key, curve in part.curves.items():
            before = curves.get(key, Curve([], []))
            kept = [pair for pair in zip(*before, strict=True) if pair[0] < curve.steps[0]]
            pairs = kept + list(zip(*curve, strict=True))
            curves[key] = Curve([step for step, _ in pairs], [value for _, value in pairs])
    metrics = {key: value for part in parts for key, value in part.metrics.items()}
    config = {key: value for part in parts for key, value in part.config.items()}
    return Run(**(vars(last) | {"curves": curves, "metrics": metrics, "config": config}))


def read_layers(files: Path, logged: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Read the per-layer table of a run, if it logged one and the file still exists.

    Args:
        files: The folder ``files`` of the run.
        logged: All logged values; W&B stores the table's path as ``quant/layers.path`` or nested.
    """
    nested = logged.get(LAYERS)
    name = nested.get("path") if isinstance(nested, Mapping) else logged.get(f"{LAYERS}.path")
    path = files / str(name)
    if not name or not path.is_file() or not path.resolve().is_relative_to(files.resolve()):
        return ()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return tuple(dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is not a W&B table, so the layers of this run are not shown: {error}", stacklevel=2)
        return ()


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode and _INCOMPLETE not in done.stdout + done.stderr:
        said = (done.stderr or done.stdout).strip().splitlines()
        old = "No such command" in done.stderr
        hint = " Install a wandb that has `wandb leet inspect`: pip install -U wandb." if old else ""
        raise RunFileError(f"W&B cannot read {folder}: {said[-1] if said else 'it says nothing'}.{hint}")
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # the output for an interrupted run ends with a message
            yield json.loads(line)
