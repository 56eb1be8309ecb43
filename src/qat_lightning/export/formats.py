"""Every format there is, by name: a new one is a file here and a line in this table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.export.protocol import Format
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import Recipe

_TABLE = {
    "pt2": "pt2:AotInductor",
    "exported_program": "pt2:PlainProgram",
    "torchscript": "torchscript:TorchScript",
    "executorch": "executorch:ExecuTorch",
    "tflite": "tflite:Tflite",
    "tflite_int8": "tflite:TfliteInt8",
    "onnx": "onnx:Onnx",
    "openvino": "openvino:OpenVino",
}

FORMATS = tuple(_TABLE)
"""What ``formats=`` takes."""


_STAND_INS = {
    ("executorch", backend): "exported_program" for backend in ("tosa", "ethosu", "vgf", "cortex_m", "vulkan")
}
"""Formats and backends whose files nothing runs that a package index has, and what is compared in their place."""


def stand_in(name: str, recipe: Recipe | None) -> str:
    """The format whose file is compared if this one cannot run here; empty if the file itself can.

    Example:
        >>> stand_in("executorch", Recipe("pt2e", "vulkan")), stand_in("executorch", Recipe("pt2e", "xnnpack"))
        ('exported_program', '')
    """
    return "" if recipe is None else _STAND_INS.get((name, recipe.backend), "")


def get_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ConfigurationError: There is none.

    Example:
        >>> get_format("pt2").runtime
        'AOTInductor'
    """
    if name not in _TABLE:
        raise ConfigurationError(f"formats: {name!r} is unknown: use some of {', '.join(FORMATS)}.")
    file, _, class_name = _TABLE[name].partition(":")
    made: Format = getattr(importlib.import_module(f"qat_lightning.export.{file}"), class_name)()
    return made


def check_formats(names: Sequence[str], recipe: Recipe) -> None:
    """Refuse formats that networks of a recipe do not go into, or whose packages are missing.

    Raises:
        ConfigurationError: There is no such format.
        CombinationError: The format and the recipe do not go together.
        MissingExtraError: A package is not installed; the message has the line that installs it.
    """
    for name in names:
        chosen = get_format(name)
        if not traits_of(recipe.mode).exports:
            raise CombinationError(
                f"export={name} does not support mode={recipe.mode!r}, which keeps Python code between its graphs: "
                "save the int8 network with save(path), or use a mode that captures the whole network."
            )
        why = chosen.refusal(recipe)
        if why:
            possible = [other for other in FORMATS if not get_format(other).refusal(recipe)]
            raise CombinationError(
                f"export={name} does not support mode={recipe.mode!r}, backend={recipe.backend!r}: {why} "
                f"Supported formats: {', '.join(possible)}."
            )
        chosen.require()
