"""Outputs of an int8 network in eager mode: plain tensors, in the containers that its forward returns."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from qat_lightning.graph.structures import is_record, put_item
from qat_lightning.modes.eager.int8 import Int8Tensor


def plain_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of an int8 network that replaces its special tensors by plain ones."""
    return _all_plain(output)


def _all_plain(value: Any) -> Any:
    # Objects of custom classes stay the same, with all their attributes.
    return tree_map(_plain, value, is_leaf=_of_own_class)


def _of_own_class(value: Any) -> bool:
    return is_record(type(value)) or (isinstance(value, dict) and type(value) not in (dict, OrderedDict, defaultdict))


def _plain(value: Any) -> Any:
    if isinstance(value, Int8Tensor):
        return value.floating("the caller of the network")
    if is_record(type(value)):
        for name in dataclasses.fields(value):
            inner = getattr(value, name.name, None)
            plain = _all_plain(inner)
            if plain is not inner:
                object.__setattr__(value, name.name, plain)
    if _of_own_class(value) and isinstance(value, dict):
        for key, inner in list(value.items()):
            put_item(value, key, _all_plain(inner))
    return value
