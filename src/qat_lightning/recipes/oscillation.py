"""Weights that oscillate between two integers in training: tracked, dampened, and frozen.

Nagel et al., 2022, "Overcoming oscillations in quantization-aware training", https://arxiv.org/abs/2203.11086. All of
it happens to parameters and their gradients between two steps: the forward of a network, compiled or not, knows nothing
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.layers.rounded import RoundedLayer as TrainedLayer
from qat_lightning.modes.places import find_places
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import along
from qat_lightning.numerics.oscillation import Oscillation
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers


@dataclass(frozen=True)
class RoundedWeight:
    """A parameter, or a part of one, that a training rounds to a grid and moves.

    Attributes:
        layer: The layer's name in the float network.
        name: Of the state in a checkpoint.
        parameter: What the optimizer moves.
        fq: Whose grid it is.
        weight: Gives the part of the parameter.
        to_grid: The part as its grid sees it, float32: with BatchNorm folded in, or in rows.
        from_grid: The way back, in the shape of the part; where BatchNorm's factor is 0, what is given besides.
    """

    layer: str
    name: str
    parameter: Tensor
    fq: FakeQuantize
    weight: Callable[[], Tensor]
    to_grid: Callable[[Tensor], Tensor]
    from_grid: Callable[[Tensor, Tensor], Tensor]

    def on_grid(self, frozen: Tensor | None = None) -> _OnGrid:
        """Where the present weight is on its grid.

        Args:
            frozen: bool: which values have no say in the range, because they follow it; None for none.
        """
        seen = self.to_grid(self.weight())
        deciding = seen if frozen is None else seen.masked_fill(frozen, 0.0)
        scale, zero_point = _qparams(self.fq, deciding)
        low, high = (along(end - zero_point, seen, self.fq.grid.axis) for end in (self.fq.quant_min, self.fq.quant_max))
        scale = along(scale, seen, self.fq.grid.axis)
        # In the order of operations of `fake_quantize`, so that the integers are those of the forward pass.
        integers = torch.minimum(torch.maximum((seen * (1.0 / scale)).round(), low), high)
        return _OnGrid(seen, scale, integers, low, high)

    def put(self, values: Tensor, where: Tensor) -> None:
        """Write values of the grid into the parameter, where a mask in the grid's shape says so."""
        weight = self.weight()
        moved = self.from_grid(values, weight.float()).to(weight.dtype)
        weight.copy_(torch.where(self.mask(where), moved, weight))

    def mask(self, where: Tensor) -> Tensor:
        """A mask of the grid in the shape of the weight; nothing where BatchNorm's factor is 0."""
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
        """How far each value is from its point of the grid; what lies beyond the grid counts as being at its end."""
        clipped = torch.minimum(torch.maximum(self.seen, self.low * self.scale), self.high * self.scale)
        return clipped - self.integers * self.scale


def _qparams(fq: FakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point that a weight is rounded with; unlike `FakeQuantize.observe` it leaves no trace."""
    if fq.learns:
        return fq.calculate_qparams()
    low, high = fq.grid.ends(weight)
    return fq.grid.qparams(low * fq.clip, high * fq.clip) if fq.clipped else fq.grid.qparams(low, high)


def rounded_weights(prepared: nn.Module) -> Iterator[RoundedWeight]:
    """The weights of a prepared network that can oscillate: those that are parameters, and rounded now.

    Convolutions and linear layers of networks with fixed ranges, and every layer of kinds ``"dynamic"`` and
    ``"weight_only"`` but for those with adapters, of which the weight itself does not move.

    Args:
        prepared: What a mode's ``prepare`` made, with rounding on.
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
        if factor is None:
            return values
        return torch.where(factor == 0, otherwise, values / torch.where(factor == 0, 1.0, factor))

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
    """Follows the integers of all weights of some prepared networks from step to step.

    Weights that are frozen lie exactly on the point of the grid of their integer, whatever optimizer, momentum and
    weight decay did to them, and go with the grid where its scale moves; those that are free decide the scale. So
    rounding, conversion and everything else that reads a weight find the frozen integer.

    Args:
        momentum: The weight of a step in the moving averages of frequencies and of integers.

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
            networks: By name, which comes before the layers' names if there are several.

        Raises:
            CheckpointMismatchError: What was loaded is of weights of other shapes.
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
        """The layers with rounded weights that are not among them."""
        here = {weight.fq for _, weight in self.weights}
        places = [place for network in networks.values() for place in find_places(network)]
        return sorted({place.layer for place in places if place.what == "weight" and place.fq not in here})

    def _of(self, parameters: Container[int] | None) -> Iterator[tuple[str, RoundedWeight]]:
        return ((n, w) for n, w in self.weights if parameters is None or id(w.parameter) in parameters)

    @torch.no_grad()
    def step(self, threshold: float | None = None, parameters: Container[int] | None = None) -> None:
        """After a step of an optimizer: follow the integers, freeze what oscillates, and hold what is frozen.

        Args:
            threshold: The frequency above which a weight is frozen; None to freeze nothing more.
            parameters: The ids of those that the optimizer moves; None for all.
        """
        for name, weight in self._of(parameters):
            state = self._states.get(name)
            grid = weight.on_grid(None if state is None else state.frozen)
            if state is None:
                state = self._states[name] = Oscillation(grid.integers)
            state.observe(grid.integers, self.momentum)
            if threshold is not None:
                # Where the weights make their grid, those at its ends are what it is made of.
                state.freeze(threshold, None if weight.fq.learns else (grid.low, grid.high))
            weight.put(state.integers * grid.scale, state.frozen)

    @torch.no_grad()
    def hold(self) -> None:
        """Put what is frozen on its grid again, where something other than an optimizer moved that."""
        for name, weight in self.weights:
            if name in self._states:
                state = self._states[name]
                weight.put(state.integers * weight.on_grid(state.frozen).scale, state.frozen)

    @torch.no_grad()
    def block(self, parameters: Container[int] | None = None) -> None:
        """Before a step: take the gradients of frozen weights away, so that no norm of gradients counts them."""
        for name, weight in self._of(parameters):
            gradient, state = weight.gradient(), self._states.get(name)
            if gradient is not None and state is not None:
                gradient.masked_fill_(weight.mask(state.frozen), 0.0)

    @torch.no_grad()
    def dampen(self, strength: float, parameters: Container[int] | None = None) -> Tensor | None:
        """Before a step: add the gradient of the dampening loss, which pulls weights to their points of the grid.

        The loss is ``strength * sum((round(w) - clip(w))**2)`` over all weights (equation 6 of the paper); no gradient
        goes to the rounded weight, and none to what is beyond the grid.

        Args:
            strength: What the paper calls lambda.
            parameters: The ids of those that the optimizer moves; None for all.

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
        """By layer, the share of its weights that oscillate, and of those that are frozen."""
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
        """Undo `state_dict`; what each weight had is taken over when it is next looked at."""
        self._states, self._loaded = {}, dict(state)
