"""Settings in which runs differ, and a short label for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qat_lightning.compare.quantizing import NAME, part_of, renamed, under_one_name
from qat_lightning.compare.run import Run
from qat_lightning.run.float_run import OF_QUANTIZATION, OF_SEARCH, OF_THE_LAUNCH
from qat_lightning.terminal import short_number

ABSENT = "–"
"""Represents a setting that a run does not have."""

# Names, folders, resume checkpoints and callbacks that only observe: no result depends on these.
_NO_SETTINGS = (
    *OF_THE_LAUNCH,
    *("paths", "hydra", "*.float_checkpoint", "baseline.folder", "model.metric", "*.labels"),
    *("callbacks.*monitor.*", "callbacks.*progress_bar.*"),
)
_PLACES = ("dirpath", "save_dir", "output_dir", "default_root_dir", "root_dir", "log_dir", "cache_dir", "data_dir")
SEED = "seed"
# 1 and 1.0 differ only here: one epoch or batch, and the share of all
_COUNTS_OR_SHARES = ("start", "freeze_*", "limit_*_batches", "overfit_batches", "val_check_interval")


@dataclass(frozen=True)
class Setting:
    """A setting that differs between runs.

    Args:
        key: Its dotted name in the configuration.
        label: The shortest unambiguous name.
        values: The value in each run as text; `ABSENT` if it has none. Different values have different texts.
    """

    key: str
    label: str
    values: tuple[str, ...]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested configuration; values become text, equal ones the same text.

    Example:
        >>> flatten({"mode": {"name": "fx"}, "start": 0.3, "strides": [1, 2.0], "module": None})
        {'mode.name': 'fx', 'start': '0.3', 'strides': '[1, 2]', 'module': 'null'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(_one_form(key, value), default=str)
    return flat


def _one_form(key: str, value: Any) -> Any:
    """Return a value with whole numbers as integers: W&B stores 1.0 as 1, and a CSV logger does not."""
    if isinstance(value, list | tuple):
        return [_one_form(key, part) for part in value]
    if isinstance(value, Mapping):
        return {name: _one_form(name, part) for name, part in value.items()}
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    is_share = value == 1 and any(fnmatchcase(key, name) for name in _COUNTS_OR_SHARES)
    return int(value) if is_whole and not is_share else value


_EXACT = 2**53  # up to here each whole number has its own float


def settings_of(run: Run, ignore: Sequence[str] = ()) -> dict[str, str]:
    """Return the flat configuration of a run without its seed, name and paths.

    Args:
        run: The run.
        ignore: Globs of further keys to leave out.

    Example:
        >>> settings_of(Run("a", "a", config={"seed": 0, "lr": 0.1, "paths": {"data_dir": "x"}}))
        {'lr': '0.1'}
    """
    flat = under_one_name(flatten(run.config))
    # train.py's config groups of these names are only used by `quantization`, but exist without any
    ignore = (*_NO_SETTINGS, *ignore, *(("mode.name", "backend.name") if "method.name" in flat else ()))
    return {
        key: value
        for key, value in flat.items()
        if key.rpartition(".")[2] not in (SEED, *_PLACES) and not is_one_of(key, ignore) and not _is_none(key, value)
    }


def _is_none(key: str, value: str) -> bool:
    """Whether a setting is a callback that was switched off, which is the same as none."""
    return value == "null" and key.startswith("callbacks.") and key.count(".") == 1


def is_one_of(key: str, globs: Sequence[str]) -> bool:
    """Whether a setting, or a section that holds it, matches a glob: a section may be null in another run."""
    return any(fnmatchcase(key, glob) or fnmatchcase(key, f"{glob}.*") for glob in globs)


def unmatched(runs: Sequence[Run], globs: Sequence[str]) -> list[str]:
    """Return the globs that match no setting of any run.

    Example:
        >>> unmatched([Run("a", "a", config={"lr": 0.1, "trainer": {"max_epochs": 3}})], ["trainer.*", "nonsense.*"])
        ['nonsense.*']
    """
    flat = [flatten(run.config) for run in runs]
    keys = {key for settings in flat for key in (*settings, *under_one_name(settings))}
    return [glob for glob in globs if not any(is_one_of(key, [glob]) for key in keys)]


def training_of(run: Run, ignore: Sequence[str] = ()) -> str:
    """Return `training_settings` as text, to identify a training."""
    return repr(sorted(training_settings(run, ignore).items()))


def training_settings(run: Run, ignore: Sequence[str] = ()) -> dict[str, str]:
    """Return all settings that affect float training, except the seed.

    Args:
        run: The run.
        ignore: Globs of further keys to leave out.

    Example:
        >>> config = {"seed": 0, "lr": 0.1, "mode": "fx", "quantization": {"start": 0.3}}
        >>> training_settings(Run("a", "a", config=config))
        {'lr': '0.1'}
    """
    flat = flatten(run.config)
    ours = [key for key, value in flat.items() if key.endswith("._target_") and _is_ours(value)]
    parts = [key.removesuffix("._target_") for key in ours if not key.startswith(("model.", "data."))]
    no_part = (*ignore, *OF_QUANTIZATION, *parts, "callbacks.model_checkpoint", "callbacks.last_checkpoint")
    searches = flat.get("method.name") == "auto"
    return settings_of(run, (*no_part, *OF_SEARCH) if searches else no_part)


def _is_ours(target: str) -> bool:
    return target.startswith("qat_lightning.")


def seed_of(run: Run) -> str:
    """Return the seed of a run as text: the setting ``seed``, otherwise the first setting of that name, or empty.

    Example:
        >>> seed_of(Run("a", "a", config={"data": {"seed": 3}, "seed": 0})), seed_of(Run("b", "b"))
        ('0', '')
    """
    flat = flatten(run.config)
    seeds = [value for key, value in flat.items() if key.rpartition(".")[2] == SEED]
    return flat.get(SEED, seeds[0] if seeds else "")


def differing(runs: Sequence[Run], ignore: Sequence[str] = (), *, every: bool = False) -> list[Setting]:
    """Return the settings in which runs differ.

    Settings that follow from others are omitted, unless both were given on the command line: ``data.num_classes``
    follows from ``data.name``, and everything in ``quantization`` from whether there is quantization.

    Args:
        runs: The runs.
        ignore: Globs of keys to leave out.
        every: Also return settings that follow from others.

    Returns:
        The settings, beginning with those given on the command line in their order. Runs that agree in these settings
        agree in all.

    Example:
        >>> runs = [Run(m, m, config={"mode": {"name": m}, "seed": 0}) for m in ("fx", "pt2e")]
        >>> [(setting.label, setting.values) for setting in differing(runs)]
        [('mode', ('fx', 'pt2e'))]
    """
    flat = [settings_of(run, ignore) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    columns = {key: tuple(settings.get(key, ABSENT) for settings in flat) for key in keys}
    columns = {key: values for key, values in columns.items() if len({*values}) > 1}
    words = _words(runs)
    said = list(dict.fromkeys(key for of_run in words for key in of_run))
    columns |= _choices(runs, words, columns)
    kept: dict[str, tuple[str, ...]] = {}
    for key in sorted(columns, key=lambda key: (_place(key, said), *_tells(key, columns[key]))):
        free = _place(key, said) < len(said) and not only_present(columns[key])
        if every or free or not _follows(key, columns[key], kept, said):
            kept[key] = columns[key]
    labels = _short(list(kept))
    return [Setting(key, labels[key], _shown(values)) for key, values in kept.items()]


def _words(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the settings on the command line of each run, with their names here and their values."""
    parts = {part_of(flatten(run.config)) for run in runs}
    found: list[dict[str, str]] = []
    for run in runs:
        found.append({})
        for word in run.overrides:
            key, _, value = word.lstrip("+~").partition("=")
            name = key.partition("@")[0].replace("/", ".")
            name = next((new for part in parts if (new := renamed(name, part)) != name), name)
            found[-1][name] = value or ABSENT
    return found


def _choices(
    runs: Sequence[Run], words: Sequence[Mapping[str, str]], columns: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return choices of config groups on the command line, such as ``callbacks=qat``, as labels for what differs.

    If a group has a name in its own section, as those of train.py do, that name is used. A group without its own
    section, such as ``experiment``, sets values in others. A choice is omitted if runs with different choices agree in
    all settings, for example because they differ only in the seed.
    """
    flat = [flatten(run.config) for run in runs]
    everywhere = {key for config in flat for key in config}
    differing = {*columns}
    if any(key.startswith(f"{NAME}.") for key in columns):
        differing |= {f"{part_of(config)}." for config in flat}

    def is_group(name: str) -> bool:
        if any(key.startswith(f"{name}.") for key in differing):
            return f"{name}.name" not in columns
        return "." not in name and name != "hydra" and not any(f"{key}.".startswith(f"{name}.") for key in everywhere)

    alike = [*zip(*columns.values(), strict=True)] or [()] * len(runs)
    chosen = {
        name: tuple(of_run.get(name, ABSENT) for of_run in words)
        for name in dict.fromkeys(name for of_run in words for name in of_run)
        if is_group(name)
    }
    return {
        name: values
        for name, values in chosen.items()
        if len({*values}) > 1 and len({*zip(alike, values, strict=True)}) == len({*alike})
    }


def _place(key: str, said: Sequence[str]) -> int:
    """Return the position of a setting on the command line; ``mode=`` stands for ``quantization.mode``."""
    names = (key, key.removesuffix(".name"), key.removeprefix("quantization."))
    return next((place for place, name in enumerate(said) if name in names), len(said))


def _tells(key: str, values: Sequence[str]) -> tuple[int, int]:
    """Sort key: names first, then values, then the class of a section."""
    first = key.endswith(".name") or key in ("quantization.method", "quantization.mode", "quantization.backend")
    order = 0 if key == f"{NAME}.method" else 2 if only_present(values) else 0 if first else 1
    return order, int(not key.endswith("_target_") if order == 2 else key.endswith("_target_"))


def only_present(values: Sequence[str]) -> bool:
    """Whether some runs do not have the setting, and all others have the same value."""
    return ABSENT in values and len({*values}) == 2


def _follows(key: str, values: Sequence[str], kept: Mapping[str, Sequence[str]], said: Sequence[str]) -> bool:
    """Whether a setting exists only because of another one."""
    for other, column in kept.items():
        if len({*zip(column, values, strict=True)}) == len({*column}):
            named = other.endswith(".name") and other.partition(".")[0] == key.partition(".")[0]
            alike = all(a == b for a, b in zip(column, values, strict=True) if ABSENT not in (a, b))
            if named or alike or key.endswith("_target_") or only_present(values) or _place(other, said) < len(said):
                return True
    return False


_CALLED = {"QuantizationAwareTraining": "qat", "PostTrainingQuantization": "ptq"}


def _shown(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values of a setting in short, unless two different ones would look the same."""
    short = tuple(map(_in_short, values))
    return short if len({*short}) == len({*values}) else values


def _in_short(value: str) -> str:
    """Return a class by its last name, our two callbacks by the names of train.py's methods, a number in six digits."""
    parts = value.split(".")
    last = parts[-1] if len(parts) > 1 and all(part.isidentifier() for part in parts) else value
    return _CALLED.get(last, short_number(last))


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest unique suffix of each key; ``.name`` and ``._target_`` alone are not informative."""
    parts = {key: key.removesuffix(".name").removesuffix("._target_").split(".") for key in keys}
    for key in [key for key, words in parts.items() if [*parts.values()].count(words) > 1]:
        parts[key] = key.split(".")
    labels = {}
    for key, words in parts.items():
        others = [other for name, other in parts.items() if name != key]
        lengths = range(2 if words[-1] in ("name", "_target_") else 1, len(words) + 1)
        alone = (n for n in lengths if all(words[-n:] != other[-n:] for other in others))
        labels[key] = ".".join(words[-next(alone, len(words)) :])
    return labels
