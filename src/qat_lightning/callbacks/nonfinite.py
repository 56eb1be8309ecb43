"""Saying, once, that batches held NaN or infinite activations, and where."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import fx, nn

from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.flows.base import fake_quantizers

_SHOWN = 8


class NonFiniteReport:
    """Reads the counts that fake-quantize modules keep of batches whose range was NaN or infinite.

    These batches were left out of the ranges, so that training goes on with the ranges as they were, and nobody would
    know. Each place is reported once.
    """

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def look(self, networks: Mapping[str, nn.Module]) -> None:
        """Warn of places that were not warned of yet; one transfer from the device for each network.

        Args:
            networks: Prepared networks by name.
        """
        places = {}
        for name, network in networks.items():
            ours = [(key, fq) for key, fq in fake_quantizers(network) if fq.observed]
            if not ours:
                continue
            counts = torch.stack([fq.nonfinite_batches for _, fq in ours]).tolist()
            for (key, _), count in zip(ours, counts, strict=True):
                if count and (name, key) not in self._said:
                    self._said.add((name, key))
                    places[f"{_place(network, key)} of {name!r}"] = count
        if places:
            more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
            rank_zero_warn(
                f"NaN or infinite activations in {max(places.values())} batch(es), in "
                f"{', '.join(list(places)[:_SHOWN])}{more}. The ranges are those of the other batches. Look at the "
                "data and the loss of this epoch; this is said once for each place."
            )


def _place(network: nn.Module, key: str) -> str:
    """Where a fake-quantize module observes, by the names of the float network's layers."""
    graph = getattr(network, "graph", None)
    if not isinstance(graph, fx.Graph):
        layer, _, kind = key.rpartition(".")
        return f"the {'input' if kind.startswith('input') else 'output'} of layer {layer!r}"
    node = next((node for node in graph.find_nodes(op="call_module") if node.target == key), None)
    while node is not None and isinstance(node.args and node.args[0], fx.Node):
        node = node.args[0]
        found = _layer(network, node)
        if found is not None:
            return f"what comes out of layer {found!r}"
    return "the input" if node is None else f"the input {node.name!r}"


def _layer(network: nn.Module, node: fx.Node) -> str | None:
    """The layer that a node calls, or whose weight it uses."""
    if node.op == "call_module":
        return None if isinstance(network.get_submodule(str(node.target)), FakeQuantize) else str(node.target)
    for used in node.all_input_nodes[1:]:
        while used.op == "call_module" and used.all_input_nodes:
            used = used.all_input_nodes[0]
        if used.op == "get_attr" and str(used.target).endswith("weight"):
            return str(used.target).rpartition(".")[0]
    return None
