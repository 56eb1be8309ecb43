"""Weights that oscillate between two integers in training: tracking, dampening and freezing them.

Nagel et al., 2022, "Overcoming oscillations in quantization-aware training", https://arxiv.org/abs/2203.11086.
Everything is done on parameters and their gradients between two steps: the forward of a network, compiled or not, is
not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.layers.batchnorm import unfolded
from qat_lightning.layers.rounded import RoundedLayer as TrainedLayer
from qat_lightning.modes.places import find_places
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import along
from qat_lightning.numerics.oscillation import Oscillation
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers


@dataclass(frozen=True)
class RoundedWeight:
    """A parameter, or a part of one, that is rounded and trained.

    Attributes:
        layer: The layer's name in the float network.
        name: Name of its state in a checkpoint.
        parameter: The parameter that the optimizer updates.
        fq: The FakeQuantize with the grid.
        weight: Returns the part of the parameter.
        to_grid: Maps the part to the form that the grid sees, float32: with BatchNorm folded in, or in rows.
        from_grid: The inverse, in the shape of the part; where BatchNorm's factor is 0, it returns its second argument.
    """

    layer: str
    name: str
    parameter: Tensor
    fq: FakeQuantize
    weight: Callable[[], Tensor]
    to_grid: Callable[[Tensor], Tensor]
    from_grid: Callable[[Tensor, Tensor], Tensor]

    def on_grid(self, frozen: Tensor | None = None) -> _OnGrid:
        """The position of the present weight on its grid.

        Args:
            frozen: bool: values that do not determine the range, because they follow it; None for none.
        """
        seen = self.to_grid(self.weight())
        deciding = seen if frozen is None else seen.masked_fill(frozen, 0.0)
        scale, zero_point = _qparams(self.fq, deciding)
        low, high = (along(end - zero_point, seen, self.fq.grid.axis) for end in (self.fq.quant_min, self.fq.quant_max))
        scale = along(scale, seen, self.fq.grid.axis)
        # Same order of operations as `fake_quantize`, so that the integers equal those of the forward pass.
        integers = torch.minimum(torch.maximum((seen * (1.0 / scale)).round(), low), high)
        return _OnGrid(seen, scale, integers, low, high)

    def put(self, values: Tensor, where: Tensor) -> None:
        """Write grid values into the parameter, where a mask in the grid's shape is true."""
        weight = self.weight()
        moved = self.from_grid(values, weight.float()).to(weight.dtype)
        weight.copy_(torch.where(self.mask(where), moved, weight))

    def mask(self, where: Tensor) -> Tensor:
        """A mask of the grid in the shape of the weight; False where BatchNorm's factor is 0."""
        return self.from_grid(where.float(), torch.zeros_like(self.weight(), dtype=torch.float32)) != 0

    def gradient(self) -> Tensor | None:
        """The gradient of the part; None if there is none, or it is sparse."""
        gradient = self.parameter.grad
        if gradient is None or gradient.is_sparse:
            return None
        weight = self.weight()
        if weight.shape == gradient.shape:
            return gradient
        offset = weight.storage_offset() - self.parameter.storage_offset() + gradient.storage_offset()
        return gradient.as_strided(weight.shape, weight.stride(), offset)


@dataclass(frozen=True)
class _OnGrid:
    seen: Tensor
    scale: Tensor
    integers: Tensor
    low: Tensor
    high: Tensor

    def off_center(self) -> Tensor:
        """Distance of each value from its grid point; values beyond the grid are clamped first."""
        clipped = torch.minimum(torch.maximum(self.seen, self.low * self.scale), self.high * self.scale)
        return clipped - self.integers * self.scale


def _qparams(fq: FakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight; unlike `FakeQuantize.observe` this changes no state."""
    if fq.learns:
        return fq.calculate_qparams()
    low, high = fq.grid.ends(weight)
    return fq.grid.qparams(low * fq.clip, high * fq.clip) if fq.clipped else fq.grid.qparams(low, high)


def rounded_weights(prepared: nn.Module) -> Iterator[RoundedWeight]:
    """The weights of a prepared network that can oscillate: parameters that are rounded now.

    Convolutions and linear layers of networks with fixed ranges, and all layers of kinds ``"dynamic"`` and
    ``"weight_only"`` except those with adapters, whose weight is frozen.

    Args:
        prepared: The result of a mode's ``prepare``, with fake-quantization enabled.
    """
    known = set[int]()
    for layer in rounded_layers(prepared):
        weight, rows = layer.module.weight, isinstance(layer.module, TrainedLayer)
        if not rows and not layer.fq.left_float and weight.requires_grad and id(weight) not in known:
            known.add(id(weight))
            yield _of_layer(layer)
    for name, module in prepared.named_modules():
        if isinstance(module, TrainedLayer) and module.rounds() and not getattr(module, "sparse", False):
            yield from _of_trained(name, module, known)


def _of_layer(layer: RoundedLayer) -> RoundedWeight:
    def to_grid(weight: Tensor) -> Tensor:
        factor = layer.factor()
        return weight.float() if factor is None else weight.float() * factor

    def from_grid(values: Tensor, otherwise: Tensor) -> Tensor:
        factor = layer.factor()
        return values if factor is None else unfolded(values, factor, otherwise)

    module = layer.module
    return RoundedWeight(
        layer.name, layer.name, module.weight, layer.fq, lambda: module.weight.detach(), to_grid, from_grid
    )


def _of_trained(name: str, layer: TrainedLayer, known: set[int]) -> Iterator[RoundedWeight]:
    for part, weight in layer.parts().items():
        parameter = weight if isinstance(weight, nn.Parameter) else weight._base
        fq = layer.fake_quantize(part)
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad or not fq.fake_quant_enabled:
            continue
        if weight is parameter and id(parameter) in known:
            continue
        known.add(id(parameter))
        yield RoundedWeight(
            name,
            f"{name}.{part}",
            parameter,
            fq,
            lambda part=part: layer.parts()[part].detach(),  # type: ignore[misc]
            lambda weight: layer.in_ranges(weight.float()),
            lambda values, otherwise: layer.of_ranges(values, otherwise),
        )


class OscillationTracker:
    """Tracks the integers of all weights of some prepared networks from step to step.

    Frozen weights lie exactly on the grid point of their integer, whatever the optimizer, momentum and weight decay do,
    and follow the grid when its scale changes; only free weights determine the scale. So rounding, conversion and all
    other readers of a weight get the frozen integer.

    Args:
        momentum: Weight of a step in the moving averages of frequencies and of integers.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
        >>> prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86"))
        >>> tracker = OscillationTracker(momentum=0.01)
        >>> tracker.look_at({"net": prepared})
        >>> for _ in range(3):  # after each step of an optimizer
        ...     tracker.step(threshold=0.02)
        >>> tracker.shares()
        {'0': (0.0, 0.0)}
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = momentum
        self.weights: list[tuple[str, RoundedWeight]] = []
        self._states: dict[str, Oscillation] = {}
        self._loaded: dict[str, Mapping[str, Tensor]] = {}
        self._several = False

    def look_at(self, networks: Mapping[str, nn.Module]) -> None:
        """Find the weights of prepared networks that are rounded now.

        Args:
            networks: Networks by name; the name precedes the layers' names if there are several.

        Raises:
            CheckpointMismatchError: The loaded state belongs to weights of other shapes.
        """
        self._several = len(networks) > 1
        self.weights = [(f"{name}/{w.name}", w) for name, network in networks.items() for w in rounded_weights(network)]
        for name, weight in self.weights:
            if name not in self._loaded:
                continue
            state = self._states[name] = Oscillation(weight.to_grid(weight.weight()))
            try:
                state.load_state_dict(self._loaded.pop(name))
            except ValueError as error:
                raise CheckpointMismatchError(f"The oscillations of {name!r} in the checkpoint: {error}.") from error

    def not_looked_at(self, networks: Mapping[str, nn.Module]) -> list[str]:
        """The layers with rounded weights that are not tracked."""
        here = {weight.fq for _, weight in self.weights}
        places = [place for network in networks.values() for place in find_places(network)]
        return sorted({place.layer for place in places if place.what == "weight" and place.fq not in here})

    def _of(self, parameters: Container[int] | None) -> Iterator[tuple[str, RoundedWeight]]:
        return ((n, w) for n, w in self.weights if parameters is None or id(w.parameter) in parameters)

    @torch.no_grad()
    def step(self, threshold: float | None = None, parameters: Container[int] | None = None) -> None:
        """After an optimizer step: update the integers, freeze oscillating weights, and restore frozen ones.

        Args:
            threshold: The frequency above which a weight is frozen; None to freeze nothing more.
            parameters: Ids of the parameters that the optimizer updates; None for all.
        """
        for name, weight in self._of(parameters):
            state = self._states.get(name)
            grid = weight.on_grid(None if state is None else state.frozen)
            if state is None:
                state = self._states[name] = Oscillation(grid.integers)
            state.observe(grid.integers, self.momentum)
            if threshold is not None:
                # If the weights determine their grid, those at its ends must not be frozen.
                state.freeze(threshold, None if weight.fq.learns else (grid.low, grid.high))
            weight.put(state.integers * grid.scale, state.frozen)

    @torch.no_grad()
    def hold(self) -> None:
        """Restore frozen weights on their grid, after something other than an optimizer changed it."""
        for name, weight in self.weights:
            if name in self._states:
                state = self._states[name]
                weight.put(state.integers * weight.on_grid(state.frozen).scale, state.frozen)

    @torch.no_grad()
    def block(self, parameters: Container[int] | None = None) -> None:
        """Before a step: zero the gradients of frozen weights, so that they do not count in gradient norms."""
        for name, weight in self._of(parameters):
            gradient, state = weight.gradient(), self._states.get(name)
            if gradient is not None and state is not None:
                gradient.masked_fill_(weight.mask(state.frozen), 0.0)

    @torch.no_grad()
    def dampen(self, strength: float, parameters: Container[int] | None = None) -> Tensor | None:
        """Before a step: add the gradient of the dampening loss, which pulls weights to their grid points.

        The loss is ``strength * sum((round(w) - clip(w))**2)`` over all weights (equation 6 of the paper). The rounded
        weight gets no gradient, and neither do values beyond the grid.

        Args:
            strength: The paper's lambda.
            parameters: Ids of the parameters that the optimizer updates; None for all.

        Returns:
            The loss, of shape ``()``; None if no weight has a gradient.
        """
        losses = []
        for name, weight in self._of(parameters):
            gradient, state = weight.gradient(), self._states.get(name)
            if gradient is None:
                continue
            off = weight.on_grid(None if state is None else state.frozen).off_center()
            off = weight.from_grid(off, torch.zeros_like(gradient, dtype=torch.float32))
            gradient.add_(off.to(gradient.dtype), alpha=2.0 * strength)
            losses.append(strength * off.square().sum())
        return torch.stack(losses).sum() if losses else None

    def totals(self) -> Tensor | None:
        """The shares of all weights that oscillate and that are frozen, shape ``(2,)``, on the device; None before."""
        counts, elements = self._counts(self._states)
        return None if not counts else torch.stack(counts).sum(0) / elements

    def shares(self) -> dict[str, tuple[float, float]]:
        """By layer, the shares of its weights that oscillate and that are frozen."""
        layers: dict[str, list[str]] = {}
        for name, weight in self.weights:
            network = name.partition("/")[0]
            if name in self._states:
                layers.setdefault(f"{network}.{weight.layer}" if self._several else weight.layer, []).append(name)
        found = [self._counts(names) for names in layers.values()]
        read = torch.stack([torch.stack(counts).sum(0).cpu() / n for counts, n in found]).tolist() if found else []
        return {layer: (oscillating, frozen) for layer, (oscillating, frozen) in zip(layers, read, strict=True)}

    def _counts(self, names: Iterable[str]) -> tuple[list[Tensor], int]:
        states = [self._states[name] for name in names]
        return [torch.stack(s.counts()) for s in states], sum(s.frozen.numel() for s in states)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by the names of weights."""
        return dict(self._loaded) | {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the state of each weight is used when the weight is next found."""
        self._states, self._loaded = {}, dict(state)
