"""PT2 export mode: the whole network as one graph of aten ops, annotated by the backend's quantizer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.scopes import join
from qat_lightning.graph.signature import CallSpec
from qat_lightning.graph.training_flags import set_training_flags, training_flags
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.modes.captured_once import captured
from qat_lightning.modes.checkpointing import refuse_checkpoints
from qat_lightning.modes.coverage import float_run, layers_with_macs, report
from qat_lightning.modes.decomposed.int8 import Int8Network
from qat_lightning.modes.hooks import refuse_hooks
from qat_lightning.modes.layer_schemes import give_layers_their_grids
from qat_lightning.modes.left_float import follow_checkpoints, leave_weights_float, weighted_layers, with_reasons
from qat_lightning.modes.merged import note_merged
from qat_lightning.modes.other_quantization import refuse_other_quantization
from qat_lightning.modes.own_gradients import refuse_own_gradients
from qat_lightning.modes.own_weights import float_rows
from qat_lightning.modes.precision import refuse_mixed, refuse_other_precision
from qat_lightning.modes.prepared import (
    PreparedState,
    copy_of_modules,
    fake_quantizers,
    follow_course,
    name_float_tensors_first,
    prepared_state,
    refuse_simulated,
)
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.pt2e.annotate import insert_fake_quantize
from qat_lightning.modes.pt2e.capture import capture, captured_inference
from qat_lightning.modes.pt2e.check import coverage
from qat_lightning.modes.pt2e.comparison import check_layers
from qat_lightning.modes.pt2e.convert import decompose, visit_weights
from qat_lightning.modes.pt2e.coverage import pt2e_operations
from qat_lightning.modes.pt2e.network import ExportedNetwork
from qat_lightning.modes.pt2e.training import Plan, adopt, training_graph, weight_quantizers
from qat_lightning.modes.read_attributes import ReadAttributes, attributes_read
from qat_lightning.modes.reassigned_buffers import refuse_reassigned_buffers
from qat_lightning.modes.replaced import remember_layers
from qat_lightning.modes.tracing import refuse_other_results
from qat_lightning.modes.upstream_memory import nothing_remembered
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.recomputation import keep_tapes
from qat_lightning.settings.backends import require
from qat_lightning.settings.recipe import Recipe

_ELSEWHERE = {
    "xnnpack": ("the phone's kernels", ""),
    "tensorrt": ("the GPU's kernels", "; export it as ONNX, from which TensorRT builds its engine"),
}
"""Backends whose kernels run on another machine: a description of them, and how the network gets there."""

_OTHERS = ("the target's kernels", "; hand qat.quantized's graph, or export='exported_program', to its toolchain")
"""The same for a user's quantizer."""


class Pt2eMode:
    """Mode pt2e, for its built-in backends and for any PT2E quantizer."""

    @nothing_remembered()
    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """See `Mode.prepare`."""
        require(recipe.target)
        refuse_other_quantization(network)
        refuse_other_precision(network)
        refuse_mixed(network, example)
        refuse_hooks(network, example, "pt2e")
        _refuse_spectral_norm(network)
        refuse_checkpoints(network, example, "pt2e")
        if recipe.kind == "qat":
            refuse_own_gradients(network, example, "pt2e")
        keep_tapes()
        float_network = copy_of_modules(network)
        reads, _ = attributes_read(network, example)

        def captured_with(call: Example) -> tuple[fx.GraphModule, CallSpec]:
            by_numbers = "convolutions" in recipe.families
            return captured(network, call, prefix, lambda: capture(network, call, by_numbers=by_numbers))

        graph_module, spec = captured_with(example)
        refuse_reassigned_buffers(float_network, example, "pt2e")
        at_inference = captured_inference(graph_module.graph, network, example, captured_with)
        prepared, folded = insert_fake_quantize(graph_module, recipe, prefix=prefix, name=spec.name)
        flags = training_flags(network)
        root = adopt(network, prepared)
        plan = Plan(copy.deepcopy(prepared.graph), dict(prepared.meta), folded, {}, spec)
        plan.weights = weight_quantizers(root, plan.graph)
        result = ExportedNetwork(root, training_graph(root, plan), spec)
        result.inference_call = at_inference
        result._quantization = PreparedState(self, recipe, float_network, prefix=prefix, plan=plan)
        live = [name for name, module in result.named_modules() if is_batchnorm(module)]
        result.watch_attributes(ReadAttributes(reads, live))
        give_layers_their_grids(result)
        visit_weights(fx.GraphModule(result, copy.deepcopy(plan.graph)), FakeQuantize.materialize)
        if recipe.quantizer is not None:
            result._quantization.grids = {name: str(fq.grid) for name, fq in fake_quantizers(result)}
        follow_course(result)
        name_float_tensors_first(result)
        note_merged(result, result.graph, float_network)
        follow_checkpoints(result)
        remember_layers(result)
        result.keep_extra_state_of(float_network)
        set_training_flags(result, flags)
        refuse_other_results(
            result,
            float_network,
            example,
            f"mode='pt2e' keeps one graph for training and evaluation, and {spec.name}.forward returns different "
            "values in evaluation from its training graph (it depends on self.training).",
        )
        return result

    @nothing_remembered()
    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """See `Mode.convert`."""
        assert isinstance(prepared, ExportedNetwork)
        state = prepared_state(prepared)
        refuse_simulated(state.recipe)
        example = in_float32(example)
        plan: Plan = state.plan
        result = decompose(copy.deepcopy(prepared), plan, plan.spec.name)
        found = check_layers(prepared, result.graph_module, plan, example, state.recipe.target)
        network = Int8Network(
            result.graph_module, plan.spec, state.recipe.backend, state.recipe.runtime, prepared.inference_call
        )
        notes = []
        if state.recipe.backend != "x86":
            kernels, how = _ELSEWHERE.get(state.recipe.backend, _OTHERS)
            notes.append(
                f"backend={state.recipe.backend!r}: on this machine the int8 network runs as a decomposed graph, with "
                f"the values of {kernels} and not their speed{how}."
            )
        if result.unseen:
            names = ", ".join(result.unseen)
            notes.append(f"No finite range was ever observed for {names}: layers that read them stay float.")
        rows = with_reasons(coverage(state, prepared, result), state.left_float)
        rows, operations = _rows(state, prepared, example, rows, found.values, result.unseen)
        return Converted(network, rows, found.checks, notes, operations, found.whole)

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """See `Mode.coverage`."""
        assert isinstance(prepared, ExportedNetwork)
        state = prepared_state(prepared)
        rows, operations = _rows(
            state, prepared, example, with_reasons(coverage(state, prepared, None), state.left_float)
        )
        return [*rows, *operations]

    def parts(self, prepared: nn.Module) -> list[str]:
        """See `Mode.parts`: layers only; ops between them are float in the decomposed graph already."""
        plan: Plan = prepared_state(prepared).plan
        ran = [
            prepared.get_submodule(plan.weights[node.name]) for node in plan.graph.nodes if node.name in plan.weights
        ]
        order = {id(fq): number for number, fq in reversed(list(enumerate(ran)))}
        return weighted_layers(prepared, lambda fq: order.get(id(fq), len(ran)))

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """See `Mode.leave_float`."""
        leave_weights_float(prepared, names)


def _rows(
    state: PreparedState,
    prepared: ExportedNetwork,
    example: Example,
    layers: list[LayerCoverage],
    values: Mapping[str, Any] | None = None,
    unseen: Sequence[str] = (),
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """The rows of the layers and of custom modules with weights of their own, and of the ops between them."""
    seen, names = float_run(state.float_network, example), {row.name for row in layers}
    ops = report(lambda: pt2e_operations(state, prepared, example, names, values, unseen))
    custom = float_rows(
        state.float_network, seen.custom, lambda name: state.recipe.selects(join(state.prefix, name)), ops.weights.get
    )
    return [*layers_with_macs(layers, seen, example), *custom], ops.rows


def _refuse_spectral_norm(network: nn.Module) -> None:
    """Raise an error for a parametrization that updates its buffers in training only, which one graph cannot do.

    Raises:
        TraceError: There is such a parametrization; the message names the layers.
    """
    layers = [
        name.partition(".parametrizations.")[0]
        for name, module in network.named_modules()
        if isinstance(module, _SpectralNorm)
    ]
    if layers:
        raise TraceError(
            f"mode='pt2e' keeps one graph for training and evaluation, and {', '.join(map(repr, layers))} in "
            f"{type(network).__name__} has spectral_norm, which behaves differently in training. What to do: use "
            "mode='fx' or mode='eager', which leave such a layer float, or, to get an int8 layer, remove the norm "
            "after training it: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
        )
