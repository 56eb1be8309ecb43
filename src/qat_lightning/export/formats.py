"""The table of export formats by name: a new format is a file in this folder and a line here."""

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
"""Formats and backends whose files no installable runtime can run, and the format that is compared instead."""


def stand_in(name: str, recipe: Recipe | None) -> str:
    """Return the format to compare if this one's files cannot run here; empty if they can.

    Example:
        >>> stand_in("executorch", Recipe("pt2e", "vulkan")), stand_in("executorch", Recipe("pt2e", "xnnpack"))
        ('exported_program', '')
    """
    return "" if recipe is None else _STAND_INS.get((name, recipe.backend), "")


def get_format(name: str) -> Format:
    """Return the format with this name.

    Raises:
        ConfigurationError: The name is unknown.

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
    """Check that formats support a recipe, and that their packages are installed.

    Raises:
        ConfigurationError: A format is unknown.
        CombinationError: A format does not support the recipe.
        MissingExtraError: A package is not installed; the message has the command that installs it.
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
