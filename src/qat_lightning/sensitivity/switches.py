"""Switching fake-quantization by layer in a network that is prepared once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.numerics.dynamic_fake_quantize import DynamicFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Unit:
    """Fake-quantize modules that are switched together: of a layer's weight and output activation, or of one op.

    Attributes:
        name: The layer, or the op.
        kind: Its type.
        module: Whether it is a module of the float network, which ``exclude`` can name.
        parameters: Number of values in its weight; 0 for an op.
    """

    name: str
    kind: str
    module: bool
    parameters: int


class Switches:
    """Enables and disables fake-quantization by unit.

    Args:
        prepared: A calibrated network; only its flags are changed.

    Example:
        >>> import torch
        >>> from qat_lightning.rehearsal.calibration import calibrate
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> x = torch.randn(8, 4)
        >>> recipe = Recipe("eager", "x86", kind="static")
        >>> prepared = get_mode("eager").prepare(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), Example((x,)), recipe)
        >>> calibrate(prepared, [x])
        1
        >>> [unit.name for unit in Switches(prepared).units]
        ['0', '1']
    """

    def __init__(self, prepared: nn.Module) -> None:
        float_network = prepared_state(prepared).float_network
        modules = dict(float_network.named_modules())
        in_calls = {n: m for n, m in prepared.named_modules() if isinstance(m, DynamicFakeQuantize)}
        observed = [fq for _, fq in fake_quantizers(prepared)]
        self._all: list[FakeQuantize | DynamicFakeQuantize] = [*observed, *in_calls.values()]
        self._of: dict[str, set[FakeQuantize | DynamicFakeQuantize]] = {}
        self._weights: set[FakeQuantize | DynamicFakeQuantize] = set()
        kinds: dict[str, str] = {}
        for place in find_places(prepared):
            # In eager mode a layer quantizes its own input; a layer called twice is one module.
            name = place.layer.removesuffix(".input") if place.layer not in modules else place.layer
            name = name.partition("_call_")[0] if name.partition("_call_")[0] in modules else name
            if not place.fq.seen and place.what == "activation":
                continue
            self._of.setdefault(name, set()).add(place.fq)
            if place.what == "weight":
                self._weights.add(place.fq)
            if kinds.get(name, "input") == "input":
                kinds[name] = place.kind
        for name, rounding in in_calls.items():  # together with the weight of its layer
            self._of[name.rpartition(".")[0]].add(rounding)
        self.units = [
            Unit(name, kinds[name], name in modules, _weight_size(modules.get(name)))
            for name in self._in_order(modules)
        ]

    def _in_order(self, modules: Collection[str]) -> list[str]:
        order = {name: index for index, name in enumerate(modules)}
        return sorted(self._of, key=lambda name: order.get(name, len(order)))

    def only(self, names: Collection[str]) -> None:
        """Enable fake-quantization in these units only."""
        self._enable({fq for name in names for fq in self._of[name]})

    def all_but(self, names: Collection[str]) -> None:
        """Enable fake-quantization everywhere except in these units."""
        self.only([unit.name for unit in self.units if unit.name not in names])

    def only_of(self, what: Literal["weights", "activations"]) -> None:
        """Fake-quantize all weights and no activation, or all activations and no weight."""
        everything = {fq for unit in self._of.values() for fq in unit}
        self._enable(self._weights if what == "weights" else everything - self._weights)

    def _enable(self, on: Collection[FakeQuantize | DynamicFakeQuantize]) -> None:
        for fq in self._all:
            fq.fake_quant_enabled = fq in on


def _weight_size(module: nn.Module | None) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if weight is not None else 0
