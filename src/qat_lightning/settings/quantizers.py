"""A PT2E quantizer that is passed as ``backend=``: the path and arguments from which it is created.

It is stored as text, so that checkpoints and files can hold it. Describing a quantizer imports nothing;
`qat_lightning.modes.pt2e.quantizers` creates it.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat_lightning.errors import ConfigurationError

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

FORMS = (
    "a built-in name, a dotted path such as 'package.module.Class', a mapping such as {'_target_': "
    "'package.module.Class', 'bits': 8}, a class, a function that returns a quantizer, or a quantizer"
)
"""The forms of ``backend=``, for messages."""


@dataclass(frozen=True)
class QuantizerSource:
    """Where a quantizer comes from.

    Attributes:
        path: ``"package.module.Class"``, or the path of a function that returns a quantizer. For an instance, the path
            of its class.
        arguments: Keyword arguments as a JSON object; None if unknown, as for an instance.
        made: The instance that was passed; each preparation copies it. Not saved and not compared.

    Example:
        >>> source = QuantizerSource.of({"_target_": "my_package.MyQuantizer", "bits": 8})
        >>> source.path, source.arguments
        ('my_package.MyQuantizer', '{"bits": 8}')
    """

    path: str
    arguments: str | None = "{}"
    made: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, given: Any) -> QuantizerSource:
        """Describe what a user gave as ``backend=``.

        Args:
            given: See `FORMS`; not a built-in name.

        Raises:
            ConfigurationError: It has none of these forms, or a mapping contains a value that is not plain.
        """
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, Mapping):
            path, arguments = _of_mapping(given)
            return cls(path, _encoded(arguments, path))
        if isinstance(given, functools.partial) and not given.args and _is_plain(given.keywords):
            path = _path_of(given.func)
            if path:
                return cls(path, _encoded(given.keywords, path))
        if callable(given) and not _quantizes(given):
            path = _path_of(given)
            return cls(path) if path else cls.of(_called(given))
        if isinstance(given, type) or not _quantizes(given):
            raise ConfigurationError(f"backend={given!r} is not valid: give {FORMS}.")
        return cls(f"{type(given).__module__}.{type(given).__qualname__.replace('<locals>.', '')}", None, given)

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments; mappings with ``_target_`` among them are not instantiated yet."""
        return dict(json.loads(self.arguments or "{}"))

    @property
    def shortest(self) -> Any:
        """The shortest form of ``backend=`` that means this quantizer: path, mapping of plain values, or instance."""
        if self.made is not None:
            return self.made
        return {"_target_": self.path, **self.keywords} if self.keywords else self.path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"path": self.path, "arguments": self.arguments}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizerSource:
        """Inverse of `to_dict`; an instance cannot be restored."""
        arguments = values["arguments"]
        return cls(str(values["path"]), None if arguments is None else str(arguments))


def is_path(name: str) -> bool:
    """Whether a name is a dotted path, and not the name of a built-in backend.

    Example:
        >>> is_path("my_package.MyQuantizer"), is_path("x86")
        (True, False)
    """
    return _DOTTED.fullmatch(name) is not None


def backend_and_source(given: Any) -> tuple[Any, QuantizerSource | None]:
    """The name of a backend, and where its quantizer comes from (None for a built-in one).

    Args:
        given: See `FORMS`.

    Raises:
        ConfigurationError: It has none of these forms.
    """
    if isinstance(given, str) and not is_path(given):
        return given, None
    source = QuantizerSource.of(given)
    return source.path, source


def _of_mapping(given: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    path = given.get("_target_")
    words = [key for key in given if not isinstance(key, str) or (key.startswith("_") and key != "_target_")]
    if not isinstance(path, str) or not is_path(path) or words:
        which = f"the key {words[0]!r} is not valid" if words else "it has no '_target_' with a dotted path"
        raise ConfigurationError(
            f"backend={dict(given)!r} is not valid: {which}. Give {{'_target_': 'package.module.Class'}} and "
            "keyword arguments besides."
        )
    return path, {key: value for key, value in given.items() if key != "_target_"}


def _encoded(arguments: Mapping[str, Any], path: str) -> str:
    if not _is_plain(arguments):
        raise ConfigurationError(
            f"backend={path!r}: its arguments {dict(arguments)!r} cannot be stored in a checkpoint. Give numbers, "
            "strings, lists and mappings (one with '_target_' is made into an object), or the quantizer itself as "
            "backend=."
        )
    return json.dumps(_plain(arguments), sort_keys=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return all(_is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    """A value without the container types of configuration libraries."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _path_of(given: Any) -> str:
    """The path by which other processes import an object; empty for lambdas and local objects."""
    path = f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', '<unknown>')}"
    if not is_path(path):
        return ""
    try:
        return path if imported(path) is given else ""
    except ConfigurationError:
        return ""


def _quantizes(given: Any) -> bool:
    """Whether an object has the methods of PT2E's ``Quantizer``; its type is checked when it is used."""
    return not isinstance(given, type) and callable(getattr(given, "annotate", None))


def _called(factory: Any) -> Any:
    try:
        made = factory()
    except Exception as error:
        raise ConfigurationError(
            f"backend={factory!r} cannot be called without arguments ({type(error).__name__}: {error}): give {FORMS}."
        ) from error
    if not _quantizes(made):
        raise ConfigurationError(f"backend={factory!r} returns {made!r}, which is not a PT2E quantizer: give {FORMS}.")
    return made


def imported(path: str) -> Any:
    """The object at a dotted path, after importing its module.

    Raises:
        ConfigurationError: There is no such object; the message says what is missing.

    Example:
        >>> imported("json.loads")("[1]")
        [1]
    """
    module, names, cause = path, list[str](), ""
    while module:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            cause = cause or str(error)
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            continue
        for name in names:
            if not hasattr(found, name):
                why = f"{found.__name__} has no {name!r}" + (f" ({cause})" if found.__name__ != module else "")
                raise ConfigurationError(f"{path!r} cannot be imported: {why}. Give the path of a class or a function.")
            found = getattr(found, name)
        return found
    raise ConfigurationError(
        f"{path!r} cannot be imported: {cause}. Give the path of a class or a function in a module that is "
        "installed, or on sys.path (PYTHONPATH=...)."
    )
