"""Places without an observed finite range have no grid: in mode fx they stay float, and are reported."""

from __future__ import annotations

from typing import Any

import torch.ao.nn.quantized.reference as nnqr
from torch import fx, nn

from qat_lightning.numerics.fake_quantize import FakeQuantize


def take_out_unseen(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Remove FakeQuantizes without a range from a graph that is about to be converted.

    Returns:
        The nodes before those that were to round; a move of a sum that is left unrounded has none either.
    """
    sources = []
    for node in list(graph.nodes):
        fq = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(fq, FakeQuantize) and fq.observed and not fq.seen:
            if not fq.left_float:
                sources.append(node.args[0])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return sources


def knows_no_range(network: nn.Module) -> bool:
    """Whether there are FakeQuantizes that observe, and none of them has a range."""
    observed = [fq for fq in network.modules() if isinstance(fq, FakeQuantize) and fq.observed]
    return bool(observed) and not any(fq.seen for fq in observed)


def in_words(nodes: list[fx.Node]) -> str:
    """Describe these places in a message."""
    names = dict.fromkeys(
        f"the input {node.name!r}" if node.op == "placeholder" else f"the output of {_name(node)!r}" for node in nodes
    )
    return ", ".join(names)


def _name(node: fx.Node) -> Any:
    return node.target if node.op == "call_module" else node.name


def put_plain_layers(int8: fx.GraphModule) -> set[str]:
    """Replace upstream's reference layers, which it leaves where it cannot lower to int8, by plain ones.

    Their weights are on their grids, as in training.

    Returns:
        The names of the layers.
    """
    names = set()
    for name, module in list(int8.named_modules()):
        if isinstance(module, (nnqr.Linear, nnqr.Conv1d, nnqr.Conv2d, nnqr.Conv3d)):
            int8.set_submodule(name, _plain(module))
            names.add(name)
    modules = dict(int8.named_modules())
    for node in list(int8.graph.nodes):
        fused = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(fused, nn.Sequential) and f"{node.target}.0" in names:
            _call_one_by_one(node, fused)
    return names


def _call_one_by_one(node: fx.Node, fused: nn.Sequential) -> None:
    """Call a layer and its ReLU separately, which upstream has as one module."""
    value: Any = node.args[0]
    for part in fused._modules:
        with node.graph.inserting_before(node):
            value = node.graph.call_module(f"{node.target}.{part}", (value,))
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _plain(reference: Any) -> nn.Module:
    bias = reference.bias is not None
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    if isinstance(reference, nnqr.Linear):
        layer = nn.Linear(reference.in_features, reference.out_features, bias)
    else:
        kinds: dict[Any, Any] = {nnqr.Conv1d: nn.Conv1d, nnqr.Conv2d: nn.Conv2d, nnqr.Conv3d: nn.Conv3d}
        layer = kinds[type(reference)](
            reference.in_channels,
            reference.out_channels,
            reference.kernel_size,
            reference.stride,
            reference.padding,
            reference.dilation,
            reference.groups,
            bias,
            reference.padding_mode,
        )
    layer.weight = nn.Parameter(reference.get_weight().detach().float(), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(reference.bias.detach().float(), requires_grad=False)
    return layer.eval()
