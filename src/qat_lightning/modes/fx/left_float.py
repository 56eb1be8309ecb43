"""Mode fx: a layer or op that is left float runs between dequantize and quantize, on the grids around it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from qat_lightning.layers.qat_modules import WITH_RELU, has_relu_inside
from qat_lightning.modes.fx.config import LEFT_FLOAT, backend_config
from qat_lightning.modes.left_float import layer_of, weighted_layers
from qat_lightning.modes.places import rounding_of
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize


def layers_and_ops(prepared: nn.Module) -> list[str]:
    """The layers and ops that can be left float individually, in execution order; ops by the names of their nodes."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    layers = set(weighted_layers(prepared))
    known = {config.pattern for config in backend_config().configs}
    state = prepared_state(prepared)
    found = []
    for node in state.plan.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        names = [layer_of(str(node.target)), *_functional_weights(node, modules)]
        own = next((name for name in names if name in layers), None)
        if own is not None:
            found.append(own)
        elif rounding_of(module) is None and node.name not in {*state.plan.float_ops, *state.plan.dropped}:
            kinds = [node.target] if module is None else list(type(module).__mro__)
            if any(cls in known and cls not in LEFT_FLOAT for cls in kinds):
                found.append(node.name)
    return list(dict.fromkeys(found))


def float_nodes(prepared: nn.Module, names: Collection[str]) -> list[str]:
    """The names of the nodes that run the layers and ops left float."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    return [
        node.name
        for node in prepared_state(prepared).plan.graph.nodes
        if node.name in names
        or (node.op == "call_module" and layer_of(str(node.target)) in names)
        or any(name in names for name in _functional_weights(node, modules))
    ]


def _functional_weights(node: fx.Node, modules: dict[str, nn.Module]) -> list[str]:
    """The layers that own the rounded weights of a function call."""
    if node.op != "call_function":
        return []
    owners = []
    for source in node.all_input_nodes:
        fq = rounding_of(modules.get(str(source.target))) if source.op == "call_module" else None
        if fq is not None and fq.source == "present":
            while source.op != "get_attr" and source.all_input_nodes:
                source = source.all_input_nodes[0]
            owners.append(str(source.target).rpartition(".")[0].partition(".parametrizations")[0])
    return owners


def take_out_never_rounding(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Remove the FakeQuantizes of functions' weights that are left float from a graph that is about to be converted."""
    for node in list(graph.nodes):
        fq = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(fq, FakeQuantize) and fq.left_float:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def put_float_layers(int8: fx.GraphModule) -> None:
    """Replace each training layer that is left float by the float layer, with BatchNorm folded in."""
    for name, layer in list(int8.named_modules()):
        fq = layer._modules.get("weight_fake_quant")
        if isinstance(fq, FakeQuantize) and fq.left_float:
            int8.set_submodule(name, _float_layer(layer))


def _float_layer(layer: Any) -> nn.Module:
    if "_batchnorm" in layer.__dict__:
        folded: nn.Module = layer.to_float()
        return folded
    cls = next(plain for plain in WITH_RELU if isinstance(layer, plain))
    plain = cls.__new__(cls)
    plain.__dict__.update({key: value for key, value in layer.__dict__.items() if key != "qconfig"})
    for contents in ("_parameters", "_buffers", "_modules"):
        plain.__dict__[contents] = layer.__dict__[contents].copy()
    del plain._modules["weight_fake_quant"]
    return WITH_RELU[cls](plain, nn.ReLU()).eval() if has_relu_inside(layer) else plain
