"""Training for the kinds without calibration: the user's own ``forward`` runs, with layers rounded as in the result."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from qat_lightning.errors import NetworkError, VerificationError
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.scopes import join
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.adapters import take_over_choice
from qat_lightning.layers.operators import module_types
from qat_lightning.layers.qat_modules import make_batchnorm_freezable
from qat_lightning.layers.rounded import RoundedLayer
from qat_lightning.layers.rounded_adapters import round_trained
from qat_lightning.modes.eager.layers import without_fast_paths
from qat_lightning.modes.float_state import present_float
from qat_lightning.modes.judging import Names
from qat_lightning.modes.left_float import follow_checkpoints, leave_float, leaving_float, with_reasons
from qat_lightning.modes.other_quantization import refuse_other_quantization
from qat_lightning.modes.precision import refuse_mixed
from qat_lightning.modes.prepared import (
    PreparedState,
    changed_attributes,
    copy_of_modules,
    follow_course,
    is_prepared,
    materialize_weights,
    name_float_tensors_first,
    prepared_state,
    remember_attributes,
)
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.replaced import remember_layers
from qat_lightning.modes.uncalibrated.adapters import refuse_adapters, stored_name, trained_layer, whole
from qat_lightning.modes.uncalibrated.checking import refuse_nothing, run, run_float
from qat_lightning.modes.uncalibrated.eager import cover
from qat_lightning.modes.uncalibrated.flow import quantize
from qat_lightning.modes.uncalibrated.macs import with_macs
from qat_lightning.modes.uncalibrated.reads import READ_ELSEWHERE, read_elsewhere
from qat_lightning.modes.whole import Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.numerics.dynamic_fake_quantize import disturbed_roundings
from qat_lightning.numerics.recomputation import keep_tapes
from qat_lightning.settings.kinds import check_kind
from qat_lightning.settings.recipe import Recipe

TABLES = module_types("table")


class DirectMode:
    """`Mode` for ``kind="dynamic"`` and ``kind="weight_only"`` in every mode; that mode converts.

    Layers are rounded in place, so any network can train, including its control flow.
    """

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """Let the layers of ``network``, which stays the same object, train with fake-quant; see `Mode.prepare`.

        The recipe of the prepared network is a trained one, whether or not ``recipe`` is: conversion makes integer
        only what was rounded here.
        """
        recipe = replace(recipe, trained=True)
        if is_prepared(network):
            raise NetworkError(f"{type(network).__name__} is prepared for quantization already.")
        check_kind(recipe)
        refuse_other_quantization(network)
        refuse_adapters(network, recipe)
        refuse_mixed(network, example)
        keep_tapes()
        float_network = copy_of_modules(network)
        rows = cover(whole(float_network, recipe), recipe, prefix)
        read = _tables_read_elsewhere(float_network, rows, example)
        refuse_nothing(float_network, with_reasons(rows, read), recipe)
        without_fast_paths(network)
        make_batchnorm_freezable(network)
        for row in rows:
            if row.quantized:
                round_trained(trained_layer(network, row.name), recipe.of(join(prefix, row.name)))
        network._quantization = PreparedState(self, recipe, float_network, prefix=prefix)
        follow_course(network)
        name_float_tensors_first(network)
        follow_checkpoints(network)
        materialize_weights(network)
        remember_attributes(network)
        remember_layers(network)
        leave_float(network, read, None)
        return network

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Create the integer network from the current weights, and compare it with the trained one."""
        state, example = prepared_state(prepared), in_float32(example)
        rounded = rounded_layers(prepared)
        shares = {name: layer.shares() for name, layer in rounded.items()}
        recipe = leaving_float(state.recipe, state.left_float, state.prefix)
        network = present_float(prepared)
        take_over_choice(network, prepared)
        network = whole(network, recipe)
        converted = quantize(network, example, recipe, prefix=state.prefix, shares=shares)
        names = Names(state.prefix, {name for name, _ in network.named_modules()})
        _refuse_other_layers(converted, rounded, recipe)
        self._compare(prepared, converted, example, names)
        plan = vars(converted.network).get("quantization_plan")
        if plan is not None:
            plan["attributes"] = changed_attributes(prepared)
        converted.coverage = with_reasons(converted.coverage, state.left_float)
        return converted

    @staticmethod
    def _compare(prepared: nn.Module, converted: Converted, example: Example, names: Names) -> None:
        def trained(disturb: Disturbance) -> Any:
            with disturbed_roundings(disturb):  # inputs may be integers, which cannot be disturbed
                return run(prepared, Example(*tree_map(disturb, (example.args, example.kwargs))))

        row = check_whole(run(prepared, example), run(converted.network, example), (trained,))
        if row is not None and not is_right(row):
            raise_if_wrong(row, [], converted.checks, names)
        converted.whole = row

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """See `Mode.coverage`."""
        state = prepared_state(prepared)
        network = whole(copy.deepcopy(state.float_network).cpu().float().eval(), state.recipe)
        run_float(network, example)
        rows = cover(network, state.recipe, state.prefix)
        rows, between = with_macs(rows, network, example, state.recipe, prefix=state.prefix)
        return [*with_reasons(rows, state.left_float), *between]

    def parts(self, prepared: nn.Module) -> list[str]:
        """See `Mode.parts`: the layers that are rounded."""
        return list(rounded_layers(prepared))

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """See `Mode.leave_float`."""
        for name in names:
            layer = trained_layer(prepared, name)
            assert isinstance(layer, RoundedLayer)
            layer.leave_float()


def _tables_read_elsewhere(network: nn.Module, rows: list[LayerCoverage], example: Example) -> dict[str, str]:
    tables = [row.name for row in rows if row.quantized and isinstance(network.get_submodule(row.name), TABLES)]
    if not tables:
        return {}
    with evaluating(network):
        return dict.fromkeys(read_elsewhere(network, tables, example), READ_ELSEWHERE)


def rounded_layers(prepared: nn.Module) -> dict[str, RoundedLayer]:
    """The layers of a prepared network that are rounded, by their names."""
    layers = {
        stored_name(prepared, name): module
        for name, module in prepared.named_modules()
        if isinstance(module, RoundedLayer)
    }
    return {name: layer for name, layer in layers.items() if not all(part.left_float for part in layer.roundings())}


def _refuse_other_layers(converted: Converted, rounded: Collection[str], recipe: Recipe) -> None:
    """Raise an error for layers that trained with rounding but stay float, so that both networks leave them float."""
    stayed = {row.name: row.reason for row in converted.coverage if not row.quantized and row.name in rounded}
    if stayed:
        why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in stayed.items())
        raise VerificationError(
            f"{len(stayed)} layers trained for kind={recipe.kind!r} stay float in mode={recipe.mode!r} ({why}).",
            tuple(stayed),
        )
