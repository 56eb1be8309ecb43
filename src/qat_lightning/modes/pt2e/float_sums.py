"""Sums that only a softmax or normalization reads are not rounded in mode pt2e, as in mode fx.

XNNPACK's quantizer rounds every addition, including that of a mask of minus 3e38 to attention scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qat_lightning.layers.operators import MOVES
from qat_lightning.modes.float_sums import FLOAT_READERS, SUMS

_MOVES = MOVES | {"_unsafe_view"}


def leave_sums_unrounded(graph: fx.Graph) -> None:
    """Remove the annotations of sums that only float ops read, and of ops that move these.

    Args:
        graph: Annotated by a quantizer; its nodes' meta is changed.
    """
    found = set[fx.Node]()
    for node in reversed(graph.nodes):
        if _name(node) not in SUMS | _MOVES or not node.users:
            continue
        if all(user in found or _name(user) in FLOAT_READERS for user in node.users):
            found.add(node)
            node.meta.pop(Q_ANNOTATION_KEY, None)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""
