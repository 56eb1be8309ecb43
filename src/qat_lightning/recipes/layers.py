"""The layers of a prepared network with rounded weights, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.layers.batchnorm import along, factor_of
from qat_lightning.layers.operators import module_types
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize

RECONSTRUCTED = module_types("convolution", "linear")


@dataclass(frozen=True)
class RoundedLayer:
    """A convolution or linear layer of a prepared network, with the parts that form its int8 weight.

    Attributes:
        name: Name in the float network, where it belongs to a layer of a plain type.
        module: The module in the prepared network; it holds weight and bias.
        batchnorm: Name of the BatchNorm that is folded into the weight; None if there is none.
        fq: The FakeQuantize of the (folded) weight.
        network: The prepared network.
    """

    name: str
    module: Any
    batchnorm: str | None
    fq: FakeQuantize
    network: nn.Module

    def factor(self) -> Tensor | None:
        """The folding factor of the weight, float32, shaped to broadcast with it; None without BatchNorm."""
        if self.batchnorm is None:
            return None
        bn: Any = self.network.get_submodule(self.batchnorm)
        return along(factor_of(bn), self.module.weight)

    @torch.no_grad()
    def folded(self, of: Any = None) -> Tensor:
        """The folded weight before rounding, float32; optionally that of another module."""
        factor = self.factor()
        weight: Tensor = (self.module if of is None else of).weight.detach().float()
        return weight if factor is None else weight * factor

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The weight as the kernel has it, float32."""
        folded = self.folded()
        self.fq.observe(folded)
        return self.fq.round(folded)


def rounded_layers(prepared: nn.Module) -> list[RoundedLayer]:
    """The convolutions and linear layers with rounded weights, in the order of the network.

    Layers created by preparation (for one that is called several times), functional ones, and computed weights are left
    out.

    Args:
        prepared: The result of a mode's ``prepare``.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> prepared = get_mode("fx").prepare(network, Example((torch.randn(2, 3, 8, 8),)), Recipe("fx", "x86"))
        >>> [(layer.name, layer.batchnorm) for layer in rounded_layers(prepared)]
        [('0', '1')]
    """
    original = dict(prepared_state(prepared).float_network.named_modules(remove_duplicate=False))
    names = {module: name for name, module in prepared.named_modules()}
    calls = _batchnorms_of_graph(prepared) if isinstance(prepared, GraphNetwork) else {}
    found = []
    for place in find_places(prepared):
        if place.what != "weight" or type(original.get(place.layer)) not in RECONSTRUCTED:
            continue
        module: Any = prepared.get_submodule(place.layer)
        if "weight" not in module._parameters or not place.fq.fake_quant_enabled:
            continue
        batchnorm = calls.get(place.layer) or _batchnorm_of(module, names)
        found.append(RoundedLayer(place.layer, module, batchnorm, place.fq, prepared))
    order = {name: index for index, name in enumerate(original)}
    return sorted(found, key=lambda layer: order[layer.name])


def _batchnorm_of(module: Any, names: dict[nn.Module, str]) -> str | None:
    """The BatchNorm of a layer in eager mode and fx, where the layer refers to it."""
    batchnorm = getattr(module, "batchnorm", None)
    return names.get(batchnorm) if isinstance(batchnorm, nn.Module) else None


def _batchnorms_of_graph(prepared: GraphNetwork) -> dict[str, str]:
    """In pt2e: layers and their BatchNorms, found by the tensors from which a folded weight is computed."""
    return {
        _owner(node.args[0]): _owner(node.args[2])
        for node in _nodes(prepared)
        if type(prepared.get_submodule(str(node.target))).__name__ == "FoldedWeight"
    }


def _nodes(prepared: GraphNetwork) -> Iterator[fx.Node]:
    yield from prepared.__dict__["graph"].find_nodes(op="call_module")


def _owner(node: Any) -> str:
    return str(node.target).rpartition(".")[0]
