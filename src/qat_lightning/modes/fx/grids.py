"""One grid for all values that int8 kernels of mode fx keep on one grid, however these ops are connected."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.modes.fx.config import shares_range
from qat_lightning.numerics.fake_quantize import FakeQuantize


def one_grid_where_kernels_keep_it(prepared: fx.GraphModule) -> None:
    """Let all FakeQuantizes around an op that keeps the grid of its input be the same one.

    Upstream processes ops one by one, and gives all inputs of a concatenation the FakeQuantize of the first one. A
    max-pool that was processed earlier and reads another input keeps the replaced FakeQuantize: its output would be
    rounded to a grid that its kernel does not use.

    Args:
        prepared: The result of upstream's prepare; changed in place.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    configs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    grids = _Classes()
    for node in prepared.graph.nodes:
        if configs.get(node.name) is None or not shares_range(_kind(node, modules)):
            continue
        around = [*node.all_input_nodes, *node.users]
        found = [fq for other in around if (fq := _fake_quantize(other, modules)) is not None]
        for fq in found[1:]:
            grids.join(found[0], fq)
    for node in prepared.graph.nodes:
        fq = _fake_quantize(node, modules)
        if fq is not None and (first := grids.first(fq)) is not fq:
            parent, _, leaf = str(node.target).rpartition(".")
            prepared.get_submodule(parent)._modules[leaf] = first


class _Classes:
    """Sets of FakeQuantizes that share a grid (a union-find; the first one represents its set)."""

    def __init__(self) -> None:
        self._before: dict[FakeQuantize, FakeQuantize] = {}

    def first(self, fq: FakeQuantize) -> FakeQuantize:
        while fq in self._before:
            fq = self._before[fq]
        return fq

    def join(self, one: FakeQuantize, other: FakeQuantize) -> None:
        one, other = self.first(one), self.first(other)
        if one is not other:
            self._before[other] = one


def _fake_quantize(node: fx.Node, modules: dict[str, nn.Module]) -> FakeQuantize | None:
    found: Any = modules.get(str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuantize) and found.source != "present" else None


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target
