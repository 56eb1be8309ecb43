"""Which value of fake-quant each node of an int8 graph should have.

Upstream's converter drops nodes, fuses them, and creates new ones under new names. It passes the stack trace of an old
node on to the node that replaces it, so each node's name is stored there before conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qat_lightning.modes.judging import Grid
from qat_lightning.modes.shared_range import SharedRange, UnionObserver
from qat_lightning.numerics.fake_quantize import FakeQuantize

_MARK = "fake-quant's node: "


def mark_origins(graph: fx.Graph) -> None:
    """Store the name of each node where upstream's converter preserves it.

    Args:
        graph: The graph that is about to be converted.
    """
    for node in graph.nodes:
        node.stack_trace = f"{_MARK}{node.name}"


def take_origins(graph: fx.Graph) -> dict[str, str]:
    """For each node of a converted graph, the name of the node it was made from; the stored names are removed.

    Args:
        graph: The result of converting a graph after `mark_origins`.
    """
    found = {}
    for node in graph.nodes:
        trace = node.stack_trace or ""
        if trace.startswith(_MARK):
            found[node.name] = trace.removeprefix(_MARK)
            node.stack_trace = None
    return found


@dataclass(frozen=True)
class Rounding:
    """Where fake-quant has the value of an op that returns integers.

    Attributes:
        exact: The node before rounding.
        rounded: The node after rounding; ``exact`` itself if it is on the grid of its inputs.
    """

    exact: fx.Node
    rounded: fx.Node


class Alignment:
    """Finds the nodes of a prepared graph that correspond to nodes of an int8 graph.

    Args:
        prepared: Holds the FakeQuantizes.
        graph: The graph that trains.
        origins: The result of `take_origins` for the int8 graph.
    """

    def __init__(self, prepared: nn.Module, graph: fx.Graph, origins: dict[str, str]) -> None:
        self.modules = dict(prepared.named_modules(remove_duplicate=False))
        self.nodes = {node.name: node for node in graph.nodes}
        self.origins = origins
        self.kept = set(origins.values())

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The op of fake-quant for a node of the int8 graph; None for nodes that exist only in that graph."""
        return self.nodes.get(self.origins.get(node.name, ""))

    def fake_quantizer(self, node: fx.Node) -> FakeQuantize | None:
        """The FakeQuantize that ``node`` calls; None for any other node."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, SharedRange):
            module = module.__dict__["fq"]
        return module if isinstance(module, FakeQuantize) and not module.left_float else None

    def observes(self, node: fx.Node) -> bool:
        """Whether a node rounds activations."""
        fq = self.fake_quantizer(node)
        return fq is not None and fq.observed

    def rounding(self, node: fx.Node, grid: Grid) -> Rounding:
        """Where the output of an op, with the ops fused into it, is rounded to ``grid``.

        If it is rounded to other grids only, the value on the first of them, which int8 has to match.
        """
        other: Rounding | None = None
        waiting, last = [node], node
        while waiting:
            current = waiting.pop(0)
            for user in current.users:
                fq = self.fake_quantizer(user)
                if fq is None:
                    if self._is_gone(user):
                        waiting.append(user)
                        last = user
                    continue
                found = Rounding(current, user)
                scale, zero_point = fq.calculate_qparams()
                if scale.numel() == 1 and grid.same(Grid(float(scale), int(zero_point))):
                    return found
                other = other or Rounding(user, user)
                waiting.append(user)
        return other or Rounding(last, last)

    def end_of_fusion(self, node: fx.Node) -> fx.Node:
        """The last float op that is fused with ``node`` in int8."""
        while len(node.users) == 1 and self._is_gone(user := next(iter(node.users))):
            node = user
        return node

    def _is_gone(self, node: fx.Node) -> bool:
        """Whether int8 omits an op, because another op computes it or it does nothing in evaluation."""
        module: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if node.op == "output" or isinstance(module, UnionObserver) or self.fake_quantizer(node) is not None:
            return False
        return node.name not in self.kept and len(node.all_input_nodes) == 1
