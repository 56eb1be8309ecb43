"""Cross-layer equalization: balancing the weight ranges of neighbouring layers without changing the network's output.

Nagel et al., 2019, "Data-free quantization through weight equalization and bias correction",
https://arxiv.org/abs/1906.04721, section 4.1. ReLU commutes with a positive factor, so an output channel of one layer
can be divided by it and the corresponding input channel of the next layer multiplied. BatchNorm stays where it is: its
gamma and beta take the factor, and the ranges are those of the folded weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.layers.batchnorm import along, factor_of, folded_weight, has_statistics
from qat_lightning.layers.operators import module_types, names_of
from qat_lightning.modes.eager.observation import HEAD_TYPES, Key, Observation, observe
from qat_lightning.recipes.same_outputs import distance, outputs_of, passing, undone_if_different
from qat_lightning.settings.recipe import Equalization as Kind

_CHANNELWISE = names_of(lambda row: row.channelwise)
"""Functions that may act on each channel separately and commute with a positive factor; pairs are tested."""

_ENOUGH = 1e-3
_ROUNDS = 40


def check_equalization(value: Any) -> None:
    """Reject an unknown kind of equalization.

    Raises:
        ConfigurationError: The kind is unknown; the message lists the valid ones.
    """
    if not isinstance(value, str) or value not in get_args(Kind):
        kinds = ", ".join(map(repr, get_args(Kind)))
        raise ConfigurationError(f"equalization={value!r} is not valid: use one of {kinds}.")


@dataclass
class Equalization:
    """The result of `equalize`.

    Attributes:
        pairs: Names of pairs of layers that were equalized.
        replaced: Names of ReLU6 modules that were replaced by ReLU.
        left: For other layers with a successor, why they were not equalized.
        change: Relative change of the outputs on the example, caused by replacing ReLU6; 0 if none was replaced.
        clipped: Number of those other layers that are followed by a ReLU6.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    change: float = 0.0
    clipped: int = 0

    def __str__(self) -> str:
        """One sentence."""
        text = f"{len(self.pairs)} pairs of layers were equalized"
        if self.replaced:
            text += f", {len(self.replaced)} ReLU6 became ReLU (outputs changed by {100 * self.change:.2g} %)"
        if self.clipped:
            text += (
                f"; {self.clipped} pairs have a ReLU6 between them and were skipped (see equalization='replace_relu6')"
            )
        return text + "."


@dataclass(frozen=True)
class _Pair:
    """Two consecutive layers; between them are ``batchnorm`` and functions that commute with a factor."""

    first: Any
    batchnorm: Any
    clipping: tuple[nn.Module, ...]
    second: Any

    def scale(self, factor: Tensor) -> None:
        """Divide the output channels of the first by ``factor``, and multiply the input channels of the second."""
        owner = self.first if self.batchnorm is None else self.batchnorm
        owner.weight.div_(along(factor, owner.weight))
        if owner.bias is not None:
            owner.bias.div_(factor)
        grouped = _by_input(self.second, self.second.weight)
        grouped.mul_(factor.reshape(grouped.shape[0], 1, grouped.shape[2], 1))

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Largest absolute weight of each output channel of the first, and of each input channel of the second."""
        first = _folded(self.first, self.batchnorm).flatten(1).abs().amax(1)
        second = _by_input(self.second, self.second.weight).abs().amax((1, 3)).flatten()
        return first, second


@torch.no_grad()
def equalize(network: nn.Module, example: Example, kind: Kind = "exact") -> Equalization:
    """Equalize the weights of neighbouring layers, in place.

    Consecutive layers are found by running the example; whether a factor passes between them is tested numerically. A
    layer whose output has several readers, or that is called several times, is not changed.

    Args:
        network: A float network; names and shapes of its parameters do not change.
        example: One call of it.
        kind: ``"exact"``, or ``"replace_relu6"``: a ReLU6 between two layers is replaced by ReLU; otherwise a MobileNet
            has nothing to equalize. This changes the network where activations exceed 6.

    Returns:
        The result. With ``"none"``, nothing is changed.

    Raises:
        ConfigurationError: The kind is unknown.
        NetworkError: The network does not run on the example, or computes different values afterwards; the weights
            are as before.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> equalize(network, Example((torch.randn(16, 4),))).pairs
        [('0', '2')]
    """
    check_equalization(kind)
    done = Equalization()
    if kind == "none":
        return done
    names = {module: name for name, module in network.named_modules()}
    pairs = list(_find_pairs(network, observe(network, example), names, done))
    original = outputs_of(network, example)
    if kind == "replace_relu6":
        _replace_clipping(network, pairs, done)
        done.change = distance(original, outputs_of(network, example))
    else:
        for pair in pairs:
            if pair.clipping:
                done.clipped += 1
                done.left[names[pair.first]] = f"ReLU6 at {names[pair.clipping[0]]!r} does not let a factor pass"
        pairs = [pair for pair in pairs if not pair.clipping]
    balanced = passing(network, example, pairs, _halve_and_double)
    for pair in pairs:
        if pair not in balanced:
            done.left[names[pair.first]] = "a factor does not pass to the next layer"
    done.pairs = [(names[pair.first], names[pair.second]) for pair in balanced]
    with undone_if_different(network, example, by="Equalization", remedy="equalization='none'"):
        _balance(balanced)
    return done


def _balance(pairs: list[_Pair]) -> None:
    """Apply equation 11 of the paper to each pair in turn, until all factors are close to 1."""
    for _ in range(_ROUNDS):
        furthest = 0.0
        for pair in pairs:
            first, second = pair.ranges()
            alive = (first > 0) & (second > 0)
            factor = torch.where(alive, (first / torch.where(alive, second, 1.0)).sqrt(), 1.0)
            pair.scale(factor)
            furthest = max(furthest, float(factor.log().abs().max()))
        if furthest < _ENOUGH:
            break


def _find_pairs(
    network: nn.Module, observation: Observation, names: dict[nn.Module, str], done: Equalization
) -> Iterator[_Pair]:
    shared = _shared_parameters(network)
    for first, name in names.items():
        if type(first) not in HEAD_TYPES:
            continue
        found = _follow(first, observation)
        if isinstance(found, str):
            if found:
                done.left[name] = found
            continue
        layers = [layer for layer in (found.first, found.batchnorm, found.second) if layer is not None]
        if any("weight" not in layer._parameters for layer in layers):
            done.left[name] = "a weight is computed (parametrized)"
        elif any(id(parameter) in shared for layer in layers for parameter in layer._parameters.values()):
            done.left[name] = "a parameter is shared with another layer"
        elif found.second.weight.shape[1] * getattr(found.second, "groups", 1) != found.first.weight.shape[0]:
            done.left[name] = "the next layer reads its channels in another layout"
        else:
            yield found


def _follow(first: Any, observation: Observation) -> _Pair | str:
    """The pair that begins with a layer; otherwise the reason why there is none, empty if no layer follows."""
    calls = observation.of(first)
    if len(calls) != 1:
        return "it is called several times" if calls else ""
    batchnorm, clipping = None, list[nn.Module]()
    outputs: tuple[Key, ...] = calls[0].outputs
    while True:
        if len(outputs) != 1 or outputs[0] in observation.returned:
            return ""
        # Dropout in evaluation returns its input tensor.
        consumers = [call for call in observation.consumers(outputs[0]) if call.outputs != call.inputs]
        if len(consumers) != 1:
            return "its output goes to several places"
        (call,) = consumers
        module: Any = call.module
        if module is None and (call.function not in _CHANNELWISE or call.inputs != outputs):
            return f"{call.function} is between it and the next layer"
        if type(module) in HEAD_TYPES:
            single = len(observation.of(module)) == 1
            return _Pair(first, batchnorm, tuple(clipping), module) if single else "the next is called several times"
        if type(module) in module_types("batchnorm"):
            only = batchnorm is None and not clipping and call is observation.consumers(calls[0].outputs[0])[0]
            if not only or not _folds(module, observation):
                return "a BatchNorm between it and the next layer is not folded into it"
            batchnorm = module
        elif isinstance(module, module_types("clamp")):
            clipping.append(module)
        outputs = call.outputs


def _folds(batchnorm: Any, observation: Observation) -> bool:
    once = len(observation.of(batchnorm)) == 1
    return once and batchnorm.weight is not None and has_statistics(batchnorm)


def _shared_parameters(network: nn.Module) -> set[int]:
    seen, shared = set[int](), set[int]()
    for _, parameter in network.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _replace_clipping(network: nn.Module, pairs: list[_Pair], done: Equalization) -> None:
    wanted: dict[nn.Module | None, nn.Module] = {
        module: nn.ReLU(inplace=bool(module.inplace)).train(module.training)
        for pair in pairs
        for module in pair.clipping
    }
    done.replaced = [name for name, module in network.named_modules() if module in wanted]
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child in wanted:
                parent._modules[name] = wanted[child]


def _halve_and_double(pairs: list[_Pair]) -> None:
    """Scale channels by factors of 1/2, 1 and 2."""
    for pair in pairs:
        channels = torch.arange(pair.first.weight.shape[0], device=pair.first.weight.device)
        pair.scale(2.0 ** (channels % 3 - 1).to(pair.first.weight.dtype))


def _folded(layer: Any, batchnorm: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.float() if batchnorm is None else folded_weight(weight, factor_of(batchnorm))


def _by_input(layer: Any, weight: Tensor) -> Tensor:
    """A view of a weight as (groups, outputs per group, inputs per group, positions)."""
    groups = getattr(layer, "groups", 1)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
