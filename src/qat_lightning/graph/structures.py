"""Containers that networks take and return besides tensors, lists, tuples and dicts: dataclasses and dict-likes.

PyTorch's pytree looks into the containers that it knows, and treats everything else as a leaf. This module registers
others when they occur: dataclasses and subclasses of dict. Hugging Face's ModelOutput comes registered.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def look_into(*values: Any) -> None:
    """Register the containers in ``values`` that hold tensors with pytree.

    Example:
        >>> @dataclasses.dataclass
        ... class Output:
        ...     logits: Tensor
        >>> output = Output(torch.zeros(2))
        >>> look_into(output)
        >>> len(pytree.tree_leaves(output)), pytree.tree_map(lambda leaf: leaf + 1, output)
        (1, Output(logits=tensor([1., 1.])))
    """
    for value in values:
        _look(value)


def _look(value: Any) -> bool:
    """Whether a value contains a tensor; registers the containers on the way."""
    if isinstance(value, Tensor):
        return True
    inside = [_look(part) for part in parts(value)]  # all of them, not just up to the first tensor
    holds = any(inside)
    if holds:
        know(type(value))
    return holds


def know(cls: type) -> None:
    """Register a class with pytree, if it is an unregistered dataclass or subclass of dict."""
    if cls in pytree.SUPPORTED_NODES:
        return
    if is_record(cls):
        _register(cls)
    elif issubclass(cls, dict):
        _register_mapping(cls)


def parts(value: Any) -> Iterable[Any]:
    """The contents of a container; empty for anything else."""
    if isinstance(value, Mapping):
        return value.values()
    if is_record(type(value)):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return value if isinstance(value, (list, tuple)) else ()


def is_namedtuple(cls: Any) -> bool:
    """Whether a class is a named tuple."""
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def is_record(cls: Any) -> bool:
    """Whether a class is a dataclass whose objects can be rebuilt from its fields."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def made_of(cls: type) -> list[str]:
    """The fields that a dataclass is constructed with."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def make_mapping(cls: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """Create an object of a subclass of dict without its ``__init__``, which may need other arguments."""
    made = cls.__new__(cls)
    for key, value in items:
        put_item(made, key, value)
    return made


def put_item(mapping: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an item as dict does, bypassing overrides of the class."""
    (OrderedDict if isinstance(mapping, OrderedDict) else dict).__setitem__(mapping, key, value)


def given_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; of a dict-like only those it has, since Hugging Face's ModelOutput drops None."""
    return _given(value, made_of(type(value)), isinstance(value, dict))


def _given(value: Any, names: list[str], is_dict: bool) -> dict[str, Any]:
    fields = {name: getattr(value, name) for name in names}
    return {name: field for name, field in fields.items() if field is not None or not is_dict}


def _register(cls: type) -> None:
    # Known beforehand, since a capture goes through what is below and cannot ask a class for its fields.
    names, is_dict = made_of(cls), issubclass(cls, dict)

    def flatten(value: Any) -> tuple[list[Any], list[str]]:
        given = _given(value, names, is_dict)
        return list(given.values()), list(given)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[str]]:
        given = _given(value, names, is_dict)
        return [(pytree.GetAttrKey(name), field) for name, field in given.items()], list(given)

    def unflatten(values: Iterable[Any], context: list[str]) -> Any:
        return cls(**dict(zip(context, values, strict=True)))

    _add(cls, flatten, flatten_with_keys, unflatten)


def _register_mapping(cls: type) -> None:
    def flatten(value: Any) -> tuple[list[Any], list[Any]]:
        return list(value.values()), list(value.keys())

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        return [(pytree.MappingKey(key), inner) for key, inner in value.items()], list(value.keys())

    def unflatten(values: Iterable[Any], context: list[Any]) -> Any:
        return make_mapping(cls, zip(context, values, strict=True))

    _add(cls, flatten, flatten_with_keys, unflatten)


def _add(cls: type, flatten: Any, flatten_with_keys: Any, unflatten: Any) -> None:
    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


class Record(OrderedDict[str, Any]):
    """Stands for an object of a class that is not there: what it holds by key, ``r["logits"]``, and ``r.logits``.

    A loaded int8 network returns it where the saved one returned a dataclass or a dict-like of a class of your own.

    Example:
        >>> record = Record(logits=1, hidden=2)
        >>> record.logits, record["hidden"], list(record)
        (1, 2, ['logits', 'hidden'])
    """

    def __getattr__(self, name: str) -> Any:
        """Get an entry by its name; None for a field of the class that is not set."""
        if name in self:
            return self[name]
        if name in self.__dict__.get("_fields", ()):
            return None
        raise AttributeError(f"there is no {name!r} in it, only {', '.join(map(repr, self))}")


class MakesRecord:
    """Creates records for one class; used as the target of a node.

    Args:
        fields: The fields of the class; a record may have fewer.
    """

    def __init__(self, fields: Iterable[str]) -> None:
        self.fields = tuple(fields)
        # Code generators read these attributes of a function.
        self.__name__ = self.__qualname__ = "make_record"
        self.__module__ = __name__

    def __call__(self, *items: Any, **named: Any) -> Record:
        """Create a record from pairs of keys and values, or from keyword arguments."""
        record = Record(*items, **named)
        record.__dict__["_fields"] = self.fields
        return record


def _flatten_record(record: Record) -> tuple[list[Any], list[Any]]:
    return list(record.values()), [list(record), list(record.__dict__.get("_fields", ()))]


def _flatten_record_with_keys(record: Record) -> tuple[list[tuple[Any, Any]], list[Any]]:
    values, context = _flatten_record(record)
    return [(pytree.MappingKey(key), value) for key, value in zip(context[0], values, strict=True)], context


def _unflatten_record(values: Iterable[Any], context: list[Any]) -> Record:
    keys, fields = context
    return MakesRecord(fields)(zip(keys, values, strict=True))


_add(Record, _flatten_record, _flatten_record_with_keys, _unflatten_record)


def same(wanted: Any, got: Any, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two values are containers of the same classes with equal values, and their tensors pairwise ``equal``.

    Example:
        >>> same({"a": [torch.ones(1), 2]}, {"a": [torch.ones(1), 2]}, torch.equal)
        True
        >>> same({"a": 1}, Record(a=1), torch.equal)
        False
    """
    if isinstance(wanted, Tensor) or isinstance(got, Tensor):
        return isinstance(wanted, Tensor) and isinstance(got, Tensor) and equal(wanted, got)
    if not (_is_container(wanted) or _is_container(got)):
        return bool(wanted is got or wanted == got)
    if type(wanted) is not type(got) and {type(wanted), type(got)} != {tuple, torch.Size}:
        return False
    if isinstance(wanted, Mapping):
        return wanted.keys() == got.keys() and all(same(wanted[key], got[key], equal) for key in wanted)
    ours, theirs = list(parts(wanted)), list(parts(got))
    return len(ours) == len(theirs) and all(same(one, other, equal) for one, other in zip(ours, theirs, strict=True))


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) or is_record(type(value))
