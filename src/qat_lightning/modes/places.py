"""Where a prepared network rounds, by the names of the float network's layers: one mapping for the three modes.

In eager mode fake-quantize modules sit in the layers whose names they bear. In the graph modes those of activations
are counted (fx) or named after nodes (pt2e), and what they belong to is found by walking back in the graph.
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
        layer: The layer's name in the float network; for an op that is no layer, its name in the graph; for an input of
            the network, the parameter's name in its ``forward``.
        kind: The layer's type, the op's name, ``"input"`` or ``"parameter"``.
        what: What is rounded here.
        module: What is called with the values: a `FakeQuantize`, or what stands for one that is elsewhere.
        fq: Whose grid it is.
        turn: Of the calls of ``module`` in one run of the network, which is this place's, counted from 0; None for any.
        turns: How many calls there are in one run.
    """

    layer: str
    kind: str
    what: Literal["weight", "activation"]
    module: nn.Module
    fq: FakeQuantize
    turn: int | None = None
    turns: int = 1


def find_places(prepared: nn.Module) -> list[Place]:
    """Every place where a prepared network rounds, those of weights before those of activations in the graph modes.

    Args:
        prepared: What a mode's ``prepare`` made.

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
    except AttributeError:  # made in preparation: a linear map of attention
        return nn.Linear.__name__


class _Names:
    """Finds what the nodes of a prepared graph are in the float network.

    Args:
        prepared: The network in fx or pt2e.
        graph: What it runs.
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
            # pt2e's folded weights are rounded by the same FakeQuantize, called from another module.
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
                # What shares a range mostly gets values that are on its grid already, such as those of max-pooling.
                if module is fq or self.is_weighted(main):
                    layer, kind = self.described(main)
                    found.append((node, Place(layer, kind, "activation", module, fq, turn, len(nodes))))
        count: Counter[str] = Counter()
        for _, place in sorted(found, key=lambda pair: pair[0]):
            # A layer that is called from several places has a range at each; fx names them in the same way.
            again = f"{place.layer}_call_{count[place.layer]}" if count[place.layer] else place.layer
            count[place.layer] += 1
            yield replace(place, layer=again)

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether a node is a layer, or an op, that has a rounded weight."""
        module = self.called(node)
        if module is not None:
            return "weight_fake_quant" in module._modules
        return any(self._rounds_weight(source) for source in node.all_input_nodes[1:])

    def _rounds_weight(self, node: fx.Node) -> bool:
        fq = rounding_of(self.called(node))
        return fq is not None and fq.source == "present"

    def main_op(self, node: fx.Node) -> fx.Node:
        """The op that a value comes from: a layer before its BatchNorm and ReLU, an addition before its ReLU."""
        while not self.is_weighted(node):
            sources = [source for source in node.all_input_nodes if source.op != "get_attr" and not _is_size(source)]
            if len(sources) != 1 or sources[0].op == "placeholder" or rounding_of(self.called(sources[0])) is not None:
                break
            node = sources[0]
        return node

    def described(self, node: fx.Node) -> tuple[str, str]:
        """Name and kind of what a node computes."""
        if node.op == "placeholder":
            name = str(node.target)
            # A parameter of forward may have the name of a layer.
            return (f"{name}_input" if name in self.modules else name), "input"
        if node.op == "get_attr":
            return str(node.target), "parameter"
        module = self.called(node)
        if module is not None:
            op = getattr(module, "op", None)  # an op that pt2e put into a module for its flag
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
        except AttributeError:  # made in preparation: a layer that is called twice is two layers
            module = self.modules[layer]
            return getattr(module, "_FLOAT", type(module)).__name__


def rounding_of(module: nn.Module | None) -> FakeQuantize | None:
    """The FakeQuantize that a module is, or with which it rounds; None for a module that does not round."""
    if isinstance(module, FakeQuantize):
        return module
    held = module.__dict__.get("fq") if type(module).__name__ in _STAND_FOR else None
    return held if isinstance(held, FakeQuantize) else None


_STAND_FOR = ("SharedRange", "Rounder", "FoldedWeight")
"""By name, so that one mode does not import another."""


def node_scope(node: fx.Node, state: PreparedState) -> str:
    """Name of the innermost module whose ``forward`` made a node; empty if it is the network's own, or not known."""
    if hasattr(node.target, "_schema"):
        from qat_lightning.graph.scopes import scope_of

        return scope_of(node)
    return str(getattr(state.plan, "scopes", {}).get(node.name, ""))


def op_name(target: Any) -> str:
    """A function's name, short: ``add`` of ``operator.add``, of ``"add"`` and of ``aten.add.Tensor``."""
    if isinstance(target, str):
        return target
    name: str = getattr(target, "__name__", str(target))
    return name.partition(".")[0] if hasattr(target, "_schema") else name


def _is_size(node: fx.Node) -> bool:
    return node.target == "size" or "sym_size" in str(node.target)


def _parameter_owner(node: fx.Node) -> str:
    """The layer whose weight a rounding node takes; for a computed weight, the layer it was computed in."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    owner = str(node.target).rpartition(".")[0]
    return owner.partition(".parametrizations")[0]
