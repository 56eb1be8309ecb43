"""The module tree of a prepared network: names and order of the float network, restored after upstream's changes."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.errors import NetworkError
from qat_lightning.graph.module_order import order_as
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart, KeepsExtraState, has_extra_state


def restore_children(
    result: GraphNetwork, originals: dict[str, nn.Module], parameters: dict[str, nn.Parameter], float_network: nn.Module
) -> None:
    """Restore modules that upstream's fusion removed, mainly BatchNorm, so that every float key survives."""
    for name, module in originals.items():
        if name and (any(p is not None for p in module._parameters.values()) or module._buffers):
            _restore(result, name, module)
    for name, parameter in parameters.items():
        parent, _, leaf = name.rpartition(".")
        holder = _holder(result, parent)
        if leaf not in holder._parameters:
            holder.register_parameter(leaf, parameter)
    _keep_buffers(result, originals)
    for name, module in float_network.named_modules():
        if has_extra_state(module) and isinstance(part := _holder(result, name), KeepsExtraState):
            part.keep_extra_state_of(module)
    missing = set(float_network.state_dict()) - set(result.state_dict())
    if missing:
        raise NetworkError(
            f"mode='fx' would lose entries of the float state_dict: {', '.join(sorted(missing))}. Use mode='pt2e' "
            "or mode='eager' for this network."
        )
    order_as(result, float_network)


def _keep_buffers(result: GraphNetwork, originals: dict[str, nn.Module]) -> None:
    """Keep the buffers of modules that were traced through, whether or not the graph reads them."""
    for name, module in originals.items():
        for leaf, buffer in module._buffers.items():
            holder = _holder(result, name)
            if leaf not in holder._buffers:
                holder.register_buffer(leaf, buffer, persistent=leaf not in module._non_persistent_buffers_set)


def _restore(result: GraphNetwork, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    holder = _holder(result, parent)
    present = holder._modules.get(leaf)
    # Fusion replaces the modules it removes by Identity.
    if present is None or isinstance(present, nn.Identity):
        holder._modules[leaf] = module
    elif is_batchnorm(module) and type(present) is GraphPart:
        # Removed, while other modules called inside of it, such as its activation, were left.
        module._modules.update(present._modules)
        holder._modules[leaf] = module


def with_batchnorms(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of a network by name, including layers that a trace created for modules that act as a BatchNorm."""
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    layers = {path: graph_module.get_submodule(path) for path in called & modules.keys()}
    return modules | {path: layer for path, layer in layers.items() if isinstance(layer, _BatchNorm)}


def _holder(root: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if name not in root._modules:
            root._modules[name] = GraphPart()
        root = root._modules[name]  # type: ignore[assignment]
    return root
