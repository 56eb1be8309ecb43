"""Type and range checks for arguments, which may come from YAML or a shell with any type."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from qat_lightning.errors import ConfigurationError
from qat_lightning.storage import Place, is_file, place

STAGES = ("train", "validate", "test", "predict")


def check_word(name: str, value: Any) -> None:
    """Require a non-empty string.

    Raises:
        ConfigurationError: It is not one; the message names the argument.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name}={value!r} is not valid: give a name.")


def check_flag(name: str, value: Any) -> None:
    """Require a bool. The string 'false', for example, would be truthy.

    Raises:
        ConfigurationError: It is not one; the message names the argument.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} is not valid: give true or false.")


def check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Require a finite number within the given bounds.

    Args:
        name: Name of the argument, for the message.
        value: The value to check.
        above: Exclusive lower bound; None for no bound.
        least: Inclusive lower bound; None for no bound.

    Raises:
        ConfigurationError: It is not one; the message names the argument and the bound.

    Example:
        >>> check_number("temperature", 0, above=0)
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: temperature=0 is not valid: give a number greater than 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above is not None and value <= above) or (least is not None and value < least):
        bound = f" greater than {above}" if above is not None else f" of at least {least}" if least is not None else ""
        raise ConfigurationError(f"{name}={value!r} is not valid: give a number{bound}.")


def check_count(name: str, value: Any) -> None:
    """Require an int of at least 1.

    Raises:
        ConfigurationError: It is not one; the message names the argument.
    """
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}={value!r} is not valid: give an integer of at least 1.")


def check_names(name: str, value: Any, *, example: str) -> tuple[str, ...]:
    """Return a list of strings as a tuple; None becomes an empty tuple.

    Raises:
        ConfigurationError: It is not a list of strings; the message names the argument.

    Example:
        >>> check_names("include", ["head.*"], example="['head.*']")
        ('head.*',)
        >>> check_names("include", "head.*", example="['head.*']")
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: include='head.*' is not valid: give a list, like ['head.*'].
    """
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not all(map(_is_name, value)):
        raise ConfigurationError(f"{name}={value!r} is not valid: give a list, like {example}.")
    return tuple(value)


def check_stages(name: str, value: Any) -> tuple[str, ...]:
    """Return the Trainer stages in which quantization ranges are updated; ``"train"`` must be one of them.

    Raises:
        ConfigurationError: A stage is unknown, or ``"train"`` is missing; the message names the argument.
    """
    stages = check_names(name, value, example="['train', 'validate']")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or "train" not in stages:
        raise ConfigurationError(
            f"{name}={value!r} is not valid: "
            + (f"{unknown[0]!r} is not one of {', '.join(STAGES)}." if unknown else "'train' must be one of them.")
        )
    return stages


def check_file(name: str, value: Any) -> Place | None:
    """Return the path of an existing file, or its URL in remote storage; None for None.

    Raises:
        ConfigurationError: There is no such file; the message names the argument.
        MissingExtraError: The package for the protocol of a URL is not installed.
    """
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ConfigurationError(f"{name}={value!r} is not valid: give the path of a file.")
    try:
        found = is_file(place(value))
    except OSError as error:
        raise ConfigurationError(f"{name}={str(value)!r} cannot be accessed: {error}.") from error
    except ConfigurationError:
        raise
    except ValueError:  # a path with a null character
        found = False
    if not found:
        raise ConfigurationError(f"{name}={str(value)!r} is not a file.")
    return place(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
