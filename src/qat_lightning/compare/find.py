"""Finding runs below given paths: trials of Hydra, offline W&B runs and CSV logs."""

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
from qat_lightning.sweep.result import identity

HYDRA = ".hydra"
_STATUS: dict[str, Status] = {"completed": "finished", "pruned": "pruned", "skipped": "skipped", "failed": "failed"}
_NOT_RUNS = (HYDRA, "checkpoints", "latest-run")  # besides backups of a restarted trial: `earlier-1`


@dataclass
class _Place:
    """A folder that is one run, and the folders of its loggers."""

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
    # W&B's reader runs as a separate process
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        runs = pool.map(_read_or_report, places.values())
        return _named_apart(zip(places.values(), runs, strict=True))


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
    """Whether to search a folder for runs; not a run's own subfolders, such as the search's rungs (one table)."""
    return folder.name not in _NOT_RUNS and not folder.name.startswith("earlier-") and not holds_ladder(folder)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _read_or_report(place: _Place) -> Run:
    try:
        return _read(place)
    except RunFileError as error:
        return Run(name=place.folder.name, folder=str(place.folder), status="unreadable", reason=str(error))


def _read(place: _Place) -> Run:
    result = _result(place.folder / RESULT)
    logged = _logged(place, str((result.get("wandb") or {}).get("id", "")), needed=not result)
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
        overrides=tuple(identity(overrides)),
    )
    run = replace(run, ladder=read_ladder(place.folder))
    return _with_file(_with_result(run, result) if result else run, place.folder / INT8_FILE)


def _with_file(run: Run, path: Path) -> Run:
    """Add the saved int8 network, and its file size if no other int8 size was measured."""
    if not path.is_file():
        return run
    size = {"int8/size_mb": path.stat().st_size / 1e6}
    tested = any(key.startswith("int8/") for key in run.metrics)
    return replace(run, model_file=str(path), metrics={**(size if tested else {}), **run.metrics})


def _logged(place: _Place, wandb_id: str, *, needed: bool) -> Run | None:
    """Return what the loggers stored, W&B before CSV because it has more; of several runs in a folder, the last.

    Args:
        place: The folder of the run.
        wandb_id: The id of the run in W&B, if it is known.
        needed: Whether nothing else is known about the run, so that it is an error if W&B stored nothing readable.
    """
    parts = _readable(place.wandb, needed=needed and not place.csv)
    if parts:
        wanted = wandb_id if any(part.wandb_id == wandb_id for part in parts) else parts[-1].wandb_id
        return join([part for part in parts if part.wandb_id == wanted])
    if place.csv:
        run = read_csv(max(place.csv, key=lambda folder: (folder / METRICS).stat().st_mtime))
        return replace(run, name=place.folder.name) if place.is_trial else run
    return None


def _readable(folders: Sequence[Path], *, needed: bool) -> list[Run]:
    """Return the W&B runs in chronological order, without those that cannot be read, as after an early kill."""
    parts, faults = [], []
    for folder in sorted(folders, key=_when):
        try:
            parts.append(read_offline(folder))
        except RunFileError as error:
            faults.append(error)
    if faults and needed and not parts:
        raise faults[-1]
    return parts


def _when(folder: Path) -> str:
    """Sort key: the time at which W&B made the folder ``run-…`` or ``offline-run-…``, which is in its name."""
    return folder.name.removeprefix("offline-")


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
    """Return the configuration that Hydra saved, with references resolved where possible outside the run."""
    if not path.is_file():
        return {}
    return _resolved(OmegaConf.create(read_yaml(path)))


def _of_both(logged: Mapping[str, Any], hydra: dict[str, Any]) -> Mapping[str, Any]:
    """Return Hydra's configuration, unless the logged one contains all of it, possibly changed by the run.

    The logger of a user's own program may contain only hyperparameters of the LightningModule, which can be the same in
    all trials of a sweep. Settings logged by the callback are included in any case.
    """
    if not hydra:
        return logged
    if hydra.keys() <= logged.keys():
        return {key: _as_written(value, hydra.get(key)) for key, value in logged.items()}
    return {**{key: value for key, value in logged.items() if key.startswith(QUANTIZATION)}, **hydra}


def _as_written(logged: Any, written: Any) -> Any:
    """Return a logged value, as Hydra's configuration has it if they are equal: W&B stores 1.0 as 1."""
    if isinstance(logged, Mapping) and isinstance(written, Mapping):
        return {key: _as_written(value, written.get(key)) for key, value in logged.items()}
    return written if logged == written else logged


def _resolved(node: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key in node:
        try:
            value = node[key]
        except OmegaConfBaseException:  # ${hydra:…} and ??? cannot be resolved here, and are not settings
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


def _named_apart(found: Iterable[tuple[_Place, Run]]) -> list[Run]:
    """Return each run once, although some were read in several parts or from several paths, with the same W&B id."""
    same: dict[str, list[tuple[_Place, Run]]] = {}
    for place, run in found:
        same.setdefault(run.wandb_id or str(place.folder.resolve()), []).append((place, run))
    return [_one(parts) for parts in same.values()]


def _one(parts: Sequence[tuple[_Place, Run]]) -> Run:
    """Return a trial, which has all that was logged in it; of a run that is no trial, all parts."""
    trials = [run for place, run in parts if place.is_trial]
    if trials:
        return max(trials, key=lambda run: bool(run.overrides))
    # a copy that was made while the run was going on comes before the whole
    ordered = sorted(parts, key=lambda part: (_when(part[0].folder), part[1].status != "unfinished"))
    return join([run for _, run in ordered])
