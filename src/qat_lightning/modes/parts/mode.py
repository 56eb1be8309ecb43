"""Mode parts: if the network cannot be captured as a whole, its largest capturable submodules are quantized.

The network stays the user's own object and its code runs between the parts, each of which is a network of mode fx.
Everything outside of the parts stays float. A checkpoint has one `PreparedState` entry for the whole network; those of
the parts are derived from it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from qat_lightning.errors import ConversionError, NetworkError, TraceError, VerificationError, first_line
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.layers.qat_modules import make_batchnorm_freezable
from qat_lightning.modes.eager.forwards import forward_begins, forward_ends
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.fx.unseen import knows_no_range
from qat_lightning.modes.left_float import follow_checkpoints
from qat_lightning.modes.other_quantization import refuse_other_quantization
from qat_lightning.modes.parts.check import check_whole_network
from qat_lightning.modes.parts.coverage import Part, rows_of_parts
from qat_lightning.modes.parts.finding import Found, catch_calls, find_parts, replace_modules
from qat_lightning.modes.parts.int8 import assemble
from qat_lightning.modes.precision import refuse_mixed
from qat_lightning.modes.prepared import (
    PreparedState,
    copy_of_modules,
    fake_quantizers,
    follow_course,
    is_prepared,
    name_float_tensors_first,
    prepared_parts,
    prepared_state,
    refuse_simulated,
    remember_attributes,
)
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.replaced import remember_layers
from qat_lightning.modes.tracing import refuse_other_results
from qat_lightning.settings.recipe import Recipe

UNSEEN = "no finite range was observed in this part, because training did not call it"


class _PartState(PreparedState):
    """State of a part: not in the ``state_dict``, because the state of the whole network contains everything."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


@dataclass(frozen=True)
class PartsPlan:
    """Data that conversion needs about a network by parts.

    Attributes:
        examples: The first call of each part in the run of the example.
        refused: Modules that were tried and refused, and why.
    """

    examples: dict[str, Example]
    refused: dict[str, str]


class PartsMode:
    """`Mode` for ``mode="parts"``."""

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """Insert fake-quant into parts of ``network``, which stays the same object; see `Mode.prepare`."""
        if is_prepared(network):
            raise NetworkError(f"{type(network).__name__} is prepared for quantization already.")
        refuse_other_quantization(network)
        refuse_mixed(network, example)
        inner = replace(recipe, mode=FX)
        found = find_parts(
            network, example, lambda name, module, calls: _attempt(module, calls, inner, join(prefix, name))
        )
        if not any(_layers(network.get_submodule(name)) > 1 for name in found.parts):
            raise _no_parts(network, found)
        float_network = copy_of_modules(network)
        modules = {name: network.get_submodule(name) for name in found.parts}
        prepared = {
            name: FxMode().prepare(module, found.parts[name][0], inner, prefix=join(prefix, name))
            for name, module in modules.items()
        }
        replace_modules(network, {module: prepared[name] for name, module in modules.items()})
        for part in prepared.values():
            part._quantization.__class__ = _PartState
        make_batchnorm_freezable(network)
        plan = PartsPlan({name: calls[0] for name, calls in found.parts.items()}, found.refused)
        network._quantization = PreparedState(self, recipe, float_network, prefix=prefix, plan=plan)
        remember_attributes(network)
        follow_course(network)  # last, because the parts had a course each
        name_float_tensors_first(network)
        for name, part in prepared.items():
            for _, fq in fake_quantizers(part):
                fq.is_shared = fq.is_shared or len(found.parts[name]) > 1
        network.register_forward_pre_hook(forward_begins, prepend=True)
        network.register_forward_hook(forward_ends, always_call=True)
        follow_checkpoints(network)
        remember_layers(network)
        refuse_other_results(
            network,
            float_network,
            example,
            f"{type(network).__name__}.forward computes different values once {_quoted(prepared)} are graphs: it "
            "depends on their types, or it is not deterministic.",
        )
        return network

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Convert each part, and put them into a copy of the float network; see `Mode.convert`."""
        state = prepared_state(prepared)
        refuse_simulated(state.recipe)
        example = in_float32(example)
        recording = copy.deepcopy(prepared)
        calls = catch_calls(prepared, example, prepared_parts(prepared))
        parts = _parts_of(prepared)
        unseen = [name for name, part in parts.items() if knows_no_range(part)]
        if len(unseen) == len(parts):
            raise ConversionError(
                f"No finite range was ever observed in {type(state.float_network).__name__}: train at least one step "
                "on finite values before converting it."
            )
        for name in unseen:
            for fq in _fake_quantizers_of(recording, name):
                fq.enable_fake_quant(False)
        done: dict[str, Part] = {}
        int8: dict[str, nn.Module] = {}
        checks, notes = [], [_note(state, parts)]
        for name, part in parts.items():
            first = calls[name][0] if name in calls else state.plan.examples[name]
            if name in unseen:
                done[name] = Part(prepared_state(part).float_network, first, why=UNSEEN)
                notes.append(f"No finite range was ever observed in {name!r}, which stays float.")
                continue
            converted = _convert_part(name, part, first)
            int8[name] = converted.network
            done[name] = Part(prepared_state(part).float_network, first, converted.coverage, converted.operations)
            checks += [replace(row, name=join(name, row.name)) for row in converted.checks]
            notes += [f"In {name!r}: {note}" for note in converted.notes]
        network = assemble(state.float_network, int8, recording)
        whole = check_whole_network(recording, network, list(int8), checks, example)
        rows, operations = rows_of_parts(state, state.plan.refused, done, example)
        return Converted(network, rows, checks, notes, operations, whole, tuple(int8))

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """See `Mode.coverage`."""
        state = prepared_state(prepared)
        calls = catch_calls(prepared, example, prepared_parts(prepared))
        done = {}
        for name, part in _parts_of(prepared).items():
            first = calls[name][0] if name in calls else state.plan.examples[name]
            rows = FxMode().coverage(part, first)
            layers, operations = ([row for row in rows if row.what == what] for what in ("layer", "op"))
            done[name] = Part(prepared_state(part).float_network, first, layers, operations)
        rows, operations = rows_of_parts(state, state.plan.refused, done, example)
        return [*rows, *operations]

    def parts(self, prepared: nn.Module) -> list[str]:
        """See `Mode.parts`: those of each part, prefixed with its name."""
        parts = _parts_of(prepared)
        return [join(name, inner) for name, part in parts.items() for inner in FxMode().parts(part)]

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """See `Mode.leave_float`."""
        for name, part in prepared_parts(prepared).items():
            own = [inner for inner in (_within(name, left) for left in names) if inner is not None]
            FxMode().leave_float(part, own, None)


FX = "fx"
"""The mode of each part."""


def _attempt(module: nn.Module, calls: list[Example], recipe: Recipe, prefix: str) -> None:
    """Prepare a copy of a module, and check that it supports all of its calls."""
    if isinstance(module, WEIGHTED) and not recipe.selects(prefix):
        raise NetworkError("it is excluded")
    prepared = FxMode().prepare(module, calls[0], recipe, prefix=prefix)
    float_module = prepared_state(prepared).float_network
    for call in _others(calls):
        if not prepared.takes(call.args, call.kwargs):
            raise TraceError("it is called with several sizes, on which its computation depends, or with other inputs")
        refuse_other_results(prepared, float_module, call, "its calls do not all take the same path.")


def _others(calls: list[Example]) -> list[Example]:
    """One call of each form that differs from the first call's."""
    forms: dict[Any, Example] = {}
    for call in calls:
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        form = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        forms.setdefault((str(spec), form), call)
    return list(forms.values())[1:]


def _layers(module: nn.Module) -> int:
    return sum(isinstance(inner, WEIGHTED) for inner in module.modules())


def _no_parts(network: nn.Module, found: Found) -> NetworkError:
    refused = [(name, why) for name, why in found.refused.items() if name not in found.parts]
    why = "; ".join(f"{name}: {first_line(reason)}" for name, reason in refused[:6])
    single = f"only single layers can ({_quoted(list(found.parts)[:6])})" if found.parts else "nor any single layer"
    return NetworkError(
        f"No submodule of {type(network).__name__} with several layers can be quantized on its own, "
        f"{single}{f' ({why})' if why else ''}. Check include and exclude, or use mode='eager', which quantizes "
        "single layers whatever the code around them does."
    )


def _parts_of(prepared: nn.Module) -> dict[str, nn.Module]:
    """The parts, each with its share of the state ``left_float``."""
    parts = prepared_parts(prepared)
    left = prepared_state(prepared).left_float
    for name, part in parts.items():
        own = {_within(name, outer): why for outer, why in left.items()}
        prepared_state(part).left_float = {inner: why for inner, why in own.items() if inner is not None}
    return parts


def _within(part: str, name: str) -> str | None:
    """A name in the network relative to a part; None if it is outside of it."""
    if name == part:
        return ""
    return name.removeprefix(f"{part}.") if name.startswith(f"{part}.") else None


def _fake_quantizers_of(prepared: nn.Module, part: str) -> list[Any]:
    return [fq for _, fq in fake_quantizers(prepared.get_submodule(part))]


def _convert_part(name: str, part: nn.Module, example: Example) -> Converted:
    """Convert a part; faults in it are reported with names in the whole network."""
    part._quantization.__class__ = PreparedState  # other sizes are prepared again, and load a whole ``state_dict``
    try:
        return FxMode().convert(part, example)
    except VerificationError as error:
        checks = [replace(row, name=join(name, row.name)) for row in error.checks]
        raise VerificationError(str(error), [join(name, layer) for layer in error.layers], checks) from error


def _note(state: PreparedState, parts: Collection[str]) -> str:
    return (
        f"Quantized by parts, each a graph of mode {FX!r}: {_quoted(parts)}. The code of "
        f"{type(state.float_network).__name__} around them runs as it is, in float."
    )


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))
