"""Checking arguments by their type, before anything is done with them: YAML and a shell send what they like."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from qat_lightning.errors import ConfigurationError
from qat_lightning.storage import Place, is_file, place

STAGES = ("train", "validate", "test", "predict")


def check_word(name: str, value: Any) -> None:
    """Refuse what is no string, or an empty one.

    Raises:
        ConfigurationError: With the argument's name.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name}={value!r} is not possible: give a name.")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is not true or false; the string 'false', for one, would count as true.

    Raises:
        ConfigurationError: With the argument's name.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} is not possible: give true or false.")


def check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Refuse what is no finite number, or too small a one.

    Args:
        name: The argument.
        value: What was given.
        above: What it has to be greater than.
        least: What it must not be less than.

    Raises:
        ConfigurationError: With the argument's name and what is possible.

    Example:
        >>> check_number("temperature", 0, above=0)
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: temperature=0 is not possible: give a number greater than 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above is not None and value <= above) or (least is not None and value < least):
        bound = f" greater than {above}" if above is not None else f" of at least {least}" if least is not None else ""
        raise ConfigurationError(f"{name}={value!r} is not possible: give a number{bound}.")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1.

    Raises:
        ConfigurationError: With the argument's name.
    """
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}={value!r} is not possible: give an int from 1.")


def check_names(name: str, value: Any, *, example: str) -> tuple[str, ...]:
    """A list of strings as a tuple; None as an empty one.

    Raises:
        ConfigurationError: With the argument's name.

    Example:
        >>> check_names("include", ["head.*"], example="['head.*']")
        ('head.*',)
        >>> check_names("include", "head.*", example="['head.*']")
        Traceback (most recent call last):
            ...
        qat_lightning.errors.ConfigurationError: include='head.*' is not possible: give a list, like ['head.*'].
    """
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not all(map(_is_name, value)):
        raise ConfigurationError(f"{name}={value!r} is not possible: give a list, like {example}.")
    return tuple(value)


def check_stages(name: str, value: Any) -> tuple[str, ...]:
    """Stages of a Trainer in which ranges move; ``"train"`` is one of them.

    Raises:
        ConfigurationError: With the argument's name.
    """
    stages = check_names(name, value, example="['train', 'validate']")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or "train" not in stages:
        raise ConfigurationError(
            f"{name}={value!r} is not possible: "
            + (f"{unknown[0]!r} is not one of {', '.join(STAGES)}." if unknown else "'train' must be one of them.")
        )
    return stages


def check_file(name: str, value: Any) -> Place | None:
    """The path of a file that exists, or its URL in other storage; None for None.

    Raises:
        ConfigurationError: With the argument's name.
        MissingExtraError: The package for the protocol of a URL is not installed.
    """
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ConfigurationError(f"{name}={value!r} is not possible: give the path of a file.")
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
