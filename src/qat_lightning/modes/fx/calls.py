"""Rewriting the calls of a traced graph to the form that upstream's prepare and convert expect."""

from __future__ import annotations

import inspect
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.utils._pytree import tree_leaves

from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.batchnorm import has_statistics, is_batchnorm
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.recording import example_values, run_of

_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION_DEFAULTS = (None, None, None, 1, 0, 1, 1)


def give_operands_by_position(graph_module: fx.GraphModule) -> None:
    """Write tensors that are given by keyword, as in ``layer(input=x)``, in their places: upstream looks only there."""
    for node in graph_module.graph.nodes:
        if not node.kwargs or node.op not in ("call_module", "call_function", "call_method"):
            continue
        for name in _names_in_order(node, graph_module):
            if not any(isinstance(leaf, fx.Node) for leaf in tree_leaves(node.kwargs.get(name))):
                break
            node.args = (*node.args, node.kwargs[name])
            node.kwargs = {other: value for other, value in node.kwargs.items() if other != name}


def _names_in_order(node: fx.Node, graph_module: fx.GraphModule) -> list[str]:
    """The names of the parameters that may come next by position, of a layer or a function of torch."""
    called: Any = node.target
    if node.op == "call_module":
        called = graph_module.get_submodule(str(node.target)).forward
    elif node.op == "call_method":
        called = getattr(torch, str(node.target), None)
    elif not isinstance(called, BuiltinFunctionType) and not str(called.__module__).startswith("torch"):
        return []  # a container, for example, whose fields have names
    try:
        signatures = [inspect.signature(called)]
    except (TypeError, ValueError):  # a builtin function
        signatures = get_signature_for_torch_op(called) or [] if called is not None else []
    for signature in signatures:
        given = signature.parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in given):  # F.max_pool2d and the like
            return [] if node.args else ["input"]
        if node.kwargs.keys() <= {*[parameter.name for parameter in given][len(node.args) :]}:
            by_position = [parameter.name for parameter in given if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
            return by_position[len(node.args) :]
    return []


def give_all_arguments(graph: fx.Graph) -> None:
    """Write functional convolutions with all arguments in order, as upstream's lowering expects."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.conv1d, F.conv2d, F.conv3d):
            given = dict(zip(_CONVOLUTION_ARGUMENTS, node.args, strict=False)) | node.kwargs
            defaults = zip(_CONVOLUTION_ARGUMENTS, _CONVOLUTION_DEFAULTS, strict=True)
            weight, bias, *rest = (given.get(name, default) for name, default in list(defaults)[1:])
            dims = 1 + [F.conv1d, F.conv2d, F.conv3d].index(node.target)
            each = [(value,) * dims if isinstance(value, int) else value for value in rest[:3]]
            node.args = (given["input"], weight, bias, *each, rest[3])
            node.kwargs = {}


def read_what_was_written(graph_module: fx.GraphModule) -> None:
    """Let readers of a tensor after ``x.relu_()`` or the like read the result of that call.

    It is the same tensor. But nodes inserted between a tensor and its readers, such as its rounding, come right after
    the tensor is created, and would miss the later write.
    """
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if writes_in_place(node, module) and node.args and isinstance(node.args[0], fx.Node):
            node.args[0].replace_all_uses_with(
                node,
                delete_user_cb=lambda user, node=node: order[user] > order[node],  # type: ignore[misc]
            )


_STATELESS = (nn.ReLU, nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)
"""Layers without a range of their own, which can be shared by several calls."""


def one_module_a_call(graph_module: fx.GraphModule) -> None:
    """Give each call of a shared layer its own module, with the same parameters.

    Each call has its own output range, and one may be followed by a BatchNorm to fold while another is not. Layers with
    buffers (BatchNorm) stay shared, because their buffers would no longer be shared after moving to another device.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(graph_module.get_submodule(str(node.target)), []).append(node)
    for module, nodes in calls.items():
        shareable = isinstance(module, _STATELESS) or any(True for _ in module.buffers())
        if shareable or any(True for _ in module.children()):
            continue
        for number, node in enumerate(nodes[1:], start=1):
            alias = module.__class__.__new__(module.__class__)
            alias.__dict__.update(module.__dict__)
            alias.__dict__["_parameters"] = module._parameters.copy()
            name = f"{node.target}_call_{number}"
            graph_module.add_submodule(name, alias)
            node.target = name
    graph_module.recompile()


def unfoldable_batchnorms(graph_module: fx.GraphModule, example: Example) -> list[nn.Module]:
    """BatchNorms that cannot be folded.

    They are called several times, have no running statistics, or normalize another dimension than the channels of the
    layer before them.

    Args:
        graph_module: A trace.
        example: One call of it.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(graph_module.get_submodule(str(node.target)), []).append(node)
    batchnorms = {module: nodes for module, nodes in calls.items() if is_batchnorm(module)}
    others = _normalizing_no_channels(graph_module, [node for nodes in batchnorms.values() for node in nodes], example)
    return [
        module
        for module, nodes in batchnorms.items()
        if len(nodes) > 1 or not has_statistics(module) or not others.isdisjoint(nodes)
    ]


def _normalizing_no_channels(graph_module: fx.GraphModule, calls: list[fx.Node], example: Example) -> set[fx.Node]:
    """The calls of a BatchNorm whose dimension 1 is not that of the channels of the layer before it.

    It is not after a linear layer with token inputs, nor after a convolution of one sample without a batch dimension.
    """
    behind: dict[fx.Node, tuple[fx.Node, Any]] = {}
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        batchnorm, layer = (graph_module.get_submodule(str(call.target)) for call in (node, source))
        # A BatchNorm of images or volumes takes one number of dimensions only.
        if isinstance(batchnorm, nn.BatchNorm1d) and isinstance(getattr(layer, "weight", None), Tensor):
            behind[node] = source, layer
    if not behind:
        return set()
    with evaluating(graph_module):
        values = run_of(graph_module, graph_module.graph, example_values(graph_module.graph, example))
    return {node for node, (source, layer) in behind.items() if values[source.name].dim() != layer.weight.dim()}


_LOOKS = {"size", "dim", "numel", "eq", "ne", "getattr", "getitem"}
"""Names of functions and methods that only query their inputs."""


def drop_unread(graph: fx.Graph) -> None:
    """Drop queries whose result is unused, such as a shape for a message: they would prevent fusion."""
    for node in reversed(list(graph.nodes)):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not node.users and (
            node.op == "get_attr" or (node.op in ("call_function", "call_method") and name in _LOOKS)
        ):
            graph.erase_node(node)
