"""Reserving a folder for each run: never shared with another run, and never overwritten."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json
from qat_lightning.run.mistakes import in_one_panel
from qat_lightning.sweep.result import FILE, IDENTITY, TrialResult, identity, written

LOCK = "running.lock"

_held: list[FileLock] = []  # held until the process ends, however it ends


class RunFolder(Callback):
    """Reserves a separate folder for each run, before anything is written to it.

    Hydra gives two runs that start in the same second the same folder: the second one gets a new one, with ``-2``
    appended. A folder requested by ``hydra.run.dir=`` is refused if it already contains a run, unless ``resume=true``
    continues that run.

    Goes into ``hydra.callbacks``.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder, or refuse it."""
        if _follows_another_process():  # which has reserved the folder
            return
        with in_one_panel():
            folder = Path(str(config.hydra.run.dir))
            resumes = config.resume and (folder / IDENTITY).is_file()
            if not _was_given(config, "hydra.run.dir") and not resumes:
                folder = unused(folder)
            hold(folder, "hydra.run.dir")
            check_run_folder(folder, identity(written(config.hydra.overrides.task)), resume=config.resume)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = str(folder)
            if resumes:  # a resumed run keeps its original configuration and results
                config.hydra.output_subdir = None


def sweep_folder_of_its_own(config: DictConfig, folder: Path) -> Path:
    """Reserve the folder of a sweep, as `RunFolder` does for a run; its trials are checked elsewhere.

    Args:
        config: The sweep's composed configuration, changed if another folder is used.
        folder: The folder that Hydra would use.

    Raises:
        ConfigurationError: Another sweep is running in it.
    """
    if not _was_given(config, "hydra.sweep.dir") and not config.resume:
        folder = unused(folder)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(folder)
            # The configuration of each trial is composed again, from the overrides.
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
    hold(folder, "hydra.sweep.dir")
    return folder


def _follows_another_process() -> bool:
    """Whether this is a process of a distributed run other than the first."""
    if not {"RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"} & os.environ.keys():
        return False  # determined without Lightning, which imports torch
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) > 0


def unused(folder: Path) -> Path:
    """Create a folder that does not exist yet: ``folder``, or with the first free number appended.

    Creating a folder is atomic, so only one of several processes gets it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("there is always a further number")


def hold(folder: Path, key: str) -> None:
    """Keep other processes out of a folder until this one ends.

    Raises:
        ConfigurationError: Another process uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigurationError(
            f"Another process is running in {folder}: wait until it ends, or give another {key}=."
        ) from error
    _held.append(lock)


def check_run_folder(folder: Path, overrides: list[str], *, resume: bool) -> None:
    """Refuse a folder in which a run would be overwritten.

    Args:
        folder: The run's folder.
        overrides: The overrides of the run, from `identity`.
        resume: Whether to continue the existing run.

    Raises:
        ConfigurationError: It contains a run and `resume` was not requested, or it is another run.
    """
    begun = folder / IDENTITY
    if not begun.is_file() and not (folder / FILE).is_file():
        return
    if not resume:
        result = TrialResult.read(folder)
        state = result.status if result else "not finished"
        raise ConfigurationError(
            f"{folder} already holds a run ({state}): resume=true continues it, and another hydra.run.dir= starts a "
            "new one."
        )
    was = read_json(begun)["overrides"] if begun.is_file() else []
    if was != overrides:
        raise ConfigurationError(
            f"The run in {folder} was started with {' '.join(was) or 'no settings'}, and this one with "
            f"{' '.join(overrides) or 'none'}: resume=true needs the same command; for another run give "
            "another hydra.run.dir=."
        )


def _was_given(config: DictConfig, key: str) -> bool:
    return any(word.lstrip("+").partition("=")[0] == key for word in written(config.hydra.overrides.hydra))
