"""Sums that only a softmax or a normalization reads are not rounded in mode pt2e, as in mode fx.

XNNPACK's quantizer rounds every addition, the one of a mask of minus 3e38 to the scores of attention among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

ANNOTATION = "quantization_annotation"
"""Where upstream's quantizers leave in a node's meta what is rounded."""

_FLOAT = frozenset(
    {"softmax", "_softmax", "_safe_softmax", "log_softmax", "layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
)
_SUMS = frozenset({"add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "where"})
_MOVES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "expand", "contiguous"}
    | {"clone", "to", "_to_copy", "_unsafe_view"}
)


def leave_sums_unrounded(graph: fx.Graph) -> None:
    """Take the annotations from sums that only float ops read, and from what moves these.

    Args:
        graph: Annotated by a quantizer; its nodes' meta is changed.
    """
    found = set[fx.Node]()
    for node in reversed(graph.nodes):
        if _name(node) not in _SUMS | _MOVES or not node.users:
            continue
        if all(user in found or _name(user) in _FLOAT for user in node.users):
            found.add(node)
            node.meta.pop(ANNOTATION, None)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""
