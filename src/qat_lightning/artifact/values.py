"""Encoding values as JSON: the contents of graphs, signatures and structures, without pickle.

JSON's own values represent themselves (a list is a list); everything else is a dictionary with one key, its tag. Types
that are not listed here cannot be written, and tags that are not listed here cannot be read: a file cannot create an
object of a class of its choosing.
"""

from __future__ import annotations

import keyword
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from qat_lightning.errors import ArtifactError


def _table(kind: type) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": _table(torch.dtype),
    "layout": _table(torch.layout),
    "memory_format": _table(torch.memory_format),
    "qscheme": _table(torch.qscheme),
}
_KINDS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    torch.qscheme: "qscheme",
}

Special = Callable[[Any], Any]
"""Encodes a custom object as ``{tag: value}``, or returns None for other values."""
SpecialTag = Callable[[str, Any], Any]
"""Decodes a custom tag, or raises an error."""


def no_special(value: Any) -> Any:
    """No custom objects."""
    return None


def no_tag(tag: str, value: Any) -> Any:
    """No custom tags.

    Raises:
        ArtifactError: Always.
    """
    raise ArtifactError(f"it holds a value of the unknown kind {tag[:80]!r}")


def encode(value: Any, special: Special = no_special) -> Any:
    """Convert a value to a form that `json` can write.

    Args:
        value: Any nesting of plain values.
        special: Encodes custom objects.

    Raises:
        ArtifactError: It contains a value of another type.

    Example:
        >>> encode([1, (2.0, float("inf")), torch.float32, slice(None, 3)])
        [1, {'tuple': [2.0, {'float': 'inf'}]}, {'dtype': 'float32'}, {'slice': [None, 3, None]}]
    """
    found = special(value)
    if found is not None:
        return found
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, immutable_list):
        return [encode(item, special) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encode(item, special) for item in value]}
    if type(value) in (dict, immutable_dict, OrderedDict):
        tag = "ordered_dict" if type(value) is OrderedDict else "dict"
        return {tag: [[encode(key), encode(item, special)] for key, item in value.items()]}
    return _encode_rare(value, special)


def _encode_rare(value: Any, special: Special) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [encode(item, special) for item in value]
        return {"namedtuple": [type(value).__name__, list(value._fields), items]}
    if type(value) is slice:
        return {"slice": [encode(item, special) for item in (value.start, value.stop, value.step)]}
    if type(value) in _KINDS:
        return {_KINDS[type(value)]: str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"device": str(value)}
    if type(value) is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if value is ...:
        return {"ellipsis": True}
    raise ArtifactError(f"holds a {type(value).__module__}.{type(value).__qualname__} ({str(value)[:60]!r})")


def decode(data: Any, special: SpecialTag = no_tag) -> Any:
    """Inverse of `encode`.

    Args:
        data: Result of `json`.
        special: Decodes custom tags.

    Raises:
        ArtifactError: The data is not a result of `encode`.

    Example:
        >>> decode({"tuple": [1, {"dtype": "int8"}]})
        (1, torch.int8)
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [decode(item, special) for item in data]
    if type(data) is not dict or len(data) != 1:
        raise ArtifactError("it holds a value of unknown form")
    ((tag, content),) = data.items()
    if tag in _CONSTANTS:
        return _CONSTANTS[tag][content]
    made = _MADE_OF.get(tag)
    return special(tag, content) if made is None else made(content, lambda item: decode(item, special))


def _dict(content: Any, inner: Callable[[Any], Any]) -> dict[Any, Any]:
    return {_key(key): inner(item) for key, item in content}


def _slice(content: Any, inner: Callable[[Any], Any]) -> slice:
    start, stop, step = (inner(item) for item in content)
    return slice(start, stop, step)


def _complex(content: Any, inner: Callable[[Any], Any]) -> complex:
    real, imaginary = (decode(item) for item in content)
    return complex(real, imaginary)


def _namedtuple(content: Any, inner: Callable[[Any], Any]) -> Any:
    name, fields, items = content
    return namedtuple_type(name, tuple(fields))(*(inner(item) for item in items))


_MADE_OF: dict[Any, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "tuple": lambda content, inner: tuple(inner(item) for item in content),
    "dict": _dict,
    "ordered_dict": lambda content, inner: OrderedDict(_dict(content, inner)),
    "slice": _slice,
    "float": lambda content, inner: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content],
    "complex": _complex,
    "device": lambda content, inner: torch.device(str(content)),
    "ellipsis": lambda content, inner: ...,
    "namedtuple": _namedtuple,
}
"""For each tag, the function that decodes its content."""


def _key(data: Any) -> Any:
    key = decode(data)
    if type(key) not in (str, int, bool, float):
        raise ArtifactError(f"it holds a dictionary with the key {str(key)[:80]!r}")
    return key


_NAMEDTUPLES: dict[tuple[str, tuple[str, ...]], Any] = {}


def namedtuple_type(name: str, fields: tuple[str, ...]) -> Any:
    """A namedtuple class, always the same object; the original class is code, which a file does not store."""
    for part in (name, *fields):
        identifier(part)
    if (name, fields) not in _NAMEDTUPLES:
        _NAMEDTUPLES[name, fields] = namedtuple(name, fields)
    return _NAMEDTUPLES[name, fields]


def identifier(name: Any) -> str:
    """Return ``name`` if it is a plain Python identifier, which is safe in generated code.

    Raises:
        ArtifactError: It is not.
    """
    if type(name) is not str or not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"it holds the name {str(name)[:80]!r}, which is not a plain name")
    return name
