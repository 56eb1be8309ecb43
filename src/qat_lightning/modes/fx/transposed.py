"""Transposed convolutions in a trace, replaced by a convolution with the same parameters and a shuffle."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from qat_lightning.graph.example import Example
from qat_lightning.layers.subpixel import Subpixel, subpixel_of
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.without_arithmetic import on_a_copy

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv1d,
    nn.ConvTranspose2d: F.conv2d,
    nn.ConvTranspose3d: F.conv3d,
}


def subpixel_weight(weight: Tensor, subpixel: tuple[Any, ...]) -> Tensor:
    """`Subpixel.weight`, in a form that a graph can call."""
    return Subpixel(*subpixel).weight(weight)


def subpixel_bias(bias: Tensor, subpixel: tuple[Any, ...]) -> Tensor:
    """`Subpixel.bias`, in a form that a graph can call."""
    return Subpixel(*subpixel).bias(bias)


def called_on_one_sample(network: nn.Module, example: Example) -> set[str]:
    """The names of transposed convolutions with an input without batch dimension, whose channel dimension differs."""
    names = [name for name, module in network.named_modules() if type(module) in _CONVOLUTIONS]
    if not names:
        return set()

    def look(copied: nn.Module, context: AbstractContextManager[Any]) -> set[str]:
        found = set()

        def note(module: Any, args: tuple[Any, ...], name: str) -> None:
            if args and args[0].dim() < module.weight.dim():
                found.add(name)

        for name in names:
            copied.get_submodule(name).register_forward_pre_hook(functools.partial(note, name=name))
        run_apart(copied, example, context)
        return found

    return on_a_copy(network, look)


def write_as_convolutions(
    graph_module: fx.GraphModule, selected: Mapping[str, bool], scopes: dict[str, Any], *, three: bool
) -> None:
    """Replace transposed convolutions by a convolution and ops that move its outputs.

    Weights and biases are computed from the layers' parameters, which stay where they are. The weight is rounded with
    one scale per output channel and phase.

    Args:
        graph_module: A trace; changed in place.
        selected: Whether a layer is to be quantized.
        scopes: The module whose ``forward`` created each node; new nodes get the scope of the layer.
        three: Whether the backend supports 3-d convolutions.
    """
    written = False
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        convolution = _CONVOLUTIONS.get(type(module))
        if convolution is None or (convolution is F.conv3d and not three):
            continue
        if not selected.get(str(node.target), False) or is_parametrized(module) or len(node.args) > 1 or node.kwargs:
            continue
        _write(graph_module.graph, node, module, convolution, scopes)
        written = True
    if written:
        graph_module.recompile()


def _write(graph: fx.Graph, node: fx.Node, module: Any, convolution: Any, scopes: dict[str, Any]) -> None:
    subpixel = subpixel_of(module)
    settings = astuple(subpixel)
    path, ones = str(node.target), (1,) * len(subpixel.stride)
    with graph.inserting_before(node):
        weight = graph.call_function(subpixel_weight, (graph.get_attr(f"{path}.weight"), settings))
        bias = None
        if module.bias is not None:
            bias = graph.call_function(subpixel_bias, (graph.get_attr(f"{path}.bias"), settings))
        arguments = (node.args[0], weight, bias, ones, subpixel.padding, ones, subpixel.groups)
        made = [graph.call_function(convolution, arguments)]
        for name, given in subpixel.moves():
            if name == "getitem":
                made.append(graph.call_function(operator.getitem, (made[-1], *given)))
            else:
                made.append(graph.call_method(name, (made[-1], *given)))
    for new in (*made, *(n for n in (weight, bias) if n is not None)):
        scopes[new.name] = path, type(module)
    node.replace_all_uses_with(made[-1])
    graph.erase_node(node)
