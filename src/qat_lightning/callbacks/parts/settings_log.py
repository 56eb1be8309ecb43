"""Logging the settings of a quantizing callback as hyperparameters, so that runs can be told apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from qat_lightning.settings.schedule import SchedulePoint

PREFIX = "quantization/"
CHOSEN_MODE = f"{PREFIX}chosen_mode"
"""Name of the chosen mode, logged if ``mode="auto"`` was given."""

_DATA = ("example_inputs", "dataloader", "calibration_dataloader", "calls")


def log_settings(trainer: Trainer, callback: Callback, modes: Sequence[str]) -> None:
    """Log the settings of a callback as hyperparameters under ``quantization/``, in addition to existing ones.

    If a logger does not accept them, a warning is given and training continues.

    Args:
        trainer: The Trainer whose loggers are used.
        callback: The quantizing callback. Settings of other callbacks of this package, such as `Distillation`, are
            logged with their class name as prefix.
        modes: The mode of each network, once it is chosen.
    """
    if not trainer.is_global_zero or not trainer.loggers:
        return
    others = [c for c in trainer.callbacks if c is not callback and _trains(c)]  # type: ignore[attr-defined]
    found = settings_of_callback(callback) | {CHOSEN_MODE: ", ".join(dict.fromkeys(modes))}
    for other in others:
        found |= settings_of_callback(other, f"{PREFIX}{type(other).__name__}/")
    for logger in trainer.loggers:
        try:
            _log(logger, trainer.lightning_module, found)
        except Exception as error:  # noqa: BLE001 - third-party loggers may raise anything
            rank_zero_warn(
                f"{type(logger).__name__} did not accept the settings of {type(callback).__name__} "
                f"({type(error).__name__}: {error}), so runs cannot be told apart by them there."
            )


def settings_of_callback(callback: Callback, prefix: str = PREFIX) -> dict[str, Any]:
    """Return the constructor arguments of a callback as a flat dict of plain values.

    Args:
        callback: A callback whose attributes have the names of its constructor's arguments, or are in its ``schedule``
            or ``settings``.
        prefix: Prefix of each name.

    Example:
        >>> from qat_lightning import QuantizationAwareTraining
        >>> settings = settings_of_callback(QuantizationAwareTraining(mode="fx", start=0.3))
        >>> settings["quantization/method"], settings["quantization/start"], settings["quantization/scheme.weight_bits"]
        ('QuantizationAwareTraining', 0.3, 8)
    """
    found: dict[str, Any] = {f"{prefix}method": type(callback).__name__}
    holders = [callback, *(getattr(callback, name, None) for name in ("schedule", "settings"))]
    for name in _arguments(type(callback)):
        holder = next((h for h in holders if h is not None and hasattr(h, name)), None)
        if name not in ("self", *_DATA) and holder is not None:
            found |= _plain(f"{prefix}{name}", getattr(holder, name))
    return found


def _arguments(cls: type) -> list[str]:
    """Return argument names of a constructor and of its base classes, to which a subclass may pass arguments on."""
    makers = [inspect.signature(vars(base)["__init__"]) for base in cls.__mro__ if "__init__" in vars(base)]
    return list(dict.fromkeys(name for maker in makers for name in maker.parameters))


def _trains(callback: Callback) -> bool:
    """Whether a callback of this package affects training results, rather than only observing or writing files."""
    cls = type(callback)
    watches = ("Monitor", "Export", "Checkpoint", "Pruning")
    return cls.__module__.startswith("qat_lightning.") and not cls.__name__.endswith(watches)


def _plain(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, SchedulePoint):
        return {name: value.at if value.unit == "fraction" else str(value)}
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: part for inner, one in value.items() for key, part in _plain(f"{name}.{inner}", one).items()}
    if isinstance(value, list | tuple | set):
        return {name: ", ".join(map(str, value)) if value else None}
    if value is None or isinstance(value, bool | int | float | str):
        return {name: value}
    return {name: str(value) if isinstance(value, Path) else type(value).__name__}


def _log(logger: Logger, module: LightningModule, settings: dict[str, Any]) -> None:
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(settings)
        return
    # TensorBoard shows only the first hyperparameters written, so they are logged before the module's own.
    if logger.hparams:  # already written, perhaps with metrics; these go into hparams.yaml
        logger.log_hyperparams(settings, {})
        return
    own = dict(module.hparams_initial) if module._log_hyperparams else {}
    logger.log_hyperparams(own | settings)
