"""Zero padding of images in mode fx, which upstream leaves float: every grid contains zero, so integers can be padded.

Networks ported from TensorFlow (EfficientNet, MobileNet) pad asymmetrically, which no convolution of torch supports. In
float, each such pad would cost a dequantization and a quantization of the whole image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.layers.padding import pad
from qat_lightning.numerics.fake_quantize import FakeQuantize

_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def name_zero_pads(graph_module: fx.GraphModule, selected: dict[str, bool]) -> None:
    """Use `qat_lightning.layers.padding.pad` for zero padding that is read only by convolutions that become int8.

    Args:
        graph_module: The traced float network.
        selected: Whether each module, by name, is to be quantized.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in graph_module.graph.nodes:
        found = _zeros_around(node, modules)
        if found is None or not all(_is_convolution(user, modules, selected) for user in node.users):
            continue
        node.op, node.target = "call_function", pad
        node.args, node.kwargs = found, {}
    graph_module.recompile()


def _is_convolution(node: fx.Node, modules: dict[str, nn.Module], selected: dict[str, bool]) -> bool:
    layer = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and selected.get(str(node.target), False)


def _zeros_around(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The node that a zero padding reads, and the amounts; None if a node does something else."""
    if node.op == "call_module":
        module: Any = modules.get(str(node.target))
        zeros = isinstance(module, _ZERO_PADS) or (isinstance(module, _CONSTANT_PADS) and module.value == 0)
        hooks = zeros and (module._forward_hooks or module._forward_pre_hooks)
        return None if not zeros or hooks else _if_known(node.args[0], module.padding)
    if node.op != "call_function" or node.target is not F.pad:
        return None
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        return None
    return _if_known(given["input"], given["pad"])


def _if_known(input: Any, amounts: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    known = isinstance(amounts, (tuple, list)) and all(isinstance(amount, int) and amount >= 0 for amount in amounts)
    return (input, tuple(amounts)) if known and isinstance(input, fx.Node) else None


def observe_behind_infinite_pads(prepared: fx.GraphModule) -> None:
    """Observe and round after the max-pool rather than before it: padding with minus infinity has no finite range.

    Args:
        prepared: The result of upstream's prepare; changed in place. The range keeps its name in checkpoints.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    for node in list(prepared.graph.nodes):
        fq = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(fq, FakeQuantize) or not _pads_with_infinity(node.args[0], modules):
            continue
        for other in prepared.graph.find_nodes(op="call_module"):
            if modules.get(str(other.target)) is fq:
                other.target = node.target
        node.replace_all_uses_with(node.args[0])
        prepared.graph.erase_node(node)
    prepared.recompile()


def _pads_with_infinity(node: Any, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules.get(str(node.target))
        value: Any = module.value if isinstance(module, _CONSTANT_PADS) else 0
    else:
        padded = node.op == "call_function" and node.target is F.pad
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        value = given.get("value") if padded else 0
    return isinstance(value, float) and math.isinf(value)


def roundings_behind(graph: fx.Graph) -> list[str]:
    """The names of roundings of padded values, which training omits: the values are on that grid already."""
    return [user.name for node in graph.nodes if node.target is pad for user in node.users]


def pad_integers(int8: fx.GraphModule) -> None:
    """In a converted graph, pad the integers instead of their dequantized values."""
    for node in list(int8.graph.nodes):
        if node.target is not pad:
            continue
        source = node.args[0]
        if source.op != "call_method" or source.target != "dequantize":
            continue
        node.replace_input_with(source, source.args[0])
        if not source.users:
            int8.graph.erase_node(source)
        readers = list(node.users)
        with int8.graph.inserting_after(node):
            plain = int8.graph.call_method("dequantize", (node,))
        for reader in readers:
            if reader.target is torch.quantize_per_tensor:
                reader.replace_all_uses_with(node)
                int8.graph.erase_node(reader)
            else:
                reader.replace_input_with(node, plain)
        if not plain.users:
            int8.graph.erase_node(plain)
    int8.recompile()
