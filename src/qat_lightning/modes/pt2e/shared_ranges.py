"""One range for several tensors, observed once per batch.

Upstream's quantizers let tensors share a range where a kernel needs it (the inputs of a concatenation, both sides of a
pooling). Every call of the shared FakeQuantize would then update the average: the narrower output of a pooling would
shrink the range of its input, and a concatenation would get the mean of its inputs' ranges instead of their union.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qat_lightning.layers.operators import OPERATORS
from qat_lightning.modes.shared_range import SharedRange, UnionObserver
from qat_lightning.numerics.fake_quantize import FakeQuantize

aten = torch.ops.aten

_WITHIN_RANGE = frozenset(overload for row in OPERATORS if row.within_range for overload in row.overloads)
"""Ops whose output is always within the range of their inputs and 0."""


def observe_once(root: nn.Module, graph: fx.Graph) -> None:
    """Make every shared FakeQuantize of a training graph observe once per batch; modules are added to ``root``."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_module"):
        fq = root.get_submodule(str(node.target))
        if isinstance(fq, FakeQuantize) and fq.observed:
            calls.setdefault(str(node.target), []).append(node)
    for target, nodes in calls.items():
        if len(nodes) < 2:
            continue
        in_order = sorted(nodes)
        sources = [node for node in in_order if not _is_within(node.args[0], target)]
        if len(sources) > 1:
            _observe_union(root, graph, target, sources)
        rounding = f"{target}_again"
        for node in in_order:
            if len(sources) > 1 or node not in sources:
                _add(root, rounding, SharedRange)
                node.target = rounding


def _observe_union(root: nn.Module, graph: fx.Graph, target: str, sources: list[fx.Node]) -> None:
    """Observe after the last of the tensors; the earlier ones are rounded with the range of the batch before."""
    _add(root, f"{target}_union", UnionObserver)
    with graph.inserting_before(sources[-1]):
        graph.call_module(f"{target}_union", tuple(node.args[0] for node in sources))


def _is_within(node: Any, target: str) -> bool:
    """Whether a tensor consists of values that this FakeQuantize rounded, and has no wider range."""
    if node.op == "call_module" and node.target == target:
        return True
    if node.op != "call_function" or node.target not in _WITHIN_RANGE:
        return False
    return all(_is_within(source, target) for source in node.all_input_nodes if _is_float(source))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and node.target is not aten.sym_size.int


def _add(root: nn.Module, name: str, cls: type[SharedRange] | type[UnionObserver]) -> None:
    holder, _, leaf = name.rpartition(".")
    parent = root.get_submodule(holder)
    if leaf not in parent._modules:
        fq = root.get_submodule(name.removesuffix("_again").removesuffix("_union"))
        assert isinstance(fq, FakeQuantize)
        parent.add_module(leaf, cls(fq))
