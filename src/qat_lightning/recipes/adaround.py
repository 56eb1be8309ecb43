"""AdaRound: for each weight, whether to round up or down is learned, so that each layer gives what it gave before.

Nagel et al., 2020, "Up or down? Adaptive rounding for post-training quantization", https://arxiv.org/abs/2004.10568:
layer-wise reconstruction with the rectified sigmoid (equations 21 to 25), on the inputs that a layer gets when those
before it are rounded already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.modes.float_state import float_weights
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.recipes.bias_correction import apply_layer
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers
from qat_lightning.rehearsal.calibration import call

_LOW, _HIGH = -0.1, 1.1
"""The sigmoid is stretched to this interval and clipped to [0, 1], so that it reaches both ends."""


@dataclass(frozen=True)
class AdaRound:
    """Settings of `adaround`.

    Args:
        iterations: Steps for each layer.
        batch_size: Samples of a step.
        learning_rate: Of Adam.
        regularization: Weight of the term that pushes each weight to one of its two points.
        warm_up: Share of the iterations before that term is enabled.

    Raises:
        ConfigurationError: A value is not possible.

    Example:
        >>> AdaRound(iterations=500).iterations
        500
    """

    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 0.01
    regularization: float = 0.01
    warm_up: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is not possible."""
        for name in ("iterations", "batch_size"):
            value: Any = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"adaround.{name}={value!r} is not possible: give an int from 1.")
        for name in ("learning_rate", "regularization", "warm_up"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "learning_rate" and value == 0):
                raise ConfigurationError(f"adaround.{name}={value!r} is not possible: give a number above 0.")
        if self.warm_up >= 1:
            raise ConfigurationError(f"adaround.warm_up={self.warm_up!r} is not possible: give a share below 1.")


@dataclass(frozen=True)
class Reconstruction:
    """How far a layer's output is from the float network's, on the calibration data, relative to its mean square.

    Attributes:
        nearest: With weights rounded to the nearest point.
        learned: With the rounding that is used now; never more.
        flipped: Share of the weights that are not at the nearest point now.
    """

    nearest: float
    learned: float
    flipped: float


def adaround(
    prepared: nn.Module,
    batches: Sequence[Any],
    settings: AdaRound | None = None,
    *,
    progress: Callable[[int, int, str, Reconstruction], None] | None = None,
) -> dict[str, Reconstruction]:
    """Learn for each weight whether it is rounded up or down, layer by layer, in place.

    The weights are moved to the points that were learned, so that rounding to the nearest, in the network and in its
    conversion, gives these points; the grid stays. Where nothing is won, a layer is left as it was.

    Args:
        prepared: The network with fake-quant, calibrated or not.
        batches: Calls of the network, as for `qat_lightning.calibrate`, on its device. The inputs of one layer at a
            time are kept for all of them.
        settings: See `AdaRound`.
        progress: Called after each layer with its number from 1, how many there are, its name and the result.

    Returns:
        By the names of the layers, what was won.

    Raises:
        ConversionError: There is no batch.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
        >>> prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86", kind="static"))
        >>> result = adaround(prepared, [x], AdaRound(iterations=50))["0"]
        >>> result.learned <= result.nearest
        True
    """
    if not batches:
        raise ConversionError("AdaRound needs data: give at least one batch.")
    settings = settings or AdaRound()
    plain, rounded = _float_copy(prepared), _float_copy(prepared)
    layers = rounded_layers(prepared)
    results: dict[str, Reconstruction] = {}
    for number, layer in enumerate(layers, start=1):
        wanted, given = (_inputs(network, layer.name, batches) for network in (plain, rounded))
        if given:
            results[layer.name] = _learn(layer, torch.cat(wanted), torch.cat(given), settings)
            # What the layers behind it get from now on.
            _use(rounded.get_submodule(layer.name), layer)
            if progress is not None:
                progress(number, len(layers), layer.name, results[layer.name])
    return results


def _float_copy(prepared: nn.Module) -> nn.Module:
    network = copy.deepcopy(prepared_state(prepared).float_network)
    network.load_state_dict(float_weights(prepared))
    device = next((parameter.device for parameter in prepared.parameters()), torch.device("cpu"))
    return network.to(device).float().eval().requires_grad_(False)


class _Reached(Exception):
    """The layer was called: what is behind it need not run."""


@torch.no_grad()
def _inputs(network: nn.Module, name: str, batches: Sequence[Any]) -> list[Tensor]:
    """What a layer is called with; empty if the network does not call it."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0].detach().float().clone())
        raise _Reached

    handle = network.get_submodule(name).register_forward_pre_hook(keep)
    try:
        for batch in batches:
            try:
                call(network, batch)
            except _Reached:
                continue
    finally:
        handle.remove()
    return kept


class _Rounding:
    """The weights of one layer between the two points of the grid around each.

    Args:
        layer: Its weight is looked at.
    """

    def __init__(self, layer: RoundedLayer) -> None:
        self.folded = layer.folded()
        self.nearest = layer.rounded()
        fq = layer.fq
        shape = [1] * self.folded.dim()
        if fq.per_channel:
            shape[fq.ch_axis] = -1
        scale, zero_point = fq.calculate_qparams()
        self.scale = scale.reshape(shape)
        position = self.folded / self.scale
        self.floor = position.floor()
        low, high = fq.quant_min - zero_point.reshape(shape), fq.quant_max - zero_point.reshape(shape)
        self.low, self.high = low, high
        # At the ends the weights decide the range, and so the grid; they stay, and so does what would go past them.
        least, most = self._ends(fq)
        past = (self.floor * self.scale < least - 1e-5 * most.abs()) | (
            (self.floor + 1) * self.scale > most + 1e-5 * most.abs()
        )
        self.fixed = past | (position >= high - 0.5) | (position <= low + 0.5)
        self.fixed |= (self.folded == least) | (self.folded == most)
        share = (position - self.floor).clamp(1e-4, 1 - 1e-4)
        self.variable = -torch.log((_HIGH - _LOW) / (share - _LOW) - 1)

    def _ends(self, fq: FakeQuantize) -> tuple[Tensor, Tensor]:
        """The least and the greatest weight of each grid, by which its range is known."""
        channel = fq.ch_axis % self.folded.dim() if fq.per_channel else None
        axes = [axis for axis in range(self.folded.dim()) if axis != channel]
        least, most = self.folded.amin(axes, keepdim=True), self.folded.amax(axes, keepdim=True)
        if fq.symmetric:
            most = torch.maximum(-least, most)
            return -most, most
        return least.clamp(max=0.0), most.clamp(min=0.0)

    def share(self, variable: Tensor) -> Tensor:
        """The rectified sigmoid, equation 23: 0 for down, 1 for up."""
        return (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self, share: Tensor) -> Tensor:
        """The weight with each value between its two points."""
        values = (self.floor + share).clamp(self.low, self.high) * self.scale
        return torch.where(self.fixed, self.nearest, values)

    def final(self, variable: Tensor) -> Tensor:
        """What to store: points of the grid, and the values at the ends as they were."""
        values = self.weight((self.share(variable) >= 0.5).to(self.folded.dtype))
        return torch.where(self.fixed, self.folded, values)


def _learn(layer: RoundedLayer, wanted: Tensor, given: Tensor, settings: AdaRound) -> Reconstruction:
    """Optimize equation 25 of the paper, and keep the result where it is better than the nearest points."""
    rounding = _Rounding(layer)
    float_layer: Any = prepared_state(layer.network).float_network.get_submodule(layer.name)
    channel = -1 if isinstance(float_layer, nn.Linear) else 1
    with torch.no_grad():
        target = torch.cat([apply_layer(float_layer, part, rounding.folded) for part in wanted.split(256)])
    variable = rounding.variable.clone().requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(0)
    warm = int(settings.warm_up * settings.iterations)
    with torch.enable_grad():
        for step in range(settings.iterations):
            chosen = torch.randint(len(given), (min(settings.batch_size, len(given)),), generator=generator)
            chosen = chosen.to(given.device)
            share = rounding.share(variable)
            output = apply_layer(float_layer, given[chosen], rounding.weight(share))
            loss = (output - target[chosen]).square().sum(channel).mean()
            if step >= warm:
                done = (step - warm) / max(1, settings.iterations - warm)
                beta = 2 + (20 - 2) * 0.5 * (1 + math.cos(math.pi * done))
                decided = 1 - (2 * share - 1).abs().pow(beta)
                loss = loss + settings.regularization * torch.where(rounding.fixed, 0.0, decided).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _keep_if_better(layer, rounding, variable.detach(), float_layer, given, target)


@torch.no_grad()
def _keep_if_better(
    layer: RoundedLayer, rounding: _Rounding, variable: Tensor, float_layer: Any, given: Tensor, target: Tensor
) -> Reconstruction:
    size = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def error(weight: Tensor) -> float:
        outputs = torch.cat([apply_layer(float_layer, part, weight) for part in given.split(256)])
        return float((outputs - target).square().mean() / size)

    nearest = error(rounding.nearest)
    before = layer.module.weight.detach().clone()
    factor = layer.factor()
    final = rounding.final(variable)
    plain = final if factor is None else torch.where(factor == 0, before.float(), final / factor)
    layer.module.weight.copy_(plain)
    # Read back: it counts what the network and its conversion will make of the stored weight.
    stored = layer.rounded()
    learned = error(stored)
    if not learned < nearest:
        layer.module.weight.copy_(before)
        layer.rounded()
        return Reconstruction(nearest, nearest, 0.0)
    moved = (stored - rounding.nearest).abs() > 0.5 * rounding.scale
    return Reconstruction(nearest, learned, float(moved.float().mean()))


@torch.no_grad()
def _use(module: Any, layer: RoundedLayer) -> None:
    """Give a float layer the rounded weight, divided by what BatchNorm behind it multiplies with."""
    rounded, factor = layer.rounded(), layer.factor()
    if factor is not None:
        rounded = torch.where(factor == 0, module.weight, rounded / torch.where(factor == 0, 1.0, factor))
    module.weight.copy_(rounded)
