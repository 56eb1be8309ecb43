"""Where a prepared network rounds, by the layer names of the float network: one mapping for all modes.

In eager mode, fake-quantize modules are in the layers they are named after. In the graph modes those of activations are
numbered (fx) or named after nodes (pt2e), and their layer is found by walking back in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from qat_lightning.graph.scopes import join
from qat_lightning.modes.eager.calls import layer_of
from qat_lightning.modes.prepared import PreparedState, fake_quantizers, prepared_parts, prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Place:
    """One place where a weight or an activation is rounded.

    Attributes:
        layer: The layer's name in the float network; for an op, its name in the graph; for an input of the network, the
            parameter's name in its ``forward``.
        kind: The layer's type, the op's name, ``"input"`` or ``"parameter"``.
        what: Whether a weight or an activation is rounded.
        module: The module that is called with the values: a `FakeQuantize`, or a module that uses one elsewhere.
        fq: The FakeQuantize with the grid.
        turn: Which call of ``module`` in one run of the network belongs to this place, counted from 0; None for all.
        turns: Number of calls in one run.
    """

    layer: str
    kind: str
    what: Literal["weight", "activation"]
    module: nn.Module
    fq: FakeQuantize
    turn: int | None = None
    turns: int = 1


def find_places(prepared: nn.Module) -> list[Place]:
    """All places where a prepared network rounds; in the graph modes, weights come before activations.

    Args:
        prepared: The result of a mode's ``prepare``.

    Example:
        >>> import torch
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> prepared = get_mode("fx").prepare(network, Example((torch.randn(2, 3, 8, 8),)), Recipe("fx", "x86"))
        >>> [(place.layer, place.kind, place.what) for place in find_places(prepared)]
        [('0', 'Conv2d', 'weight'), ('input', 'input', 'activation'), ('0', 'Conv2d', 'activation')]
    """
    parts = prepared_parts(prepared)
    if parts:
        return [replace(place, layer=join(name, place.layer)) for name in parts for place in find_places(parts[name])]
    graph = getattr(prepared, "graph", None)
    if not isinstance(graph, fx.Graph):
        return list(_in_layers(prepared))
    names = _Names(prepared, graph)
    return [*names.weights(), *names.activations()]


def _in_layers(prepared: nn.Module) -> Iterator[Place]:
    float_network = prepared_state(prepared).float_network
    for name, fq in fake_quantizers(prepared):
        holder, _, role = name.rpartition(".")
        layer, call = layer_of(holder)
        kind = _kind_in(float_network, layer)
        layer = f"{layer}_call_{call}" if call else layer
        if fq.source == "present":
            yield Place(layer, kind, "weight", fq, fq)
        elif role == "output_fake_quant":
            yield Place(layer, kind, "activation", fq, fq)
        else:
            yield Place(f"{layer}.input" if layer else "input", "input", "activation", fq, fq)


def _kind_in(float_network: nn.Module, layer: str) -> str:
    try:
        return type(float_network.get_submodule(layer)).__name__
    except AttributeError:  # created by preparation: a linear map of attention
        return nn.Linear.__name__


class _Names:
    """Finds the names in the float network for nodes of a prepared graph.

    Args:
        prepared: The network in fx or pt2e.
        graph: The graph that it runs.
    """

    def __init__(self, prepared: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        self.state = prepared_state(prepared)
        self.modules = dict(prepared.named_modules(remove_duplicate=False))

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def weights(self) -> Iterator[Place]:
        """The places of weights, each once."""
        seen = set[FakeQuantize]()
        for node in self.graph.nodes:
            module = self.called(node)
            if module is None:
                continue
            inner = module._modules.get("weight_fake_quant")
            fq = inner if isinstance(inner, FakeQuantize) else rounding_of(module)
            if fq is None or fq.source != "present" or fq in seen:
                continue
            seen.add(fq)
            layer = str(node.target) if fq is inner else _parameter_owner(node)
            # In pt2e, the same FakeQuantize rounds folded weights, called from another module.
            yield Place(layer, self.kind(layer), "weight", fq, fq)

    def activations(self) -> Iterator[Place]:
        """The places of activations, with the turn of each among the calls of its module."""
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in self.graph.nodes:
            module = self.called(node)
            fq = rounding_of(module)
            if module is not None and fq is not None and fq.source != "present":
                calls.setdefault(module, []).append(node)
        found = []
        for module, nodes in calls.items():
            fq = rounding_of(module)
            assert fq is not None
            for turn, node in enumerate(nodes):
                main = self.main_op(node.all_input_nodes[0])
                # Other inputs of a SharedRange are mostly on the grid already, such as outputs of max-pooling.
                if module is fq or self.is_weighted(main):
                    layer, kind = self.described(main)
                    found.append((node, Place(layer, kind, "activation", module, fq, turn, len(nodes))))
        count: Counter[str] = Counter()
        for _, place in sorted(found, key=lambda pair: pair[0]):
            # A layer that is called several times has a range for each call; fx names them in the same way.
            again = f"{place.layer}_call_{count[place.layer]}" if count[place.layer] else place.layer
            count[place.layer] += 1
            yield replace(place, layer=again)

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether a node is a layer or op with a rounded weight."""
        module = self.called(node)
        if module is not None:
            return "weight_fake_quant" in module._modules
        return any(self._rounds_weight(source) for source in node.all_input_nodes[1:])

    def _rounds_weight(self, node: fx.Node) -> bool:
        fq = rounding_of(self.called(node))
        return fq is not None and fq.source == "present"

    def main_op(self, node: fx.Node) -> fx.Node:
        """The op that a value comes from: the layer before BatchNorm and ReLU, or the addition before its ReLU."""
        while not self.is_weighted(node):
            sources = [source for source in node.all_input_nodes if source.op != "get_attr" and not _is_size(source)]
            if len(sources) != 1 or sources[0].op == "placeholder" or rounding_of(self.called(sources[0])) is not None:
                break
            node = sources[0]
        return node

    def described(self, node: fx.Node) -> tuple[str, str]:
        """Name and kind of the computation of a node."""
        if node.op == "placeholder":
            name = str(node.target)
            # A parameter of forward may have the same name as a layer.
            return (f"{name}_input" if name in self.modules else name), "input"
        if node.op == "get_attr":
            return str(node.target), "parameter"
        module = self.called(node)
        if module is not None:
            op = getattr(module, "op", None)  # an op that pt2e wrapped in a module for its training flag
            if op is not None and hasattr(op, "_schema"):
                return str(node.target).removesuffix("_op"), op_name(op)
            return str(node.target), self.kind(str(node.target))
        weights = [source for source in node.all_input_nodes[1:] if self._rounds_weight(source)]
        if weights:
            layer = _parameter_owner(weights[0])
            return layer, self.kind(layer) if layer else op_name(node.target)
        scope = node_scope(node, self.state)
        return f"{scope}.{node.name}" if scope else node.name, op_name(node.target)

    def kind(self, layer: str) -> str:
        """The type of a layer in the float network."""
        try:
            return type(self.state.float_network.get_submodule(layer)).__name__
        except AttributeError:  # created by preparation: a layer that is called twice becomes two layers
            module = self.modules[layer]
            return getattr(module, "_FLOAT", type(module)).__name__


def rounding_of(module: nn.Module | None) -> FakeQuantize | None:
    """The FakeQuantize that a module is or uses; None for a module that does not round."""
    if isinstance(module, FakeQuantize):
        return module
    held = module.__dict__.get("fq") if type(module).__name__ in _STAND_FOR else None
    return held if isinstance(held, FakeQuantize) else None


_STAND_FOR = ("SharedRange", "Rounder", "FoldedWeight")
"""By name, so that modes do not import each other."""


def node_scope(node: fx.Node, state: PreparedState) -> str:
    """Name of the innermost module whose ``forward`` created a node; empty if it is the network itself, or unknown."""
    if hasattr(node.target, "_schema"):
        from qat_lightning.graph.scopes import scope_of

        return scope_of(node)
    return str(getattr(state.plan, "scopes", {}).get(node.name, ""))


def op_name(target: Any) -> str:
    """A short name for a function: ``add`` for ``operator.add``, ``"add"`` and ``aten.add.Tensor``."""
    if isinstance(target, str):
        return target
    name: str = getattr(target, "__name__", str(target))
    return name.partition(".")[0] if hasattr(target, "_schema") else name


def _is_size(node: fx.Node) -> bool:
    return node.target == "size" or "sym_size" in str(node.target)


def _parameter_owner(node: fx.Node) -> str:
    """The layer of the weight that a node rounds; for a computed weight, the layer that computes it."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    owner = str(node.target).rpartition(".")[0]
    return owner.partition(".parametrizations")[0]
