"""Modules of a network that were merged into a graph, which neither calls them one by one nor their hooks."""

from __future__ import annotations

from torch import fx, nn

from qat_lightning.graph.hooks import users_hooks
from qat_lightning.layers.qat_modules import FoldedLayer
from qat_lightning.modes.graph_network import GraphNetwork


def note_merged(network: GraphNetwork, graph: fx.Graph, original: nn.Module, fused: tuple[type, ...] = ()) -> None:
    """Let a prepared network refuse hooks that would not be called, or would see what several layers return.

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


def _called(own: dict[str, nn.Module], graph: fx.Graph) -> list[nn.Module]:
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    found = [inner for target in targets if target in own for inner in own[target].modules()]
    return found + [module.batchnorm for module in found if isinstance(module, FoldedLayer)]
