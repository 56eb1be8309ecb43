"""Reading a run from the folder of Lightning's CSVLogger."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qat_lightning.callbacks.quantization_monitor import FILE as LAYERS
from qat_lightning.compare.bare import was_tested
from qat_lightning.compare.run import Run, curves_of, numbers
from qat_lightning.errors import RunFileError

METRICS = "metrics.csv"
_HPARAMS = "hparams.yaml"


def read_csv(folder: Path) -> Run:
    """Read the files of a CSVLogger.

    Args:
        folder: The folder with ``metrics.csv``, and ``hparams.yaml`` if there is one.

    Returns:
        The run. CSV files do not tell whether a run has ended: without test metrics it is ``unfinished``.

    Raises:
        RunFileError: A file cannot be read.
    """
    rows = list(_rows(folder / METRICS))
    metrics = {key: value for row in rows for key, value in row.items() if key != "step"}
    tested = was_tested(metrics)
    return Run(
        name=folder.name,
        folder=str(folder),
        status="finished" if tested else "unfinished",
        config=read_yaml(folder / _HPARAMS) if (folder / _HPARAMS).is_file() else {},
        metrics=metrics,
        curves=curves_of(rows, "step"),
        layers=_last(list(_table(folder / LAYERS))),
        reason="" if tested else "it was not tested: it was stopped, or is still running",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping of plain data from YAML.

    Python objects among the values, as Lightning stores hyperparameters such as a path or a class, become text: nothing
    is imported or created.

    Raises:
        RunFileError: The file is not YAML, or does not contain a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError) as error:
        raise RunFileError(f"{path} cannot be read: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise RunFileError(f"{path} is not a mapping of settings.")
    return content or {}


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """Reads Python objects as text, and NumPy's numbers as numbers."""


def _without_python(loader: Any, suffix: str, node: Any) -> Any:
    """Return plain data for a Python object: its values, and the name of its class or function."""
    name = suffix.rpartition(":")[2]
    if isinstance(node, yaml.ScalarNode):
        return node.value or name
    is_mapping = isinstance(node, yaml.MappingNode)
    values = loader.construct_mapping(node, deep=True) if is_mapping else loader.construct_sequence(node, deep=True)
    match name.rpartition(".")[2], values:
        case (("tuple" | "list" | "dict"), _):
            return values
        case "dtype", {"args": [kind, *_]}:
            return kind
        case "scalar", [str(kind), bytes(content)]:
            return np.frombuffer(content, kind)[0].item()
    return f"{name} {values}"


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _without_python)


def _last(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the rows of the last measured step."""
    return tuple(
        {k: v for k, v in row.items() if k != "step"} for row in rows if row.get("step") == rows[-1].get("step")
    )


def _rows(path: Path) -> Iterator[dict[str, float]]:
    for row in _table(path):
        yield numbers(row)


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file, with numbers parsed and empty cells omitted; nothing if there is no file."""
    if not path.is_file():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {key: _value(text) for key, text in row.items() if key and text}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunFileError(f"{path} cannot be read: {error}") from error


def _value(text: str) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
