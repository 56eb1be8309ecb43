"""Layers of a prepared network with a scheme of their own: their FakeQuantizes get its grids, in every mode.

A mode prepares all layers with one scheme. `Scheme.overrides` is applied afterwards, by the names that `find_places`
returns, and before anything is observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.modes.left_float import layer_of
from qat_lightning.modes.places import Place, find_places
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.qconfig import make_qconfig, table_fake_quantize
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.integer_grid import IntegerGrid
from qat_lightning.settings.overrides import matches, unmatched
from qat_lightning.settings.recipe import Recipe

_TABLES = tuple(table.__name__ for table in module_types("table"))


def give_layers_their_grids(prepared: nn.Module) -> None:
    """Set the grids of the layers that ``Scheme.overrides`` matches.

    For activations, this is the grid of a layer's output, after its BatchNorm and activation function. Values that
    share a range, such as the inputs of ``cat``, share one grid: that of the layer with the fewest bits among those
    they come from.

    Args:
        prepared: A network that carries its `PreparedState` and has observed nothing yet. Its weights have to be
            materialized (again) after this.
    """
    state = prepared_state(prepared)
    if not state.recipe.scheme.overrides:
        return
    places: dict[FakeQuantize, list[Place]] = {}
    for place in find_places(prepared):
        if place.what == "weight" or (place.fq.observed and place.kind not in ("input", "parameter")):
            places.setdefault(place.fq, []).append(place)
    for fq, found in places.items():
        own = _coarsest([state.recipe.of(join(state.prefix, layer_of(place.layer))) for place in found])
        grid, clipped = _grid(fq, found[0], own)
        if (grid, clipped) != (fq.grid, fq.clipped):
            fq.take_grid(grid, clipped=clipped)


def check_overrides_of(networks: Mapping[str, nn.Module], recipe: Recipe) -> None:
    """Raise an error for a pattern of ``Scheme.overrides`` that matches no layer of the given networks.

    Args:
        networks: All float networks of the recipe, by their dotted names in the LightningModule.
        recipe: The recipe they will be prepared with.

    Raises:
        ConfigurationError: See `check_overrides`.
    """
    if recipe.scheme.overrides:
        check_overrides(recipe, [layer for prefix, network in networks.items() for layer in _layers(network, prefix)])


def _layers(network: nn.Module, prefix: str) -> list[str]:
    """The modules with weights: layers, and custom classes that multiply by a matrix."""
    return [
        join(prefix, name)
        for name, module in network.named_modules()
        if isinstance(module, WEIGHTED) or any(part.dim() > 1 for part in module.parameters(recurse=False))
    ]


def check_overrides(recipe: Recipe, layers: Sequence[str]) -> None:
    """Raise an error for a pattern of ``scheme.overrides`` that matches no layer which can be quantized.

    Args:
        recipe: The recipe of all networks.
        layers: The names of the layers with weights of all networks, in the LightningModule.

    Raises:
        ConfigurationError: A pattern matches none; the message suggests similar names.

    Example:
        >>> from qat_lightning.settings.scheme import Scheme
        >>> try:
        ...     check_overrides(Recipe("fx", "x86", Scheme(overrides={"net.haed": "float"})), ["net.stem", "net.head"])
        ... except ConfigurationError as error:
        ...     str(error)[-24:]
        "Did you mean 'net.head'?"
    """
    possible = [layer for layer in layers if recipe.chooses(layer)]
    for pattern, near in unmatched(recipe.scheme.overrides or {}, possible):
        if any(matches(pattern, layer) for layer in layers):
            raise ConfigurationError(
                f"scheme.overrides[{pattern!r}] matches only layers that include= and exclude= leave float: remove "
                "it, or let them be quantized."
            )
        some = ", ".join(possible[:12]) + (", …" if len(possible) > 12 else "")
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are {some}."
        raise ConfigurationError(f"scheme.overrides[{pattern!r}] matches no layer that can be quantized. {hint}")


def _coarsest(recipes: Sequence[Recipe]) -> Recipe:
    return min(recipes, key=lambda recipe: recipe.scheme.activation_bits)


def _grid(fq: FakeQuantize, place: Place, recipe: Recipe) -> tuple[IntegerGrid, bool]:
    """The grid of a place by the recipe of its layer, and whether its range is clipped."""
    if place.what == "weight":
        made = table_fake_quantize(recipe) if place.kind in _TABLES else make_qconfig(recipe).weight()
    else:
        made = make_qconfig(recipe).activation()
    low, high = made.quant_min, made.quant_max
    qscheme, axis = made.qscheme, made.ch_axis
    if recipe.target.own_grids:
        # The quantizer determined the grid; it is only made coarser.
        bits = recipe.scheme.weight_bits if place.what == "weight" else recipe.scheme.activation_bits
        low, high = coarser(fq.quant_min, fq.quant_max, bits, is_weight=place.what == "weight")
        qscheme = fq.qscheme if place.what == "activation" or recipe.scheme.per_channel else made.qscheme
    if fq.per_channel and made.per_channel:
        axis = fq.ch_axis  # a kernel may have another channel dimension
    return replace(fq.grid, quant_min=low, quant_max=high, qscheme=qscheme, ch_axis=axis), made.clipped


def coarser(low: int, high: int, bits: int, *, is_weight: bool) -> tuple[int, int]:
    """The limits of a grid, reduced to the number of values that some bits allow.

    Args:
        low: Smallest integer of the present grid.
        high: Largest integer.
        bits: Number of bits; from 8 on the grid is not changed.
        is_weight: Whether the grid is symmetric around 0.

    Example:
        >>> coarser(-127, 127, 4, is_weight=True), coarser(0, 255, 4, is_weight=False)
        ((-7, 7), (0, 15))
    """
    if bits >= 8:
        return low, high
    half = 2 ** (bits - 1)
    least, most = (0, 2 * half - 1) if low == 0 else (1 - half if is_weight else -half, half - 1)
    return max(low, least), min(high, most)
