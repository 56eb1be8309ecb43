"""ReLUs that kernels omit, because the grid after them begins at zero and ends at their limit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.layers.relu_rounding import relu_limit
from qat_lightning.modes.fx.passes import DROPOUT_MODULES, is_fake_quantize, is_within
from qat_lightning.numerics.fake_quantize import FakeQuantize


def observe_only_after_relu(prepared: fx.GraphModule) -> list[str]:
    """Remove the FakeQuantize between an op and its ReLU or ReLU6: the one after the ReLU has a finer grid, from 0 up.

    Returns:
        The names of those ReLUs, which the int8 graph omits because the grid clamps in the same way.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    configs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    found: dict[Any, tuple[fx.Node, Any, float]] = {}
    for node in prepared.graph.nodes:
        largest = relu_limit(modules.get(str(node.target)) if node.op == "call_module" else None, node)
        if largest is None or node.target in _UNKNOWN_RELUS:
            continue
        before = node.args[0]
        after = next((user for user in node.users if is_fake_quantize(user, modules)), None)
        if not (isinstance(before, fx.Node) and is_fake_quantize(before, modules)) or after is None:
            continue
        behind = modules[str(after.target)]
        if len(before.users) > 1 or len(node.users) > 1 or not isinstance(behind, FakeQuantize) or behind.symmetric:
            continue
        if not _keeps_the_grid(before.all_input_nodes[0], modules[str(before.target)], modules):
            found[node] = before, after, largest
    alike = _all_with_equal_clamp(prepared.graph, modules, found)
    folded = []
    for node, (before, after, largest) in found.items():
        if node not in alike and modules[str(before.target)] is modules[str(after.target)]:
            continue  # its kernel clamps to the shared grid
        node.replace_input_with(before, before.args[0])
        prepared.graph.erase_node(before)
        if node not in alike:
            continue
        behind = modules[str(after.target)]
        assert isinstance(behind, FakeQuantize)
        behind.begins_at_zero(largest)
        # Without the ReLU, upstream's converter would omit the rounding between two ops that stay float.
        if any(configs.get(other.name, "") is not None for other in (node.args[0], *after.users)):
            folded.append(node.name)
    prepared.recompile()
    return folded


def _all_with_equal_clamp(
    graph: fx.Graph, modules: dict[str, nn.Module], found: dict[Any, tuple[fx.Node, Any, float]]
) -> set[fx.Node]:
    """The ReLUs whose grid is shared only by outputs of such ReLUs, for example in a concatenation.

    Args:
        graph: The prepared graph.
        modules: Modules by name.
        found: The ReLUs, each with the rounding before and after it, and the limit of its range.
    """
    alike = set(found)
    while True:
        taken_out = {found[node][0] for node in alike}
        no_more = {node for node in alike if not _clamps_like_the_others(graph, modules, *found[node][1:], taken_out)}
        if not no_more:
            return alike
        alike -= no_more  # the roundings before these stay, and may share a grid with others


def _clamps_like_the_others(
    graph: fx.Graph, modules: dict[str, nn.Module], after: fx.Node, largest: float, taken_out: set[fx.Node]
) -> bool:
    behind = modules[str(after.target)]
    others = [node for node in graph.find_nodes(op="call_module") if modules.get(str(node.target)) is behind]
    for node in others:
        source = node.args[0]
        if node is after or node in taken_out or not isinstance(source, fx.Node):
            continue
        if is_within(source, behind, modules):
            continue
        limit = relu_limit(modules.get(str(source.target)) if source.op == "call_module" else None, source)
        if limit is None or limit > largest:
            return False
    return True


_UNKNOWN_RELUS = (torch.relu, torch.relu_, F.relu_)
"""ReLUs that upstream leaves float."""


def _keeps_the_grid(node: fx.Node, fq: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether an op's output is on its input's grid (Identity, pooling, dropout), so it cannot clamp to another."""
    if node.op == "call_module" and isinstance(modules.get(str(node.target)), DROPOUT_MODULES):
        return True
    rounded = [source for source in node.all_input_nodes if is_fake_quantize(source, modules)]
    return any(modules[str(source.target)] is fq for source in rounded)
