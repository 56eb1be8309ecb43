"""Leaving a layer or an op of a prepared network float, without preparing it again.

Layers and ops that turn out to have no int8 form, in a rehearsal before training or when a trained network is
converted, are left float in the prepared network itself, so that fake-quant and int8 stay equal. Every key of its
``state_dict`` stays too; only the weights are no longer rounded. Names and reasons are in its `PreparedState`, and so
in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.state_entries import from_entry, without_placeholders
from qat_lightning.settings.recipe import Recipe


def leave_float(prepared: nn.Module, reasons: Mapping[str, str], example: Example | None) -> list[str]:
    """Leave layers and ops of a prepared network float, in training and in conversion.

    Args:
        prepared: The result of a mode's ``prepare``; changed in place.
        reasons: For names from `Mode.parts`, why each cannot be int8. Other names are ignored.
        example: One call of the network; None if its ranges will be loaded.

    Returns:
        The names that were not float before.
    """
    state = prepared_state(prepared)
    possible = set(state.mode.parts(prepared))
    names = [name for name in reasons if name in possible]
    if names:
        state.mode.leave_float(prepared, names, example)
        state.left_float.update({name: reasons[name] for name in names})
    return names


def leaving_float(recipe: Recipe, left: Mapping[str, str], prefix: str) -> Recipe:
    """A recipe that leaves more layers float, by their names in the LightningModule."""
    more = tuple((join(prefix, name), why) for name, why in left.items())
    known = {name for name, _ in recipe.left_float}
    return replace(recipe, left_float=(*recipe.left_float, *(pair for pair in more if pair[0] not in known)))


def leave_weights_float(prepared: nn.Module, names: Collection[str]) -> None:
    """Never round the weights of these layers; their inputs and outputs stay on their grids."""
    for place in find_places(prepared):
        if place.what == "weight" and layer_of(place.layer) in names:
            place.fq.left_float = True


def weighted_layers(prepared: nn.Module, order: Callable[[FakeQuantize], int] = lambda fq: 0) -> list[str]:
    """The layers whose weights a prepared network rounds.

    Args:
        prepared: The result of a mode's ``prepare``.
        order: Sort key; by default the order of `find_places`.
    """
    places = [place for place in find_places(prepared) if place.what == "weight" and not place.fq.left_float]
    places.sort(key=lambda place: order(place.fq))
    return list(dict.fromkeys(layer_of(place.layer) for place in places))


def layer_of(name: str) -> str:
    """The layer that a call belongs to; mode fx has a separate module for each call.

    Example:
        >>> layer_of("head.fc_call_1"), layer_of("head.fc")
        ('head.fc', 'head.fc')
    """
    layer, called, number = name.rpartition("_call_")
    return layer if called and number.isdigit() else name


def with_reasons(rows: Iterable[LayerCoverage], left_float: Mapping[str, str]) -> list[LayerCoverage]:
    """The rows of layers; those that are left float get their reason."""
    return [
        replace(row, quantized=False, reason=left_float[row.name])
        if row.what == "layer" and row.name in left_float
        else row
        for row in rows
    ]


def follow_checkpoints(prepared: nn.Module) -> None:
    """Let a prepared network leave float what was left float in a checkpoint that is loaded into it."""
    prepared.register_load_state_dict_pre_hook(_take_over)


def _take_over(prepared: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    without_placeholders(state_dict)
    extra = state_dict.get(f"{prefix}_quantization._extra_state")
    if extra is not None:
        # No example: the ranges come from the checkpoint.
        leave_float(prepared, dict(from_entry(extra).get("left_float", ())), None)
