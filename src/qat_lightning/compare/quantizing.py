"""Settings of the quantizing callback under one name, wherever a program's configuration has them."""

from __future__ import annotations

from collections.abc import Mapping

from qat_lightning.callbacks.parts.settings_log import CHOSEN_MODE, PREFIX

QUANTIZING = ("QuantizationAwareTraining", "PostTrainingQuantization")
"""Classes whose settings are quantization settings."""

NAME = "quantization"
"""The name used here for the callback's section of a configuration."""

_TARGET = "_target_"


def part_of(flat: Mapping[str, str]) -> str:
    """Return the section of a flat configuration that creates the callback; empty if there is none.

    For example ``callbacks.qat``. It creates one of our classes, or the class named in the settings that the callback
    logged, which may be a subclass.

    Example:
        >>> part_of({"lr": "0.1", "callbacks.qat._target_": "qat_lightning.QuantizationAwareTraining"})
        'callbacks.qat'
    """
    parts = _parts(flat)
    return parts[0] if len(parts) == 1 else ""


def quantizes(flat: Mapping[str, str]) -> bool:
    """Whether a flat configuration creates one of our callbacks, or has the settings that one logged.

    Example:
        >>> quantizes({"quantization/method": "Mine"}), quantizes({"quantization.enabled": "false"})
        (True, False)
    """
    logged = f"{PREFIX}method"
    return bool(_parts(flat)) or logged in flat or logged.replace("/", ".") in flat


def _parts(flat: Mapping[str, str]) -> list[str]:
    """Return the sections that create a quantizing callback."""
    own = flat.get(f"{PREFIX}method")
    targets = {key: value.rpartition(".") for key, value in flat.items() if key.endswith(f".{_TARGET}")}
    return [
        key.removesuffix(f".{_TARGET}")
        for key, (module, _, class_name) in targets.items()
        if class_name == own or (class_name in QUANTIZING and module.partition(".")[0] == "qat_lightning")
    ]


def renamed(key: str, part: str) -> str:
    """Rename a key of the configuration or command line: the callback's section becomes ``quantization``.

    Example:
        >>> renamed("callbacks.qat.mode", "callbacks.qat"), renamed("callbacks.stop.patience", "callbacks.qat")
        ('quantization.mode', 'callbacks.stop.patience')
    """
    return f"{NAME}{key.removeprefix(part)}" if part and f"{key}.".startswith(f"{part}.") else key


def under_one_name(flat: Mapping[str, str]) -> dict[str, str]:
    """Return a flat configuration with each setting of the callback once, as ``quantization.mode`` and so on.

    If the program has a config group ``quantization``, only derived values are taken from what the callback logged;
    otherwise also defaults that its section of the configuration omits.

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
