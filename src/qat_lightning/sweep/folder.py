"""A sweep's folder: its planned trials, and their state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json
from qat_lightning.sweep.result import FILE, IDENTITY, TrialResult, identity, written
from qat_lightning.terminal import short_number


@dataclass(frozen=True)
class Plan:
    """The trials that a sweep is going to run.

    Attributes:
        total: Number of trials; None if the sweeper does not tell.
        trials: The overrides of each, if they are known beforehand, as for a grid.
    """

    total: int | None
    trials: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, config: DictConfig) -> Plan:
        """The plan of a sweep's composed configuration, with its part ``hydra``."""
        sweeper = config.hydra.sweeper
        if not is_grid(sweeper):
            return cls(sweeper.get("n_trials"))
        words = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*words, *written(config.hydra.overrides.task)])
        (trials,) = BasicSweeper.split_arguments(parsed, None)
        return cls(len(trials), tuple(tuple(identity(trial)) for trial in trials))


def is_grid(sweeper: DictConfig) -> bool:
    """Whether all trials are known beforehand, which Hydra's own sweeper runs; others choose them by the objective."""
    return str(sweeper._target_).endswith(f".{BasicSweeper.__name__}")


def check_trials(config: DictConfig, plan: Plan, loader: ConfigLoader) -> None:
    """Compose trials, so that a mistake in one is known before the first starts: some that have all overrides.

    Args:
        config: The sweep's composed configuration, with its part ``hydra``.
        plan: The trials that will run.
        loader: Hydra's loader, which composed the configuration.

    Raises:
        ConfigurationError: An option does not exist, a group is null, or an override cannot be applied.
    """
    seen: set[str] = set()
    for trial in plan.trials:
        if seen.issuperset(trial):
            continue
        seen.update(trial)
        _check_groups(trial, loader)
        try:
            loader.load_sweep_config(config, list(trial))
        except (HydraException, OmegaConfBaseException) as error:
            said = str(error).partition("\nConfig search path")[0]
            raise ConfigurationError(f"No trial was started. {' '.join(trial)}: {said}") from error


def _check_groups(trial: Sequence[str], loader: ConfigLoader) -> None:
    """Check that no config group is null, which Hydra's command line does not support."""
    for word in trial:
        group, _, value = word.lstrip("+").partition("=")
        options = loader.get_group_options(group.partition("@")[0]) if value == "null" else []
        if options:
            as_null = [name for name in ("default", "none") if name in options]
            use = f"{group}={as_null[0]} is the same" if as_null else f"use {', '.join(options)}, or leave it out"
            raise ConfigurationError(
                f"No trial was started. {word}: a config group cannot be null on the command line: {use}."
            )


@dataclass(frozen=True)
class Standing:
    """The state of a sweep's trials at one moment.

    Attributes:
        results: Results of finished trials, by number.
        running: Numbers of trials that started in this launch and have not ended.
        fresh: Numbers of trials that started and ended in this launch.
    """

    results: dict[int, TrialResult]
    running: tuple[int, ...]
    fresh: tuple[int, ...]

    @property
    def failed(self) -> int:
        """Number of failed trials."""
        return sum(not result.done for result in self.results.values())

    @classmethod
    def of(cls, folder: Path, since: float) -> Standing:
        """Read the state from a sweep's folder.

        Args:
            folder: The sweep's folder.
            since: Start of this launch, as returned by `time.time`; trials that failed earlier count as not run yet.
        """
        results: dict[int, TrialResult] = {}
        running, fresh = [], []
        for number, trial in numbered(folder):
            result = TrialResult.read(trial)
            now = result is not None and _changed(trial / FILE) >= since
            if result is not None and (result.done or now):
                results[number] = result
                fresh += [number] if now and result.status != "skipped" else []
            elif _changed(trial / ".hydra" / "overrides.yaml") >= since:
                running.append(number)
        return cls(results, tuple(running), tuple(fresh))


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The folders of a sweep's trials, in order of their numbers."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def check_folder(folder: Path, plan: Plan, *, resume: bool) -> None:
    """Refuse a folder whose trials would be overwritten.

    Args:
        folder: The sweep's folder.
        plan: The trials that will run in it.
        resume: Whether to continue the existing sweep.

    Raises:
        ConfigurationError: It contains trials and `resume` was not requested, or they belong to another grid.
    """
    left = [(number, path / IDENTITY) for number, path in numbered(folder) if (path / IDENTITY).is_file()]
    if left and not resume:
        raise ConfigurationError(
            f"{folder} holds {len(left)} trials already: resume=true keeps them and runs only what is missing, and "
            "another hydra.sweep.dir= starts a new sweep."
        )
    for number, path in left:
        was = read_json(path)["overrides"]
        if plan.trials and (number >= len(plan.trials) or list(plan.trials[number]) != was):
            raise ConfigurationError(
                f"Trial {number} in {folder} was {' '.join(was)}, which differs from this sweep: resume=true needs "
                "the command that started it; for other trials give another hydra.sweep.dir=."
            )


def varying(trials: Sequence[Sequence[str]]) -> list[str]:
    """A label for each trial: the overrides in which trials differ; long numbers in short, if that is unambiguous.

    Example:
        >>> varying([["mode=fx", "lr=0.018224988220277075"], ["mode=fx", "lr=0.1"]])
        ['lr=0.018225', 'lr=0.1']
    """
    common = set.intersection(*map(set, trials)) if len(trials) > 1 else set()
    full = [" ".join(word for word in trial if word not in common) for trial in trials]
    short = [" ".join(_in_short(word) for word in trial if word not in common) for trial in trials]
    return short if len({*short}) == len({*full}) else full


def _in_short(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}{equals}{short_number(value)}"


def sweep_folder(config: DictConfig) -> Path:
    """The folder of a sweep's trials."""
    return Path(str(OmegaConf.select(config, "hydra.sweep.dir")))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -time.time()
