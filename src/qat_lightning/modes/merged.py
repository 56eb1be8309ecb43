"""What is left of modules that were merged into a graph: their layers, by index too, and no calls and no hooks."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.graph.hooks import TABLES, users_hooks
from qat_lightning.graph.special_methods import take_special_methods
from qat_lightning.layers.qat_modules import FoldedLayer
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart, refuse_call


def note_merged(network: GraphNetwork, graph: fx.Graph, original: nn.Module, fused: tuple[type, ...] = ()) -> None:
    """Give a prepared network and its parts the containers' methods, and let it refuse hooks that would be wrong.

    Args:
        network: The prepared network.
        graph: The graph that it trains with.
        original: The float network.
        fused: Classes of modules that compute several layers at once.
    """
    own = dict(network.named_modules(remove_duplicate=False))
    called = {id(module) for module in _called(own, graph)}
    merged = {
        name: own.get(name, module)
        for name, module in original.named_modules()
        if name and (id(own.get(name)) not in called or isinstance(own[name], fused))
    }
    known = frozenset(key for module in merged.values() for _, key in users_hooks(module))
    network.__dict__.update(_merged=merged, _known_hooks=known)
    for name, module in original.named_modules():
        part = own.get(name)
        if isinstance(part, (GraphNetwork, GraphPart)):
            part.__dict__["_container"] = module, fused
            take_special_methods(part, type(module), _container)


def _called(own: dict[str, nn.Module], graph: fx.Graph) -> list[nn.Module]:
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    found = [inner for target in targets if target in own for inner in own[target].modules()]
    return found + [module.batchnorm for module in found if isinstance(module, FoldedLayer)]


def _container(part: nn.Module) -> Any:
    """A container of the float network's class with the layers that train."""
    container, fused = part.__dict__["_container"]
    view = object.__new__(type(container))
    view.__dict__.update(container.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        own = part.__dict__[table]
        view.__dict__[table] = {name: own.get(name, value) for name, value in container.__dict__[table].items()}
    for name, child in container._modules.items():
        if child is not None and isinstance(view._modules[name], fused):
            view._modules[name] = _alone(child, view._modules[name])
    return view


def _alone(layer: nn.Module, fused: nn.Module) -> nn.Module:
    """One layer of a fused module: with its tensors, and without calls."""
    alone: nn.Module = object.__new__(type(layer))
    alone.__dict__.update(layer.__dict__)
    for table in ("_parameters", "_buffers", *TABLES):  # hooks too, which the network refuses at its next call
        alone.__dict__[table] = fused.__dict__[table]
    alone.__dict__["training"] = fused.training
    alone.__dict__["forward"] = refuse_call
    return alone
