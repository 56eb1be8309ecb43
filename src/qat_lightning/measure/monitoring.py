"""Measuring how quantization affects each layer of a prepared network, in one step and without side effects.

During that step there is a hook on each place that rounds (`qat_lightning.modes.places`). It reads inputs, outputs and
gradients, and changes nothing. All sums stay on the device until `Probe.figures` reads them, in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.graph.scopes import join
from qat_lightning.layers.batchnorm import unfolded
from qat_lightning.measure.layer_figures import LayerFigures, activation_row, weight_row
from qat_lightning.modes.left_float import layer_of
from qat_lightning.modes.places import Place, find_places
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.grid import along

BINS = 64


COLUMNS = tuple(f.name for f in fields(LayerFigures))
FIGURES = COLUMNS[4:]
"""The columns with measured numbers."""


@torch.no_grad()
def grid_of(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, quant_min: int, quant_max: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """The integers of a tensor, and a mask of clipped values, where the straight-through estimator passes no gradient.

    Args:
        x: Values of any shape.
        scale: float32, shape ``()`` or ``(x.shape[axis],)``.
        zero_point: int32, likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of ``x``; None for one scale.

    Returns:
        Integers as float32 and a mask, both of the shape of ``x``. The rounding is that of
        `qat_lightning.numerics.fake_quantize.fake_quantize`.

    Example:
        >>> integers, clipped = grid_of(
        ...     torch.tensor([0.26, 99.0]), torch.tensor(0.1), torch.tensor(0), quant_min=-127, quant_max=127
        ... )
        >>> integers.tolist(), clipped.tolist()
        ([3.0, 127.0], [False, True])
    """
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    integers = torch.round(x.float() * (1.0 / scale)) + zero_point
    kept = integers.clamp(quant_min, quant_max)
    return kept, kept != integers


@dataclass
class _Tally:
    """Sums over the values of one place; kept on the device."""

    elements: int = 0
    signal: Any = 0.0
    noise: Any = 0.0
    clipped: Any = 0.0
    gradient: Any = 0.0
    gradient_cut: Any = 0.0
    grid: list[Tensor] = field(default_factory=list)
    dead: Tensor | None = None
    values: list[Tensor] = field(default_factory=list)
    calls: int = 0


class Probe:
    """Measures all places of some prepared networks while it is attached.

    Args:
        networks: Prepared networks by name; the name comes before the layers' names if there are several.
        samples: Number of samples of each batch that are measured (the first ones); dead channels are searched in all.
        histograms: Whether to keep values for `histograms`.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> x = torch.randn(4, 8)
        >>> prepared = get_mode("eager").prepare(nn.Sequential(nn.Linear(8, 3)), Example((x,)), Recipe("eager", "x86"))
        >>> probe = Probe({"net": prepared})
        >>> with probe:
        ...     prepared(x).sum().backward()
        >>> [(row.layer, row.kind, row.activation_sqnr_db > 30) for row in probe.figures()]
        [('0', 'Linear', True), ('0.input', 'input', True)]
    """

    def __init__(self, networks: Mapping[str, nn.Module], *, samples: int = 8, histograms: bool = False) -> None:
        self.samples = samples
        self.keep = histograms
        self._places: list[tuple[str, str, int, Place]] = []
        for name, network in networks.items():
            state = prepared_state(network)
            recipe = state.recipe
            prefix = f"{name}." if len(networks) > 1 else ""
            for place in find_places(network):
                bits = recipe.of(join(state.prefix, layer_of(place.layer))).scheme.weight_bits
                self._places.append((prefix + place.layer, recipe.mode, bits, place))
        self._tallies: dict[int, _Tally] = {}
        self._calls: dict[nn.Module, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Probe:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Start measuring; earlier measurements are discarded."""
        self.detach()
        self._tallies, self._calls = {}, {}
        of_module: dict[nn.Module, list[int]] = {}
        for index, (*_, place) in enumerate(self._places):
            of_module.setdefault(place.module, []).append(index)
        for module, indices in of_module.items():
            self._handles.append(module.register_forward_hook(self._hook(indices)))

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, indices: list[int]) -> Any:
        turns = self._places[indices[0]][-1].turns

        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            call = self._calls.get(module, 0)
            self._calls[module] = call + 1
            for index in indices:
                turn = self._places[index][-1].turn
                if turn is None or turn == call % turns:
                    self._look(index, args[0], output, *args[1:])

        return look

    @torch.no_grad()
    def _look(self, index: int, x: Tensor, output: Tensor, factor: Tensor | None = None, channels: int = 0) -> None:
        place = self._places[index][-1]
        fq, is_weight = place.fq, place.what == "weight"
        # A weight's range is that of the present weight, and unknown before fake-quantization is enabled.
        if not fq.seen or x.numel() == 0 or (is_weight and not fq.fake_quant_enabled):
            return
        tally = self._tallies.setdefault(index, _Tally())
        part = slice(None) if is_weight or x.dim() < 2 else slice(0, self.samples)
        seen = x.detach()[part].float()
        if factor is not None:  # the weight is rounded with BatchNorm folded in
            factor = along(factor, x, channels)
            seen = seen * factor
        scale, zero_point = fq.calculate_qparams()
        axis = fq.ch_axis if fq.per_channel else None
        integers, clipped = grid_of(seen, scale, zero_point, quant_min=fq.quant_min, quant_max=fq.quant_max, axis=axis)
        rounded = (integers - along(zero_point, seen, axis)) * along(scale, seen, axis)
        tally.calls += 1
        tally.grid = _grid_figures(scale, zero_point, fq.quant_min, fq.quant_max)
        tally.elements += seen.numel()
        tally.signal = tally.signal + seen.square().sum()
        tally.noise = tally.noise + (seen - rounded).square().sum()
        tally.clipped = tally.clipped + clipped.sum()
        if place.kind != "input":
            dead = _zero_channels(rounded, axis or 0) if is_weight else _constant_channels(output.detach(), place.kind)
            tally.dead = dead if tally.dead is None else tally.dead & dead
        if self.keep and len(tally.values) < 2:
            tally.values.append(integers if is_weight else seen)
        if output.requires_grad:
            output.register_hook(lambda gradient: _count_gradient(tally, _of_product(gradient, factor), part, clipped))

    def figures(self) -> list[LayerFigures]:
        """The measurements, one row per layer that ran."""
        indices = [index for index, tally in self._tallies.items() if tally.calls]
        numbers = dict(zip(indices, _read([self._numbers(index) for index in indices]), strict=True))
        first: dict[str, int] = {}
        for position, (layer, *_) in enumerate(self._places):
            first.setdefault(layer, position)
        rows: dict[str, dict[str, Any]] = {}
        for index in sorted(indices, key=lambda index: (first[self._places[index][0]], index)):
            layer, mode, bits, place = self._places[index]
            row = rows.setdefault(layer, {"layer": layer, "kind": place.kind, "mode": mode})
            if place.what == "weight":
                row |= weight_row(numbers[index], bits)
            else:
                row |= activation_row(numbers[index])
        dead = self._dead_channels(indices)
        return [LayerFigures(**row, dead_channels=dead.get(layer)) for layer, row in rows.items()]

    def _numbers(self, index: int) -> list[Any]:
        tally = self._tallies[index]
        sums = [tally.signal, tally.noise, tally.clipped, tally.gradient, tally.gradient_cut]
        return [*sums, float(tally.elements), *tally.grid]

    def _dead_channels(self, indices: Sequence[int]) -> dict[str, int]:
        masks: dict[str, list[Tensor]] = {}
        for index in indices:
            dead = self._tallies[index].dead
            if dead is not None:
                masks.setdefault(self._places[index][0], []).append(dead)
        counts = []
        for layer in masks:
            first, *others = masks[layer]
            for other in others:
                first = first | other if other.shape == first.shape else other
            counts.append([first.sum()])
        return {layer: int(count) for layer, (count,) in zip(masks, _read(counts), strict=True)}

    @torch.no_grad()
    def histograms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Counts and edges of histogram bins on the CPU: of activations' values, and of weights' integers.

        Returns:
            By ``activations/<layer>`` and ``weight_integers/<layer>``; the latter has one bin per integer.
        """
        result = {}
        for index, tally in self._tallies.items():
            layer, _, _, place = self._places[index]
            if not tally.values:
                continue
            values = torch.cat([value.flatten() for value in tally.values])
            if place.what == "weight":
                low, high = place.fq.quant_min - 0.5, place.fq.quant_max + 0.5
                bins = place.fq.quant_max - place.fq.quant_min + 1
            else:
                values = values[torch.isfinite(values)]
                bins = BINS
                low, high = (float(end) for end in torch.aminmax(values)) if values.numel() else (0.0, 1.0)
                high = high if high > low else low + 1.0
            counts = torch.histc(values, bins, low, high).cpu()
            name = "weight_integers" if place.what == "weight" else "activations"
            result[f"{name}/{layer}"] = counts, torch.linspace(low, high, bins + 1)
        return result


def totals(rows: Iterable[LayerFigures]) -> dict[str, float]:
    """The figures of a whole network: the worst layer's SQNR, the largest shares, and the number of dead channels.

    Example:
        >>> row = LayerFigures("conv", "Conv2d", "fx", activation_sqnr_db=31.5, clipped_share=0.25, dead_channels=2)
        >>> totals([row, LayerFigures("head", "Linear", "fx", activation_sqnr_db=40.0)])
        {'least_activation_sqnr_db': 31.5, 'most_clipped_share': 0.25, 'dead_channels': 2.0}
    """
    rows = list(rows)
    summary: dict[str, float] = {}
    for name, prefix, choose in (
        ("weight_sqnr_db", "least_", min),
        ("activation_sqnr_db", "least_", min),
        ("clipped_share", "most_", max),
        ("gradient_cut_share", "most_", max),
        ("weight_gradient_cut_share", "most_", max),
        ("oscillating_share", "most_", max),
        ("dead_channels", "", sum),
    ):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            summary[prefix + name] = float(choose(values))
    return summary


def _grid_figures(scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> list[Tensor]:
    """Smallest and largest scale, zero point, and ends of the range; over all channels, if scales are per channel."""
    low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    return [scale.amin(), scale.amax(), zero_point.amin(), low.amin(), high.amax()]


def _of_product(gradient: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient for the rounded product of weight and factor; 0 where the factor is 0."""
    return gradient if factor is None else unfolded(gradient, factor, 0.0)


@torch.no_grad()
def _count_gradient(tally: _Tally, gradient: Tensor, part: slice, clipped: Tensor) -> None:
    size = gradient.detach()[part].float().abs()
    tally.gradient = tally.gradient + size.sum()
    tally.gradient_cut = tally.gradient_cut + (size * clipped).sum()


def _zero_channels(weight: Tensor, axis: int) -> Tensor:
    return (weight.movedim(axis, 0).flatten(1) == 0).all(1)


_CHANNELS_LAST = ("Linear", "linear", "LayerNorm", "layer_norm")


def _constant_channels(x: Tensor, kind: str) -> Tensor:
    """Which channels are constant: dimension 1 of images and series, the last one of tokens and linear layers."""
    if x.dim() < 2:
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    tokens = x.dim() == 3 and not kind.startswith(("Conv", "conv", "BatchNorm"))
    axis = x.dim() - 1 if kind in _CHANNELS_LAST or tokens else 1
    others = [dim for dim in range(x.dim()) if dim != axis]
    return x.amin(others) == x.amax(others)


def _read(rows: list[list[Any]]) -> list[list[float]]:
    """Read numbers from the device, in one transfer."""
    flat = [value for row in rows for value in row]
    tensors = [value for value in flat if isinstance(value, Tensor)]
    values = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else [])
    read = iter([next(values) if isinstance(value, Tensor) else float(value) for value in flat])
    return [[next(read) for _ in row] for row in rows]
