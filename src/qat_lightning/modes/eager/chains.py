"""Which layers follow each other, found by running the network once on an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import KEEPS_GRID
from qat_lightning.layers.transformer import Projection
from qat_lightning.modes.eager.following import batchnorm_behind, follower
from qat_lightning.modes.eager.observation import ACTIVATION_TYPES, CHAIN_TYPES, Key, Observation
from qat_lightning.modes.protocol import EXCLUDED
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import engine_here
from qat_lightning.settings.recipe import Recipe

BY_A_FUNCTION = "its parameters are used by a function, and not by calling the layer"


@dataclass(frozen=True)
class Chain:
    """A layer and the modules fused with it in its int8 kernel; plain values, for storage in a file.

    Attributes:
        name: The convolution or linear layer.
        kind: Its type's name.
        batchnorm: The BatchNorm folded into it.
        activation: The activation fused with it.
        limit: Upper limit of that activation; None for ReLU.
        grid_of: The chain whose output grid every input of the example was on already.
        reached: Whether the example called it.
        calls: Number of calls within a forward pass that have their own grids.
    """

    name: str
    kind: str
    batchnorm: str | None = None
    activation: str | None = None
    limit: float | None = None
    grid_of: str | None = None
    reached: bool = True
    calls: int = 1

    @property
    def links(self) -> tuple[str, ...]:
        """The modules after the layer, in order."""
        return tuple(name for name in (self.batchnorm, self.activation) if name is not None)

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def find_chains(
    network: nn.Module, observation: Observation, recipe: Recipe, prefix: str, *, int8: bool = True
) -> tuple[list[Chain], dict[str, str]]:
    """The chains of a network, and the reasons why its other convolutions and linear layers are in none.

    Args:
        network: The observed float network.
        observation: One run of it.
        recipe: Selects the layers.
        prefix: The network's own name; the recipe's globs include it.
        int8: Whether the chains are for int8 kernels, which not every layer has.
    """
    names = {module: name for name, module in network.named_modules()}
    chains: list[Chain] = []
    reasons: dict[str, str] = {}
    links = _Links(names, observation, replace(recipe, include=()), prefix)
    for module, name in names.items():
        if not isinstance(module, observation.heads):
            continue
        reason = why_not(module, recipe.target) if int8 else _why_no_weight(module)
        if not recipe.selects(join(prefix, name)):
            reason = EXCLUDED
        elif not reason and observation.reads(module):
            reason = BY_A_FUNCTION
        elif not reason and module in observation.sized:
            reason = "it is called with output_size=, which int8 kernels do not support: use output_padding= instead"
        if reason:
            reasons[name] = reason
            continue
        chains.append(links.chain(module, name))
    return _with_grids(chains, names, observation), reasons


def why_not(module: nn.Module, target: Backend) -> str:
    """Why a convolution or linear layer has no int8 kernel in eager mode; empty if it has one."""
    if type(module) not in CHAIN_TYPES:
        return f"{type(module).__name__} is not quantized in mode='eager'"
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and engine_here(target.engine) == "qnnpack":
        return f"QNNPACK cannot save the weight of a {type(module).__name__}"
    if why := _why_no_weight(module):
        return why
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.padding_mode != "zeros":
            return f"int8 kernels do not support padding_mode={module.padding_mode!r}"
        pads = module._reversed_padding_repeated_twice
        if any(left != right for left, right in zip(pads[::2], pads[1::2], strict=True)):
            return "padding='same' is asymmetric here, which int8 kernels do not support"
    return ""


def kind_of(head: nn.Module) -> str:
    """The type of the layer at the head of a chain, as stored in a plan."""
    return nn.Linear.__name__ if isinstance(head, Projection) else type(head).__name__


def _why_no_weight(module: nn.Module) -> str:
    weight = module.weight if isinstance(module, Projection) else module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (parametrized) and is not a parameter"
    return "" if weight.is_floating_point() else f"its weight is {weight.dtype}"


class _Links:
    """Finds the modules that follow a layer."""

    def __init__(
        self, names: Mapping[nn.Module, str], observation: Observation, excluding: Recipe, prefix: str
    ) -> None:
        self.names, self.observation = names, observation
        self.excluding, self.prefix = excluding, prefix

    def chain(self, head: nn.Module, name: str) -> Chain:
        """The chain that begins with ``head``."""
        calls = self.observation.of(head)
        chain = Chain(name, kind_of(head), reached=bool(calls))
        batchnorm = batchnorm_behind(head, self.observation)
        if batchnorm is not None and self._not_excluded(batchnorm):
            chain = replace(chain, batchnorm=self.names[batchnorm])
            behind = follower(batchnorm, self.observation)
        else:
            behind = follower(head, self.observation)
        if behind is None or type(behind) not in ACTIVATION_TYPES or not self._not_excluded(behind):
            return chain
        if self.observation.writes_over_its_input(behind):
            return chain
        limit = None
        if isinstance(behind, nn.Hardtanh):
            if behind.min_val != 0 or behind.max_val <= 0:
                return chain
            limit = float(behind.max_val)
        return replace(chain, activation=self.names[behind], limit=limit)

    def _not_excluded(self, module: nn.Module) -> bool:
        return self.excluding.selects(join(self.prefix, self.names[module]))


def _with_grids(chains: list[Chain], names: Mapping[nn.Module, str], observation: Observation) -> list[Chain]:
    """Set for each chain whose grid its inputs are on, if they passed only through functions that keep the grid."""
    modules = {name: module for module, name in names.items()}
    source: dict[Key, str] = {}
    direct: set[Key] = set()
    for chain in chains:
        for call in observation.of(modules[chain.name]):
            outputs = call.outputs
            for _ in chain.links:
                (link,) = observation.consumers(outputs[0])
                outputs = link.outputs
            source[outputs[0]] = chain.name
            direct.add(outputs[0])
    for call in observation.calls:
        exact = call.function in (*KEEPS_GRID, "ReLU")
        origins = {source.get(key) for key in call.inputs}
        if exact and len(origins) == 1 and None not in origins:
            source.update({key: o for o in origins if o for key in call.outputs if key not in source})
    result = []
    for chain in chains:
        inputs = [key for call in observation.of(modules[chain.name]) for key in call.inputs]
        origins = {source.get(key) for key in inputs}
        shared = origins.pop() if len(origins) == 1 and not set(inputs) <= direct else None
        result.append(replace(chain, grid_of=shared))
    return result


def float_functions(observation: Observation) -> dict[str, int]:
    """The functions that compute in float, with the number of their calls in the example."""
    counts = Counter(call.function for call in observation.calls if call.module is None)
    return {name: count for name, count in sorted(counts.items()) if name not in KEEPS_GRID}
