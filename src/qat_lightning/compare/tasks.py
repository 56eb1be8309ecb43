"""The tasks of runs: scores on different data, or by different metrics, do not compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qat_lightning.compare.quantizing import under_one_name
from qat_lightning.compare.run import Run
from qat_lightning.compare.settings import flatten, is_one_of
from qat_lightning.errors import ConfigurationError

# Where configurations name their data, and the metric of their model
_DATA = ("data", "dataset", "datamodule")
_KEYS = (
    *_DATA,
    *(f"{part}.{name}" for part in _DATA for name in ("name", "_target_", "class_path")),
    *("data.datamodule._target_", "data.datamodule.path", "model.metric.name"),
)


@dataclass(frozen=True)
class Task:
    """The data and metric of a run, as far as runs differ in them.

    Args:
        settings: The settings that distinguish it from other tasks; none if all runs are of one task.
    """

    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join(value for _, value in self.settings) or "another"

    @property
    def options(self) -> str:
        """The options with which the command compares only this task."""
        return " ".join(f"--only {f'{key}={value}'!r}" for key, value in self.settings)


ONLY_TASK = Task()
"""The task of runs that differ neither in data nor in metric."""


def tasks_of(runs: Sequence[Run], ignore: Sequence[str] = ()) -> list[Task]:
    """Return the task of each run.

    Args:
        runs: The runs.
        ignore: Globs of settings that do not distinguish tasks.

    Example:
        >>> runs = [Run(name, name, config={"data": {"name": name}}) for name in ("digits", "cifar10")]
        >>> [str(task) for task in tasks_of(runs)]
        ['digits', 'cifar10']
    """
    flat = [flatten(run.config) for run in runs]
    found: list[tuple[tuple[str, str], ...]] = [()] * len(runs)
    for key in _KEYS:
        values = {settings[key] for settings in flat if key in settings}
        if len(values) < 2 or is_one_of(key, ignore):
            continue
        finer = [(*task, *_setting(settings, key)) for task, settings in zip(found, flat, strict=True)]
        found = finer if len({*finer}) > len({*found}) else found
    return [Task(settings) for settings in found]


def _setting(settings: Mapping[str, str], key: str) -> tuple[tuple[str, str], ...]:
    return ((key, settings[key]),) if key in settings else ()


def only(runs: Sequence[Run], wanted: Sequence[str]) -> list[Run]:
    """Return the runs that have all settings.

    Args:
        runs: The runs.
        wanted: Settings as ``key=value``; the value may be a glob.

    Raises:
        ConfigurationError: A setting has another form, or no run has it; the message lists the values.

    Example:
        >>> [run.name for run in only([Run("a", "a", config={"lr": 0.1}), Run("b", "b")], ["lr=0.*"])]
        ['a']
    """
    kept = list(runs)
    for word in wanted:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigurationError(f"--only {word!r} is not a setting: give KEY=VALUE, such as data.name=digits.")
        values = [_value(run, key) for run in kept]
        left = [run for run, own in zip(kept, values, strict=True) if own is not None and fnmatchcase(own, value)]
        if not left:
            there = ", ".join(sorted({own for own in values if own is not None})) or "none"
            raise ConfigurationError(f"--only {word!r}: no run has this setting. Values of {key}: {there}.")
        kept = left
    return kept


def _value(run: Run, key: str) -> str | None:
    flat = flatten(run.config)
    return flat.get(key, under_one_name(flat).get(key))
