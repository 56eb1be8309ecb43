"""Parameters that a graph reads directly: weights of functions, computed weights, and parameters of called layers.

Upstream's prepare and convert replace layers by modules in which these tensors are missing, or are methods; and convert
rounds the weights of layers, although other readers do not see them rounded in training. So such tensors get separate
names in the meantime.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from qat_lightning.layers.operators import rows
from qat_lightning.layers.qat_modules import round_for_good
from qat_lightning.modes.fx.passes import hide_float_ops
from qat_lightning.numerics.fake_quantize import FakeQuantize


def set_aside(root: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Give tensors of called modules that the graph reads directly temporary names in ``root``.

    Returns:
        For each temporary name, the original path.
    """
    names: dict[str, str] = {}
    for node in _inside_called(graph, "get_attr"):
        value = operator.attrgetter(str(node.target))(root)
        if not isinstance(value, Tensor):
            continue
        name = _fresh(root, "_read_" + str(node.target).replace(".", "_"))
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value, persistent=False)
        names[name] = str(node.target)
        node.target = name
    return names


def call_apart(root: nn.Module, graph: fx.Graph) -> None:
    """Give modules that are called inside of other called modules, such as a BatchNorm's activation, separate names."""
    for node in _inside_called(graph, "call_module"):
        name = _fresh(root, str(node.target).replace(".", "_"))
        root.add_module(name, root.get_submodule(str(node.target)))
        node.target = name


def _inside_called(graph: fx.Graph, op: str) -> list[fx.Node]:
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    found = []
    for node in graph.find_nodes(op=op):
        parts = str(node.target).split(".")
        if any(".".join(parts[:end]) in called for end in range(1, len(parts))):
            found.append(node)
    return found


def put_back(root: nn.Module, graph: fx.Graph, names: dict[str, str]) -> None:
    """Undo `set_aside`."""
    for node in graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)
    for name in names:
        if hasattr(root, name):
            delattr(root, name)


def weights_from_inputs(prepared: fx.GraphModule) -> list[str]:
    """Remove the rounding of weights that depend on the network's inputs, which no kernel can pack.

    Returns:
        The names of the nodes with these weights, which stay float.
    """
    float_ops = []
    for node in _weights(prepared, prepared.graph):
        if not is_constant(node.args[0]):
            float_ops += [user.name for user in node.users]
            node.replace_all_uses_with(node.all_input_nodes[0])
            prepared.graph.erase_node(node)
    prepared.recompile()
    return float_ops


def hide_parametrized(graph_module: fx.GraphModule) -> Callable[[fx.GraphModule], None]:
    """Hide layers with a computed weight from upstream, which would fuse them with the following modules.

    Returns:
        A function that restores them in the prepared graph.
    """
    nodes = graph_module.graph.find_nodes(op="call_module")
    layers = {node.name: graph_module.get_submodule(str(node.target)) for node in nodes}
    computed = {name: layer for name, layer in layers.items() if is_parametrized(layer)}
    for layer in computed.values():
        layer.qconfig = None  # type: ignore[assignment]  # as upstream marks what it leaves float
    return hide_float_ops(graph_module, list(computed))


def compute_weights_for_good(network: nn.Module, graph: fx.Graph) -> None:
    """Turn layers with a computed weight into plain layers, which a file can store, where the graph only calls them."""
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    for path, module in list(network.named_modules()):
        names: Any = module._modules.get("parametrizations")
        if not is_parametrized(module) or any(f"{path}.parametrizations.{name}" in called for name in names):
            continue
        computed = {name: getattr(module, name).detach().clone() for name in names}
        # Upstream's remove_parametrizations changes the class as well, which the user's own layer still has.
        module.__class__ = type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in computed.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)


@torch.no_grad()
def materialize_weights_of_functions(root: nn.Module, graph: fx.Graph) -> None:
    """Create the per-channel state of the FakeQuantizes of these weights, before training begins."""
    for node in _weights(root, graph):
        _fake_quantize(root, node).materialize(constant_value(root, node.args[0]))


@torch.no_grad()
def round_weights_of_functions(root: nn.Module, graph: fx.Graph) -> None:
    """Compute each of these weights as in training and round it, in the form that conversion packs.

    Other readers of the parameters still read the original values.
    """
    for number, node in enumerate(_weights(root, graph)):
        name = _fresh(root, f"_weight_{number}")
        rounded = round_for_good(constant_value(root, node.args[0]), _fake_quantize(root, node))
        root.register_parameter(name, nn.Parameter(rounded, requires_grad=False))
        with graph.inserting_before(node):
            weight = graph.get_attr(name)
        before = node.all_input_nodes[0]
        node.replace_input_with(before, weight)
        _erase_unread(graph, before)


@torch.no_grad()
def compute_biases_of_functions(root: nn.Module, graph: fx.Graph) -> None:
    """Compute once each bias of a function that depends on parameters, such as a concatenation of them.

    Computed as in training, and rounded if it is on a grid; a kernel can only pack a plain tensor.
    """
    for number, node in enumerate(node for node in graph.nodes if node.target in _WITH_BIAS):
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if not isinstance(bias, fx.Node) or bias.op == "get_attr" or not is_constant(bias):
            continue
        name = _fresh(root, f"_bias_{number}")
        root.register_parameter(name, nn.Parameter(constant_value(root, bias).detach().clone(), requires_grad=False))
        with graph.inserting_before(node):
            node.replace_input_with(bias, graph.get_attr(name))
        _erase_unread(graph, bias)


_WITH_BIAS = tuple(function for row in rows("convolution", "linear") for function in row.functions)


def _weights(root: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """The nodes that round weights of functions; weights of layers are rounded inside the layers."""
    modules = dict(root.named_modules(remove_duplicate=False))
    called = [(node, modules.get(str(node.target))) for node in graph.find_nodes(op="call_module")]
    return [node for node, module in called if isinstance(module, FakeQuantize) and module.source == "present"]


def _fake_quantize(root: nn.Module, node: fx.Node) -> FakeQuantize:
    found: FakeQuantize = root.get_submodule(str(node.target))  # type: ignore[assignment]
    return found


def is_constant(node: Any) -> bool:
    """Whether a value depends on parameters and buffers only."""
    if node.op == "get_attr":
        return True
    return node.op != "placeholder" and bool(node.all_input_nodes) and all(map(is_constant, node.all_input_nodes))


def constant_value(root: nn.Module, node: Any) -> Any:
    """The value of a node that `is_constant`."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(root)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: constant_value(root, source))
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _erase_unread(graph: fx.Graph, node: Any) -> None:
    if not node.users and node.op != "placeholder":
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            if source in graph.nodes:
                _erase_unread(graph, source)


def _fresh(root: nn.Module, name: str) -> str:
    while hasattr(root, name):
        name += "_"
    return name
