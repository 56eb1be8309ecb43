"""Containers of custom classes, as pytree nodes after their first use."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qat_lightning.graph.structures import MakesRecord, Record, look_into, same


@dataclass
class Inner:
    value: Any


@dataclass(frozen=True)
class Outer:
    inner: Any
    other: Any = None


class Own(OrderedDict[str, Any]):
    def __init__(self, needed: int) -> None:
        super().__init__(a=torch.zeros(needed))


@dataclass
class Settings:
    size: int = 3


def test_containers_are_looked_into_and_made_again() -> None:
    value = [Outer({"x": Inner(torch.ones(2))}, Own(2)), Settings()]
    look_into(value)
    assert sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) == 2
    doubled = pytree.tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, value)
    assert same(value, doubled, lambda one, other: torch.equal(one * 2, other))
    assert type(doubled[0].other) is Own


def test_what_holds_no_tensor_stays_a_leaf() -> None:
    look_into([Settings(), torch.ones(1)])
    assert Settings not in pytree.SUPPORTED_NODES


def test_records_keep_what_they_lack() -> None:
    record = MakesRecord(["loss", "logits"])(logits=torch.ones(1))
    for again in (
        copy.deepcopy(record),
        pickle.loads(pickle.dumps(record)),
        pytree.tree_map(lambda leaf: leaf + 0, record),
    ):
        assert type(again) is Record
        assert again.loss is None
        assert not hasattr(again, "hidden")
        assert torch.equal(again.logits, again["logits"])


def test_values_of_other_classes_are_not_the_same() -> None:
    x = torch.ones(1)
    assert same(OrderedDict(a=[x, None, 2]), OrderedDict(a=[x, None, 2]), torch.equal)
    for one, other in (
        (OrderedDict(a=x), {"a": x}),
        ([x], (x,)),
        ({"a": x}, {"b": x}),
        ([x, None], [x]),
        (Inner(x), Outer(x)),
        ([x], [None]),
        (x, 1.0),
    ):
        assert not same(one, other, torch.equal)
