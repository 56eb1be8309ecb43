"""A sweep's folder: which trials are planned, and how each stands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json
from qat_lightning.sweep.result import FILE, IDENTITY, TrialResult, identity, written


@dataclass(frozen=True)
class Plan:
    """What a sweep is going to run.

    Attributes:
        total: How many trials; None where the sweeper does not say.
        trials: The overrides of each, where they are known beforehand: for a grid.
    """

    total: int | None
    trials: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, config: DictConfig) -> Plan:
        """The plan of a sweep's composed configuration, with its part ``hydra``."""
        sweeper = config.hydra.sweeper
        if not str(sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
            return cls(sweeper.get("n_trials"))
        words = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*words, *written(config.hydra.overrides.task)])
        (trials,) = BasicSweeper.split_arguments(parsed, None)
        return cls(len(trials), tuple(tuple(identity(trial)) for trial in trials))


@dataclass(frozen=True)
class Standing:
    """How the trials of a sweep stand at one moment.

    Attributes:
        results: The trials that ended, by number.
        running: The numbers of those that began in this launch and have not ended.
        fresh: The numbers of those that were run, and ended, in this launch.
    """

    results: dict[int, TrialResult]
    running: tuple[int, ...]
    fresh: tuple[int, ...]

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(not result.done for result in self.results.values())

    @classmethod
    def of(cls, folder: Path, since: float) -> Standing:
        """Look into a sweep's folder.

        Args:
            folder: The sweep's folder.
            since: When this launch began, as `time.time` says it; what failed before counts as not run yet.
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
        plan: What is going to run in it.
        resume: Whether to go on with what is there.

    Raises:
        ConfigurationError: There are trials and `resume` was not asked for, or they are of another grid.
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
    """Each trial in words: only those overrides that not all of them have.

    Example:
        >>> varying([["mode=fx", "seed=0"], ["mode=fx", "seed=1"]])
        ['seed=0', 'seed=1']
    """
    common = set.intersection(*map(set, trials)) if len(trials) > 1 else set()
    return [" ".join(word for word in trial if word not in common) for trial in trials]


def sweep_folder(config: DictConfig) -> Path:
    """Where a sweep keeps its trials."""
    return Path(str(OmegaConf.select(config, "hydra.sweep.dir")))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -time.time()
