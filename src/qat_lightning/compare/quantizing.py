"""The callback that quantizes, under one name wherever a program keeps it: what its configuration and it itself say."""

from __future__ import annotations

from collections.abc import Mapping

from qat_lightning.callbacks.parts.settings_log import CHOSEN_MODE, PREFIX

QUANTIZING = ("QuantizationAwareTraining", "PostTrainingQuantization")
"""The classes whose settings are those of a run's quantization."""

NAME = "quantization"
"""What its part of a configuration is called here."""

_TARGET = "_target_"


def part_of(flat: Mapping[str, str]) -> str:
    """The section of a flat configuration that creates the callback, such as ``callbacks.qat``; empty if there is none.

    It makes one of ours, or the class that the callback named when it logged its settings, which may extend ours.

    Example:
        >>> part_of({"lr": "0.1", "callbacks.qat._target_": "qat_lightning.QuantizationAwareTraining"})
        'callbacks.qat'
    """
    own = flat.get(f"{PREFIX}method")
    targets = {key: value.rpartition(".") for key, value in flat.items() if key.endswith(f".{_TARGET}")}
    parts = [
        key.removesuffix(f".{_TARGET}")
        for key, (module, _, class_name) in targets.items()
        if class_name == own or (class_name in QUANTIZING and module.partition(".")[0] == "qat_lightning")
    ]
    return parts[0] if len(parts) == 1 else ""


def renamed(key: str, part: str) -> str:
    """A key of the configuration, or of the command line, with the callback's part called ``quantization``.

    Example:
        >>> renamed("callbacks.qat.mode", "callbacks.qat"), renamed("callbacks.stop.patience", "callbacks.qat")
        ('quantization.mode', 'callbacks.stop.patience')
    """
    return f"{NAME}{key.removeprefix(part)}" if part and f"{key}.".startswith(f"{part}.") else key


def under_one_name(flat: Mapping[str, str]) -> dict[str, str]:
    """A flat configuration in which each setting of the callback is there once, as ``quantization.mode``.

    Where the program has a group ``quantization``, only what followed from it is taken from what the callback logged;
    else also what its part of the configuration leaves to the defaults.

    Example:
        >>> config = {"callbacks.qat._target_": "qat_lightning.QuantizationAwareTraining", "callbacks.qat.mode": "auto"}
        >>> sorted(under_one_name(config | {"quantization/mode": "auto", "quantization/chosen_mode": "fx"}))
        ['quantization.chosen_mode', 'quantization.method', 'quantization.mode']
    """
    said = {key.replace("/", "."): value for key, value in flat.items() if key.startswith(PREFIX)}
    config = {key: value for key, value in flat.items() if not key.startswith(PREFIX)}
    if any(key.startswith(f"{NAME}.") for key in config):
        chosen = CHOSEN_MODE.replace("/", ".")
        return config | {key: value for key, value in said.items() if key == chosen}
    part = part_of(config)
    if part:
        class_name = config.pop(f"{part}.{_TARGET}").rpartition(".")[2]
        config = {f"{NAME}.method": class_name, **{renamed(key, part): value for key, value in config.items()}}
    return said | config
