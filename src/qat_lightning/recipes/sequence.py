"""Visiting the layers or blocks of a prepared network in order, each with inputs from already quantized ones.

Used by AdaRound and by the search of weight ranges. Inputs come from two float copies: one with the original weights,
one in which the weights of visited layers are rounded. Activations are not rounded in either, so that the result
depends on weights only.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.graph.example import Example
from qat_lightning.layers.batchnorm import unfolded
from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.recipes.bias_correction import apply_layer
from qat_lightning.recipes.inputs import samples_of
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers
from qat_lightning.rehearsal.calibration import call

_PART = 1 << 22
"""Number of input or output values per call of a layer, whichever are more: as many as caches hold."""


class Unit(ABC):
    """Layers whose weights are chosen together, given the units before them.

    Attributes:
        name: Name of the layer or block in the float network.
        number: Position, from 1.
        of: Total number of units.
        layers: Its layers in the prepared network.
    """

    def __init__(self, name: str, number: int, of: int, layers: Sequence[RoundedLayer]) -> None:
        self.name, self.number, self.of, self.layers = name, number, of, list(layers)

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> tuple[Any, list[Tensor]]:
        """Random inputs from rounded layers, and the corresponding float outputs.

        Args:
            samples: Number of samples, if they can be drawn individually.
            generator: Generator on the CPU.
        """

    @abstractmethod
    def parts(self) -> Iterator[tuple[Any, list[Tensor]]]:
        """All inputs and outputs, as from `draw`, in parts."""

    @abstractmethod
    def outputs(self, inputs: Any, weights: Sequence[Tensor]) -> list[Tensor]:
        """The outputs with the given weights of the layers, folded and float32."""

    @abstractmethod
    def channels(self, output: Tensor) -> int:
        """The channel dimension of an output."""

    def distance(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Squared differences, summed over channels and averaged over everything else."""
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([self._distance(one, other) for one, other in pairs]).sum()

    def _distance(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(self.channels(output)).mean()

    @torch.no_grad()
    def error(self, weights: Sequence[Tensor]) -> float:
        """Squared differences over all data, relative to the squared targets."""
        differences = squares = 0.0
        for inputs, targets in self.parts():
            for one, other in zip(self.outputs(inputs, weights), targets, strict=True):
                differences += float((one - other).double().square().sum())
                squares += float(other.double().square().sum())
        return differences / max(squares, torch.finfo(torch.float32).tiny)


class LayerUnit(Unit):
    """One layer, whose output is compared without bias and after BatchNorm's scaling.

    Args:
        number: Position, from 1.
        of: Total number of units.
        layer: The layer in the prepared network.
        plain: The same layer in the float network.
        wanted: Its inputs in the float network, float32: one tensor with all samples for each size of a sample.
        given: Its inputs in the network whose earlier layers are rounded, of the same shapes.
    """

    def __init__(
        self, number: int, of: int, layer: RoundedLayer, plain: Any, wanted: Sequence[Tensor], given: Sequence[Tensor]
    ) -> None:
        super().__init__(layer.name, number, of, [layer])
        self.plain, self.given = plain, given
        folded = layer.folded()
        with torch.no_grad():
            self.at_once = [self._at_once(inputs, folded) for inputs in wanted]
            self.targets = [
                torch.cat([apply_layer(plain, part, folded) for part in inputs.split(count)])
                for inputs, count in zip(wanted, self.at_once, strict=True)
            ]

    def _at_once(self, inputs: Tensor, weight: Tensor) -> int:
        """Number of samples per call of the layer."""
        each = max(inputs[0].numel(), apply_layer(self.plain, inputs[:1], weight).numel())
        return max(1, _PART // max(1, each))

    def draw(self, samples: int, generator: torch.Generator) -> tuple[Any, list[Tensor]]:
        """Random samples: one tensor for each size that was drawn."""
        number = sum(len(given) for given in self.given)
        chosen = torch.randint(number, (min(samples, number),), generator=generator)
        inputs, targets, first = [], [], 0
        for given, target in zip(self.given, self.targets, strict=True):
            own = chosen[(chosen >= first) & (chosen < first + len(given))] - first
            first += len(given)
            if len(own):
                own = own.to(given.device)
                inputs.append(given[own])
                targets.append(target[own])
        return inputs, targets

    def parts(self) -> Iterator[tuple[Any, list[Tensor]]]:
        """A number of samples of one size at a time."""
        for given, target, count in zip(self.given, self.targets, self.at_once, strict=True):
            for inputs, wanted in zip(given.split(count), target.split(count), strict=True):
                yield [inputs], [wanted]

    def outputs(self, inputs: Any, weights: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each tensor of inputs."""
        return [apply_layer(self.plain, each, weights[0]) for each in inputs]

    def distance(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Squared differences, summed over channels and averaged over everything else in outputs of all sizes."""
        number = sum(target.numel() for target in targets)
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([self._distance(one, other) * (other.numel() / number) for one, other in pairs]).sum()

    def channels(self, output: Tensor) -> int:
        """The channel dimension for the type of the layer."""
        return -1 if isinstance(self.plain, nn.Linear) else 1


class BlockUnit(Unit):
    """A submodule of the float network, with the weights of its layers replaced.

    Args:
        name: Name of the block.
        number: Position, from 1.
        of: Total number of units.
        layers: Its layers in the prepared network.
        plain: The block in the float network.
        wanted: Its calls in the float network.
        given: Its calls in the network whose earlier layers are rounded.
    """

    def __init__(
        self,
        name: str,
        number: int,
        of: int,
        layers: Sequence[RoundedLayer],
        plain: nn.Module,
        wanted: Sequence[Example],
        given: Sequence[Example],
    ) -> None:
        super().__init__(name, number, of, layers)
        self.plain, self.given = plain, given
        self.keys = [f"{layer.name[len(name) + 1 :]}.weight" for layer in layers]
        with torch.no_grad():
            self.targets = [self._run(call, {}) for call in wanted]

    def draw(self, samples: int, generator: torch.Generator) -> tuple[Any, list[Tensor]]:
        """One call: only the block knows which part of an argument belongs to which sample."""
        chosen = int(torch.randint(len(self.given), (1,), generator=generator))
        return self.given[chosen], self.targets[chosen]

    def parts(self) -> Iterator[tuple[Any, list[Tensor]]]:
        """One call at a time."""
        yield from zip(self.given, self.targets, strict=True)

    def outputs(self, inputs: Any, weights: Sequence[Tensor]) -> list[Tensor]:
        """All float tensors that the block returns."""
        present = (self.plain.get_parameter(key) for key in self.keys)
        pairs = zip(weights, self.layers, present, strict=True)
        plain = [plain_weight(weight, layer, old) for weight, layer, old in pairs]
        return self._run(inputs, dict(zip(self.keys, plain, strict=True)))

    def channels(self, output: Tensor) -> int:
        """Dimension 1 for images, the last for tokens."""
        return 1 if output.dim() > 3 else -1

    def _run(self, call: Example, weights: dict[str, Tensor]) -> list[Tensor]:
        # Copies of the arguments, because a block may modify them in place.
        args, kwargs = tree_map(copied, (call.args, call.kwargs))
        found = functional_call(self.plain, weights, args, kwargs)
        return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def units(prepared: nn.Module, batches: Sequence[Any], blocks: Sequence[str] = ()) -> Iterator[Unit]:
    """Iterate over the rounded layers of a network in order; layers of a block come together.

    When the next unit is requested, the weights of the previous one are rounded for all that follow.

    Args:
        prepared: The network with fake-quant, calibrated or not.
        batches: Calls of the network, on its device. The inputs of one unit at a time are kept for all of them.
        blocks: Names of submodules of the float network, none inside another.

    Yields:
        Each layer or block that the network calls.
    """
    plain, rounded = float_copy(prepared), float_copy(prepared)
    together: dict[str, list[RoundedLayer]] = {}
    for layer in rounded_layers(prepared):
        inside = next((block for block in blocks if layer.name.startswith(f"{block}.")), layer.name)
        together.setdefault(inside, []).append(layer)
    for number, (name, layers) in enumerate(together.items(), start=1):
        wanted, given = (_calls(network, name, batches) for network in (plain, rounded))
        module: Any = plain.get_submodule(name)
        if given and name in blocks:
            yield BlockUnit(name, number, len(together), layers, module, wanted, given)
        elif given:
            inputs = [_by_size(module, calls) for calls in (wanted, given)]
            if inputs[0]:
                yield LayerUnit(number, len(together), layers[0], module, *inputs)
        for layer in layers if given else ():
            use(rounded.get_submodule(layer.name), layer)


def float_copy(prepared: nn.Module) -> nn.Module:
    """The float network with the current weights, in evaluation and without gradients, on the same device."""
    network = copy.deepcopy(prepared_state(prepared).float_network)
    network.load_state_dict(float_weights(prepared))
    device = next((parameter.device for parameter in prepared.parameters()), torch.device("cpu"))
    return network.to(device).float().eval().requires_grad_(False)


class Reached(Exception):
    """Ends a forward when the requested module has been called: the rest need not run."""


@torch.no_grad()
def _calls(network: nn.Module, name: str, batches: Sequence[Any]) -> list[Example]:
    """The first call of a submodule in each batch; empty if the network does not call it."""
    kept: list[Example] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(Example(*tree_map(copied, (args, kwargs))))
        raise Reached

    handle = network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            try:
                call(network, batch)
            except Reached:
                continue
    finally:
        handle.remove()
    return kept


def _by_size(layer: Any, calls: Sequence[Example]) -> list[Tensor]:
    """The inputs of a layer, float32: one tensor with all samples for each size of a sample; without empty ones."""
    found: dict[torch.Size, list[Tensor]] = {}
    for each in calls:
        samples = samples_of(layer, each.args, each.kwargs)
        if samples.numel():
            found.setdefault(samples.shape[1:], []).append(samples)
    return [torch.cat(samples) for samples in found.values()]


def copied(leaf: Any) -> Any:
    """A detached copy of a tensor; anything else unchanged."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@torch.no_grad()
def use(module: Any, layer: RoundedLayer) -> None:
    """Give a float layer the rounded weight, divided by BatchNorm's folding factor."""
    module.weight.copy_(plain_weight(layer.rounded(), layer, module.weight))


def plain_weight(weight: Tensor, layer: RoundedLayer, present: Tensor) -> Tensor:
    """A folded weight divided by the folding factor; where that is 0, the present weight."""
    factor = layer.factor()
    return weight if factor is None else unfolded(weight, factor, present.float())
