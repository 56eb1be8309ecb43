"""Products with an addition, such as ``addmm``: the product is int8, the addition stays float."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

_NAMES: dict[str, tuple[str, str]] = {
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
}
"""Functions and methods, and the names of their factors."""

_TARGETS: dict[Any, str] = {name: name for name in _NAMES} | {getattr(torch, name): name for name in _NAMES}


def sum_of(node: fx.Node) -> dict[str, Any] | None:
    """``input``, the factors ``one`` and ``two``, ``beta`` and ``alpha``; None for other nodes."""
    name = _TARGETS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    names = ("input", *_NAMES[name])
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "self" in given:
        given["input"] = given.pop("self")
    if set(given) - {*names, "beta", "alpha"} or not all(isinstance(given.get(part), fx.Node) for part in names):
        return None
    one, two = (given[part] for part in names[1:])
    both = {"input": given["input"], "one": one, "two": two}
    return both | {part: given.get(part, 1) for part in ("beta", "alpha")}


def factors_of(graph: fx.Graph, node: fx.Node, given: Mapping[str, Any]) -> tuple[list[fx.Node], fx.Node, fx.Node]:
    """New nodes, and the factors of one product; a sum of products becomes one of concatenated matrices."""
    one, two = given["one"], given["two"]
    if _TARGETS[node.target] != "addbmm":
        return [], one, two
    turned = graph.call_method("transpose", (one, 0, 1))
    wide, high = graph.call_method("flatten", (turned, 1)), graph.call_method("flatten", (two, 0, 1))
    return [turned, wide, high], wide, high


def add_up(graph: fx.Graph, given: Mapping[str, Any], product: fx.Node) -> list[fx.Node]:
    """The nodes that compute ``beta * input + alpha * product``; the last one is the result."""
    made = [product]
    if given["alpha"] != 1:
        made.append(graph.call_function(operator.mul, (product, given["alpha"])))
    scaled, beta = made[-1], given["beta"]
    if isinstance(beta, (int, float)) and beta == 0:
        return made[1:]  # torch ignores the input then, which may be anything
    added = given["input"]
    if beta != 1:
        made.append(graph.call_function(operator.mul, (added, beta)))
        added = made[-1]
    made.append(graph.call_function(operator.add, (added, scaled)))
    return made[1:]
