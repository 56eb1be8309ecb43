"""Repairing a graph that a quantizer has traced again: original names, and no symbolic sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import NetworkError

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def tensors_by_identity(graph_module: fx.GraphModule) -> dict[int, tuple[str, Tensor]]:
    """The parameters and buffers that a graph reads, with their names, by ``id``."""
    found = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        holder, _, leaf = str(node.target).rpartition(".")
        value = getattr(graph_module.get_submodule(holder), leaf)
        if isinstance(value, Tensor):
            found[id(value)] = str(node.target), value
    return found


def restore(graph_module: fx.GraphModule, known: dict[int, tuple[str, Tensor]]) -> None:
    """Restore the names of the tensors, read them first, and take sizes from the inputs.

    Quantizers may trace the graph again. That renames the parameters to ``_param_constant0`` and so on, and replaces
    the size of a tensor by the symbol of the batch size. Some quantizers refuse graphs that query sizes.

    Args:
        graph_module: The result of the quantizer's ``transform_for_annotation``; changed in place.
        known: Result of `tensors_by_identity` for the graph before.

    Raises:
        NetworkError: A size is computed in a way that the graph no longer contains.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        holder, _, leaf = str(node.target).rpartition(".")
        value = getattr(graph_module.get_submodule(holder), leaf)
        name, _ = known.get(id(value), (node.target, value))
        if name != node.target:
            _attach(graph_module, str(name), value)
            node.target = name
            node._rename(str(name).replace(".", "_"))
    _read_first(graph)
    _take_sizes_from_inputs(graph)
    graph.lint()


def _attach(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    holder = root
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if leaf in holder._parameters or leaf in holder._buffers:
        return
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value)


def _read_first(graph: fx.Graph) -> None:
    """Move nodes that read a tensor to the front, as in captured graphs."""
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        if node is not first:
            first.prepend(node)


def _take_sizes_from_inputs(graph: fx.Graph) -> None:
    """Write -1 for the single unknown size of a reshape, and query an input for all others."""
    inputs = _Inputs(graph)
    for node in list(graph.nodes):
        if node.target in (*_RESHAPES, aten.expand.default):
            # As traced, with numbers for all sizes that the example determines.
            shape = [_number(size) for size in node.meta["val"].shape]
            known = node.args[0].meta["val"].shape if node.target is aten.expand.default else ()
            unknown = [position for position, size in enumerate(shape) if isinstance(size, torch.SymInt)]
            kept = [position for position in unknown if len(known) == len(shape) and _same(known, shape, position)]
            for position in kept if known else unknown[:1] if len(unknown) == 1 else ():
                shape[position] = -1
            node.args = (node.args[0], shape, *node.args[2:])
        node.args = inputs.asked(node.args)
        node.kwargs = {key: inputs.asked(value) for key, value in node.kwargs.items()}
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and isinstance(node.meta.get("val"), torch.SymInt):
            graph.erase_node(node)


def _same(one: Any, other: Any, position: int) -> bool:
    return str(one[position]) == str(other[position])


def _number(size: Any) -> Any:
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if known is None else known


class _Inputs:
    """The symbols for sizes of inputs, and the nodes that query them, created on demand."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.last = graph, graph.find_nodes(op="placeholder")[-1]
        self.made: dict[str, fx.Node] = {}
        self.sizes: dict[str, tuple[fx.Node, int]] = {}
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(str(size.node.expr), (node, dim))

    def asked(self, argument: Any) -> Any:
        """An argument with each symbol replaced by a node or a number."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.asked(inner) for inner in argument)
        if not isinstance(argument, torch.SymInt):
            return argument
        known = _number(argument)
        return self._node(argument) if known is argument else known

    def _node(self, size: torch.SymInt) -> fx.Node:
        symbol = str(size.node.expr)
        if symbol not in self.sizes:
            raise NetworkError(
                f"The quantizer traced the network again, and a size in it is now {symbol}, which is not the size of "
                "an input: leave the part that reshapes out of the network (module=...)."
            )
        if symbol not in self.made:
            with self.graph.inserting_after(self.last):
                self.made[symbol] = self.graph.call_function(aten.sym_size.int, self.sizes[symbol])
            self.made[symbol].meta["val"] = size
        return self.made[symbol]


@contextmanager
def shown_channels_last(graph: fx.Graph) -> Iterator[None]:
    """Within the block, images are marked as channels-last in memory, as a runtime will have them.

    Quantizers check the memory format of the trace, which does not affect the values in training.
    """
    shown = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "call_function") and isinstance(value, Tensor) and value.dim() == 4:
            shown[node] = value
            node.meta["val"] = value.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for node, value in shown.items():
            node.meta["val"] = value
