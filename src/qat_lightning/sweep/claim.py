"""A folder for each run: never shared with another one, and never written over."""

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

_held: list[FileLock] = []  # until the process ends, which lets go of them whatever ends it


class RunFolder(Callback):
    """Gives each run a folder of its own, before anything is written to it.

    Two runs that begin in the same second would be given the same folder by Hydra: the second gets one that is not
    there yet, with ``-2`` behind its name. A folder that was asked for, with ``hydra.run.dir=``, is refused where a run
    is in it already, unless ``resume=true`` says to go on with that one.

    Goes into ``hydra.callbacks``.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder, or refuse it."""
        if _follows_another_process():  # which has the folder
            return
        with in_one_panel():
            folder = Path(str(config.hydra.run.dir))
            goes_on = config.resume and (folder / IDENTITY).is_file()
            if not _was_given(config, "hydra.run.dir") and not goes_on:
                folder = unused(folder)
            hold(folder, "hydra.run.dir")
            check_run_folder(folder, identity(written(config.hydra.overrides.task)), resume=config.resume)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = str(folder)
            if goes_on:  # what it began with is what it is: nothing of it is written over, least of all where it ended
                config.hydra.output_subdir = None


def sweep_folder_of_its_own(config: DictConfig, folder: Path) -> Path:
    """Claim the folder of a sweep, as `RunFolder` does with that of a run; its trials are looked into elsewhere.

    Args:
        config: The sweep's composed configuration, which is changed where the folder becomes another one.
        folder: Where Hydra would put the sweep.

    Raises:
        ConfigurationError: Another sweep is running in it.
    """
    if not _was_given(config, "hydra.sweep.dir") and not config.resume:
        folder = unused(folder)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(folder)
            # The configuration of each trial is composed anew, from the overrides.
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
    hold(folder, "hydra.sweep.dir")
    return folder


def _follows_another_process() -> bool:
    """Whether this is a process of a distributed run, and not its first."""
    if not {"RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"} & os.environ.keys():
        return False  # said without Lightning, which brings torch
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) > 0


def unused(folder: Path) -> Path:
    """Make a folder that nobody else has: ``folder``, or with the first number behind it that is free.

    Making a folder is atomic, so that of several processes that want the same, one gets it.
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
        ConfigurationError: Another one is in it.
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
    """Refuse a folder in which a run would be written over.

    Args:
        folder: The run's folder.
        overrides: What the run is, as `identity` says it.
        resume: Whether to go on with what is there.

    Raises:
        ConfigurationError: A run is in it and `resume` was not asked for, or it was another run.
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
