"""Find the runs below some paths: trials of Hydra, offline W&B runs and CSV logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_lightning.callbacks.parts.settings_log import PREFIX as QUANTIZATION
from qat_lightning.compare.csv_run import METRICS, read_csv, read_yaml
from qat_lightning.compare.ladder import holds_ladder, read_ladder
from qat_lightning.compare.offline import join, read_offline
from qat_lightning.compare.run import Run, Status, numbers
from qat_lightning.errors import RunFileError
from qat_lightning.run.app import INT8_FILE
from qat_lightning.sweep.result import FILE as RESULT

HYDRA = ".hydra"
_STATUS: dict[str, Status] = {"completed": "finished", "pruned": "pruned", "skipped": "skipped", "failed": "failed"}
_NOT_RUNS = (HYDRA, "checkpoints", "latest-run")  # and what a trial put aside: `earlier-1`


@dataclass
class _Place:
    """A folder that is one run, and where its loggers wrote."""

    folder: Path
    is_trial: bool
    wandb: list[Path] = field(default_factory=list)
    csv: list[Path] = field(default_factory=list)


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read every run below the paths.

    A folder with ``.hydra`` or ``result.json`` is one run, including the logs in it. W&B runs and CSV logs elsewhere
    are runs of their own. A run that cannot be read is returned as ``unreadable`` with the reason.

    Args:
        paths: Multirun folders, folders of single runs, W&B folders, folders of CSV logs.

    Returns:
        The runs in the order of their folders (trial 2 before trial 10), without duplicates.

    Raises:
        RunFileError: A path does not exist, or there is no run at all below it.
    """
    places: dict[Path, _Place] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise RunFileError(
                f"{path} does not exist. Expected a folder of runs, such as multirun/2026-01-31/12-00-00."
            )
        found = _places(path if path.is_dir() else path.parent)
        if not found:
            raise RunFileError(
                f"There is no run in {path}: no {HYDRA} folder, no {RESULT}, no offline W&B run and no {METRICS} in it."
            )
        places |= {place.folder.resolve(): place for place in found}
    # W&B's reader is a process of its own
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return _named_apart(list(pool.map(_read_or_say_why, places.values())))


def _places(top: Path) -> list[_Place]:
    places: dict[Path, _Place] = {}
    for name, folders, files in os.walk(top):
        folder = Path(name)
        trial = next((places[above] for above in (folder, *folder.parents) if above in places), None)
        if HYDRA in folders or RESULT in files:
            trial = places[folder] = _Place(folder, is_trial=True)
        if any(file.startswith("run-") and file.endswith(".wandb") for file in files):
            (trial or places.setdefault(folder, _Place(folder, is_trial=False))).wandb.append(folder)
        elif METRICS in files:
            (trial or places.setdefault(folder, _Place(folder, is_trial=False))).csv.append(folder)
        folders[:] = sorted((f for f in folders if _may_hold_runs(folder / f)), key=_natural)
    return [place for place in places.values() if place.is_trial or place.wandb or place.csv]


def _may_hold_runs(folder: Path) -> bool:
    """Not what a run keeps for itself, the rungs of a ladder among it, which are shown as one table."""
    return folder.name not in _NOT_RUNS and not folder.name.startswith("earlier-") and not holds_ladder(folder)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _read_or_say_why(place: _Place) -> Run:
    try:
        return _read(place)
    except RunFileError as error:
        return Run(name=place.folder.name, folder=str(place.folder), status="unreadable", reason=str(error))


def _read(place: _Place) -> Run:
    result = _result(place.folder / RESULT)
    logged = _logged(place, str((result.get("wandb") or {}).get("id", "")))
    if not place.is_trial and logged is not None:
        return logged
    run = logged or Run(
        name=place.folder.name,
        folder=str(place.folder),
        status="unfinished",
        reason="it logged nothing and has no result",
    )
    hydra = place.folder / HYDRA
    overrides = tuple(result.get("overrides") or _overrides(hydra / "overrides.yaml"))
    run = replace(
        run,
        folder=str(place.folder),
        config=_of_both(run.config, _config(hydra / "config.yaml")),
        overrides=tuple(str(word) for word in overrides),
    )
    run = replace(run, ladder=read_ladder(place.folder))
    return _with_file(_with_result(run, result) if result else run, place.folder / INT8_FILE)


def _with_file(run: Run, path: Path) -> Run:
    """The saved int8 network, whose size is that of int8 where no other was measured."""
    if not path.is_file():
        return run
    size = {"int8/size_mb": path.stat().st_size / 1e6}
    tested = any(key.startswith("int8/") for key in run.metrics)
    return replace(run, model_file=str(path), metrics={**(size if tested else {}), **run.metrics})


def _logged(place: _Place, wandb_id: str) -> Run | None:
    """What the loggers kept: W&B, which has most, before CSV. Of several runs in one folder, the last."""
    if place.wandb:
        parts = [read_offline(folder) for folder in sorted(place.wandb, key=lambda folder: folder.name)]
        wanted = wandb_id if any(part.wandb_id == wandb_id for part in parts) else parts[-1].wandb_id
        return join([part for part in parts if part.wandb_id == wanted])
    if place.csv:
        run = read_csv(max(place.csv, key=lambda folder: (folder / METRICS).stat().st_mtime))
        return replace(run, name=place.folder.name) if place.is_trial else run
    return None


def _with_result(run: Run, result: dict[str, Any]) -> Run:
    status = _STATUS.get(str(result.get("status")), "failed")
    seconds = numbers({"seconds": result.get("seconds")}).get("seconds", run.seconds)
    metrics = {**run.metrics, **numbers(result.get("metrics") or {})}
    error = result.get("error") or run.reason or "it does not say why"
    reason = ": ".join(map(str, error.values())) if isinstance(error, dict) else str(error)
    reason = "" if status == "finished" else reason
    return replace(run, status=status, seconds=seconds, reason=reason, metrics=metrics)


def _result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunFileError(f"{path} holds no result of a trial.")
    return content


def _overrides(path: Path) -> Sequence[str]:
    try:
        return [str(word) for word in OmegaConf.load(path)] if path.is_file() else []
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise RunFileError(f"{path} cannot be read: {error}") from error


def _config(path: Path) -> dict[str, Any]:
    """The configuration as Hydra kept it, with every reference resolved that means something outside of the run."""
    if not path.is_file():
        return {}
    return _resolved(OmegaConf.create(read_yaml(path)))


def _of_both(logged: Mapping[str, Any], hydra: dict[str, Any]) -> Mapping[str, Any]:
    """What Hydra composed, unless the logger holds all of it, as the run changed it.

    A logger of somebody's own program holds hyperparameters of the LightningModule, say, which are the same in all
    trials of a sweep over something else. What the callback said of itself is there in any case.
    """
    if not hydra or hydra.keys() <= logged.keys():
        return logged
    return {**{key: value for key, value in logged.items() if key.startswith(QUANTIZATION)}, **hydra}


def _resolved(node: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key in node:
        try:
            value = node[key]
        except OmegaConfBaseException:  # ${hydra:…} and ??? mean nothing here, and are no setting
            continue
        plain[str(key)] = _resolved(value) if OmegaConf.is_dict(value) else _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if not OmegaConf.is_config(value):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(value, resolve=False)


def _named_apart(runs: list[Run]) -> list[Run]:
    """Leave out what was read twice: a run that W&B knows by the same id, from another path."""
    seen: dict[str, Run] = {}
    for run in runs:
        key = run.wandb_id or str(Path(run.folder).resolve())
        if key not in seen or (run.overrides and not seen[key].overrides):
            seen[key] = run
    return list(seen.values())
