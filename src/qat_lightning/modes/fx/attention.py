"""Fused attention, split into its two products and the softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.graph.scopes import join, unused_path
from qat_lightning.layers.mode_layers import ByMode
from qat_lightning.layers.transformer import attend

_FUNCTIONS = (F.scaled_dot_product_attention, attend)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

_MASKED = -65504.0
"""The value of a masked score: it vanishes in softmax, and a fully masked row still has finite gradients."""


def attention_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """The arguments of attention, with ``dropout_p`` as in training; None if the node is not attention.

    Args:
        node: It may call the function, or `ByMode` if dropout differs in evaluation.
        modules: Modules by name.
    """
    if node.op == "call_function" and node.target in _FUNCTIONS:
        given = _named(node.args, node.kwargs)
    else:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, ByMode) or module.function not in _FUNCTIONS:
            return None
        given, evaluation = (_named(*module.arguments(node.args, training=train)) for train in (True, False))
        if evaluation.pop("dropout_p", 0.0) != 0.0 or evaluation != {
            k: v for k, v in given.items() if k != "dropout_p"
        }:
            return None
    if not isinstance(given.get("dropout_p", 0.0), (int, float)):
        return None
    return given if all(isinstance(given.get(part), fx.Node) for part in ("query", "key", "value")) else None


def products_of_attention(
    given: Mapping[str, Any], values: Mapping[str, Any], takes: Callable[[Any, Any], bool]
) -> bool:
    """Whether ``takes`` accepts both products of attention; shared key and value heads are repeated first."""
    query, key, value = (values[given[part].name] for part in ("query", "key", "value"))
    if given.get("enable_gqa"):
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = query[..., :1].expand(*query.shape[:-1], key.shape[-2])
    return takes(query, key.transpose(-2, -1)) and takes(scores, value)


def yields_weights(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is attention that also returns its weights, which a file cannot call."""
    return attend in (node.target, getattr(modules.get(str(node.target)), "function", None))


def _named(args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)


def spread(
    prepared: fx.GraphModule, node: fx.Node, given: Mapping[str, Any], values: Mapping[str, Any], scope: str
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Replace attention by its products and the softmax.

    Args:
        prepared: The network; changed in place.
        node: The call of attention; erased.
        given: Its arguments.
        values: Values of the nodes on the example.
        scope: Path of the module that calls attention, which holds the dropout: it may be kept in evaluation while the
            network trains.

    Returns:
        The new nodes, and the two products among them.
    """
    graph, made = prepared.graph, list[fx.Node]()

    def add(op: str, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        made.append(graph.create_node(op, target, args, kwargs, name=f"{node.name}_{name or target}"))
        return made[-1]

    scale = given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(values[given["query"].name].shape[-1])
    key, value = given["key"], given["value"]
    with graph.inserting_before(node):
        if given.get("enable_gqa"):
            heads = values[given["query"].name].shape[-3]
            key, value = (
                add("call_method", "repeat_interleave", part, times, -3, name=f"{name}_of_each") if times > 1 else part
                for name, part in (("key", key), ("value", value))
                if (times := heads // values[part.name].shape[-3])
            )
        key = add("call_method", "transpose", key, -2, -1)
        scores = add("call_function", torch.matmul, given["query"], key, name="scores")
        weights, masked = add("call_function", operator.mul, scores, scale, name="scaled"), None
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            ones = add("call_function", torch.ones_like, weights, name="ones", dtype=torch.bool)
            masked = add("call_method", "logical_not", add("call_method", "tril", ones))
        elif isinstance(mask, fx.Node) and values[mask.name].dtype == torch.bool:
            masked = add("call_method", "logical_not", mask)
        elif mask is not None:
            masked = add("call_function", torch.eq, mask, -math.inf, name="masked")
            weights = add("call_function", operator.add, weights, mask, name="biased")
        if masked is not None:
            weights = add("call_method", "masked_fill", weights, masked, _MASKED)
        weights = add("call_method", "softmax", weights, -1)
        if masked is not None:
            weights = add("call_method", "masked_fill", weights, masked, 0.0, name="without")
        if given.get("dropout_p"):
            path = unused_path(prepared, join(scope, "_attention_dropout"))
            prepared.add_submodule(path, nn.Dropout(given["dropout_p"]))
            weights = add("call_module", path, weights, name="dropout")
        mixed = add("call_function", torch.matmul, weights, value, name="mixed")
    _take_place(prepared, node, mixed, weights)
    return made, [scores, mixed]


def _take_place(prepared: fx.GraphModule, node: fx.Node, mixed: fx.Node, weights: fx.Node) -> None:
    """Replace a call of attention, and of its weights if it returns them, by the new nodes."""
    if yields_weights(node, dict(prepared.named_modules(remove_duplicate=False))):
        for part in list(node.users):
            part.replace_all_uses_with(weights if part.args[1] else mixed)
            prepared.graph.erase_node(part)
    node.replace_all_uses_with(mixed)
    prepared.graph.erase_node(node)
