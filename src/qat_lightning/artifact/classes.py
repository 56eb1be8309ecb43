"""Containers of custom classes in a file: stored by class name, and found or substituted when loading.

A file may name any class. Loading searches only code that the user has chosen: the modules of the network that was
passed, and the outputs of Hugging Face's transformers, if that is installed. Nothing else is imported or called. A
class that is not found is replaced by `qat_lightning.graph.structures.Record`, which has the same keys.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn
from torch.fx.immutable_collections import immutable_dict

from qat_lightning.artifact.values import Special, SpecialTag, decode, encode, identifier, namedtuple_type
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.structures import MakesRecord, is_namedtuple, is_record, made_of
from qat_lightning.modes.structured_tracer import MakesMapping

_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+)")


def is_own_container(value: Any) -> bool:
    """Whether a value is a container of a class other than Python's own."""
    cls = type(value)
    return is_record(cls) or is_namedtuple(cls) or (isinstance(value, dict) and cls not in _PLAIN)


_PLAIN = (dict, OrderedDict, immutable_dict)


def encode_class(cls: Any) -> dict[str, Any]:
    """The name of a dataclass, named tuple or subclass of dict, and how it is constructed."""
    form = "fields" if is_record(cls) else "tuple" if is_namedtuple(cls) else "mapping"
    fields = made_of(cls) if form == "fields" else cls._fields if form == "tuple" else ()
    return {"module": cls.__module__, "name": cls.__qualname__, "form": form, "fields": list(fields)}


def maker_of(data: Any, network: nn.Module | None) -> Callable[..., Any]:
    """The function that constructs a container: from fields by name, from all fields in order, or from key-value pairs.

    Args:
        data: Result of `encode_class`.
        network: The float network, if it was passed.

    Raises:
        ArtifactError: The data is not a result of `encode_class`.
    """
    module, name, form = data["module"], data["name"], data["form"]
    fields = tuple(identifier(field) for field in data["fields"])
    if type(module) is not str or type(name) is not str or form not in ("fields", "tuple", "mapping"):
        raise ArtifactError("it names something as a class that is not a class")
    plain: dict[str, Callable[..., Any]] = {"OrderedDict": OrderedDict, "defaultdict": MakesMapping(defaultdict)}
    if (module, form) == ("collections", "mapping") and name in plain:
        return plain[name]
    found = _of_network(module, name, network) or _of_transformers(module, name)
    if found is not None and encode_class(found) == {"module": module, "name": name, "form": form, "fields": [*fields]}:
        if form != "mapping":
            return cast("Callable[..., Any]", found)
        if issubclass(found, dict):
            return MakesMapping(found)
    return namedtuple_type(name.rpartition(".")[2], fields) if form == "tuple" else MakesRecord(fields)


def encode_container(value: Any, items: Iterable[tuple[Any, Any]], special: Special) -> dict[str, Any]:
    """A container as plain data.

    Args:
        value: The container.
        items: Keys, or names of fields, and values.
        special: Encodes the values inside, as for `encode`.
    """
    pairs = [[encode(key), encode(part, special)] for key, part in items]
    return {"container": {"class": encode_class(type(value)), "items": pairs}}


def decode_container(data: dict[str, Any], special: SpecialTag, network: nn.Module | None) -> Any:
    """Inverse of `encode_container`.

    Raises:
        ArtifactError: The data is not a result of `encode_container`.
    """
    maker = maker_of(data["class"], network)
    items = [(decode(key), decode(part, special)) for key, part in data["items"]]
    if is_namedtuple(maker):
        return maker(*(part for _, part in items))
    return maker(**dict(items)) if is_record(maker) else maker(items)


def _of_network(module: str, name: str, network: nn.Module | None) -> Any:
    known = {type(part).__module__ for part in network.modules()} if network is not None else set()
    for place in known - {"torch"}:
        found = vars(sys.modules[place]).get(name) if place in sys.modules and not place.startswith("torch.") else None
        if isinstance(found, type) and (found.__module__, found.__qualname__) == (module, name):
            return found
    return None


def _of_transformers(module: str, name: str) -> Any:
    if _TRANSFORMERS.fullmatch(module) is None:
        return None
    try:
        outputs = importlib.import_module("transformers.utils").ModelOutput
        found = vars(importlib.import_module(module)).get(name)
    except (ImportError, RuntimeError):
        return None
    return found if isinstance(found, type) and issubclass(found, outputs) else None
