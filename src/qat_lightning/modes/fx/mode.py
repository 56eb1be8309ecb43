"""FX graph mode: functional ops are quantized as well, and the int8 network is a graph of packed kernels.

Upstream's prepare and convert (https://docs.pytorch.org/docs/stable/quantization.html) do the matching and lowering.
This package adds the FakeQuantize, layers with folded BatchNorm, the folding of ReLU6 and the verification.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.errors import ConversionError, NetworkError
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.given_sizes import GivenSizes
from qat_lightning.graph.scopes import join
from qat_lightning.layers.kernels import choose_kernels
from qat_lightning.layers.qat_modules import make_batchnorm_freezable, make_batchnorm_plain, round_weights_for_good
from qat_lightning.layers.tables import make_tables_plain
from qat_lightning.layers.transformer import written_out
from qat_lightning.modes.bias_range import hold_biases
from qat_lightning.modes.coverage import Operations, float_run, layers_with_macs, report
from qat_lightning.modes.fx import pads as fx_pads
from qat_lightning.modes.fx import passes
from qat_lightning.modes.fx.aliases import use_known_names
from qat_lightning.modes.fx.alignment import mark_origins, take_origins
from qat_lightning.modes.fx.autocast import NOT_SEEN
from qat_lightning.modes.fx.batchnorm import give_parameters
from qat_lightning.modes.fx.bounds import hide_bounded
from qat_lightning.modes.fx.coverage import FxOperations
from qat_lightning.modes.fx.fused import FUSED, hide_second_names, show_fused
from qat_lightning.modes.fx.inference import traced_with_inference
from qat_lightning.modes.fx.layers import custom_rows, each_once, layer_rows, no_kernel, read_by_ops
from qat_lightning.modes.fx.layouts import lay_out_as_torch
from qat_lightning.modes.fx.left_float import float_nodes, layers_and_ops, put_float_layers, take_out_never_rounding
from qat_lightning.modes.fx.linear_products import name_linear
from qat_lightning.modes.fx.other_sizes import ConvertsAgain, SharedLayers
from qat_lightning.modes.fx.own_memory import refuse_counted
from qat_lightning.modes.fx.plan import FxPlan, make_plan
from qat_lightning.modes.fx.product_forms import write_as_products
from qat_lightning.modes.fx.products import follow_earlier_checkpoints
from qat_lightning.modes.fx.shapes import CONSTANT
from qat_lightning.modes.fx.tables import call_embeddings, put_integer_tables, round_tables, take_integer_tables
from qat_lightning.modes.fx.train_and_eval import call_as_in_evaluation
from qat_lightning.modes.fx.transposed import called_on_one_sample, write_as_convolutions
from qat_lightning.modes.fx.tree import restore_children
from qat_lightning.modes.fx.unseen import in_words, knows_no_range, put_plain_layers, take_out_unseen
from qat_lightning.modes.fx.upstream import Hidden, convert_upstream, prepare_upstream
from qat_lightning.modes.fx.weights import (
    call_apart,
    compute_biases_of_functions,
    compute_weights_for_good,
    materialize_weights_of_functions,
    put_back,
    round_weights_of_functions,
    set_aside,
)
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart
from qat_lightning.modes.hooks import refuse_hooks
from qat_lightning.modes.layer_schemes import give_layers_their_grids
from qat_lightning.modes.left_float import follow_checkpoints, leave_weights_float, with_reasons
from qat_lightning.modes.merged import note_merged
from qat_lightning.modes.other_quantization import forget_qconfigs, refuse_other_quantization
from qat_lightning.modes.precision import refuse_mixed
from qat_lightning.modes.prepared import (
    PreparedState,
    copy_of_modules,
    follow_course,
    materialize_weights,
    name_float_tensors_first,
    prepared_state,
    refuse_simulated,
    weights_unrounded,
)
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.read_attributes import ReadAttributes, attributes_read
from qat_lightning.modes.reassigned_buffers import refuse_reassigned_buffers
from qat_lightning.modes.replaced import remember_layers
from qat_lightning.modes.tracing import (
    EVALUATED,
    MIXED,
    TWO_AND_MORE,
    leave_inside_float,
    outer_parts,
    refuse_another_for_one,
    refuse_other_results,
    trace,
)
from qat_lightning.modes.upstream_memory import nothing_remembered
from qat_lightning.modes.verify import check_layers
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.recomputation import keep_tapes
from qat_lightning.settings.engines import engine_here, packing_engine
from qat_lightning.settings.recipe import Recipe

_random_state_kept = torch.random.fork_rng(devices=[])
"""Upstream creates layers, whose initial weights draw random numbers."""


class FxMode:
    """`Mode` for ``mode="fx"``."""

    @nothing_remembered()
    @_random_state_kept
    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> GraphNetwork:
        """See `Mode.prepare`."""
        refuse_other_quantization(network)
        refuse_mixed(network, example)
        refuse_hooks(network, example, "fx")
        forget_qconfigs(network)
        keep_tapes()
        make_batchnorm_plain(network)  # of an earlier preparation
        make_tables_plain(network)
        float_network = copy_of_modules(network)
        with written_out(network, lambda name: recipe.selects(join(prefix, name)), "attention" in recipe.families):
            return self._prepare(network, float_network, example, recipe, prefix)

    def _prepare(
        self, network: nn.Module, float_network: nn.Module, example: Example, recipe: Recipe, prefix: str
    ) -> GraphNetwork:
        reads, changes = attributes_read(network, example)
        untraced = copy_of_modules(network) if changes else None
        selected = {
            name: recipe.selects(join(prefix, name)) and not no_kernel(module, recipe)
            for name, module in network.named_modules()
            if name
        }
        whole, by_example = outer_parts(network, selected), "identities" not in recipe.families
        learns = recipe.kind == "qat"

        def traced(network: nn.Module, example: Example) -> tuple[fx.GraphModule, dict[str, Any], GivenSizes | None]:
            return trace(network, example, whole, learns=learns, by_example=by_example)

        (graph_module, scopes, sizes), at_inference = traced_with_inference(network, example, traced)
        refuse_reassigned_buffers(float_network, example, "fx", graph=graph_module)
        if untraced is not None:
            refuse_counted(untraced, example, lambda network: traced(network, example)[0], learns=learns)
        two_and_more, mixed, evaluated = (graph_module.meta.pop(key) for key in (TWO_AND_MORE, MIXED, EVALUATED))
        leave_inside_float(graph_module, selected)
        if "twins" in recipe.families:
            use_known_names(graph_module.graph)
        passes.pass_over_identities(graph_module)
        fx_pads.name_zero_pads(graph_module, selected)
        if "products" in recipe.families:
            write_as_products(graph_module, network, example, scopes)
        if "linear" in recipe.families:
            name_linear(graph_module, scopes)
        if "tables" in recipe.families:
            call_embeddings(graph_module, network, selected, scopes)
        if "transposed" in recipe.families:
            chosen = selected | dict.fromkeys(called_on_one_sample(network, example), False)
            write_as_convolutions(graph_module, chosen, scopes, three=engine_here(recipe.target.engine) != "qnnpack")
        hidden = Hidden(network, graph_module, example)
        parameters = dict(network.named_parameters(remove_duplicate=False))
        show_bounded = hide_bounded(graph_module) if "bounds" in recipe.families else None
        prepared = prepare_upstream(graph_module, network, example, recipe, selected, scopes)
        bounded = [] if show_bounded is None else show_bounded(prepared)
        lasting = hidden.show(prepared)
        tables = round_tables(prepared, recipe, lambda name: selected[name]) if "tables" in recipe.families else {}
        if not any(isinstance(module, FakeQuantize) for module in prepared.modules()):
            raise NetworkError(
                f"There is nothing to quantize in {type(network).__name__}: no selected convolution, linear layer or "
                "addition. Check include and exclude, or use another module=."
            )
        with weights_unrounded(prepared):
            plan, unrounded = make_plan(prepared, network, example, recipe, scopes, prefix=prefix)
        plan.float_ops += passes.calls_of(prepared, hidden.unfoldable) + lasting + bounded
        plan.tables = tables
        result = _as_network(prepared, plan, unrounded, hidden.read)
        lay_out_as_torch(result, network)
        result.give_sizes(sizes, SharedLayers())
        result.inference_call = at_inference
        restore_children(result, hidden.originals, parameters, float_network)
        result.keep_evaluated(evaluated)
        make_batchnorm_freezable(result)
        result._quantization = PreparedState(self, recipe, float_network, prefix=prefix, plan=plan)
        live = [name for name, module in result.named_modules() if name and not isinstance(module, GraphPart)]
        result.watch_attributes(ReadAttributes(reads, live))
        give_layers_their_grids(result)
        materialize_weights(result)
        materialize_weights_of_functions(result, result.graph)
        follow_course(result)
        name_float_tensors_first(result)
        note_merged(result, result.graph, float_network, FUSED)
        follow_checkpoints(result)
        remember_layers(result)
        follow_earlier_checkpoints(result)
        refuse_other_results(result, float_network, example, _why_other(float_network, mixed))
        if two_and_more:
            refuse_another_for_one(result, float_network, example)
        return result

    @nothing_remembered()
    @_random_state_kept
    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """See `Mode.convert`."""
        state = prepared_state(prepared)
        plan: FxPlan = state.plan
        target = state.recipe.target
        refuse_simulated(state.recipe)
        example = in_float32(example)
        assert isinstance(prepared, GraphNetwork)
        recording = copy.deepcopy(prepared)
        if knows_no_range(prepared):
            raise ConversionError(
                f"No finite range was ever observed in {type(state.float_network).__name__}: train at least one step "
                "on finite values before converting it."
            )
        graph = copy.deepcopy(plan.graph)
        tables = take_integer_tables(prepared)
        unseen = _for_good(prepared, graph)
        # A ReLU is only dropped if the rounding after it has a range.
        passes.drop_nodes(graph, [name for name in plan.dropped if name not in {node.name for node in unseen}])
        graph_module = fx.GraphModule(prepared, graph)
        graph_module.meta = copy.copy(plan.meta)
        graph_module.eval()
        float_ops = [*plan.float_ops, *float_nodes(prepared, state.left_float)]
        show_float_ops = passes.hide_float_ops(graph_module, float_ops)
        mark_origins(graph_module.graph)
        int8 = convert_upstream(graph_module, target, type(state.float_network).__name__)
        show_float_ops(int8)
        put_integer_tables(int8, tables)
        put_float_layers(int8)
        fx_pads.pad_integers(int8)
        left = put_plain_layers(int8) if unseen else set()
        passes.reshape_views(int8.graph)
        network = GraphNetwork(int8)
        network.give_sizes(prepared.sizes, ConvertsAgain(recording) if prepared.sizes is not None else None)
        network.inference_call = prepared.inference_call
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        try:
            with packing_engine(target.engine):
                hold_biases(network, example)
            choose_kernels(network, target.engine)
            found = check_layers(recording, network, example, target, take_origins(network.graph))
        except RuntimeError as error:
            raise ConversionError(
                f"A kernel of backend {target.name!r} refuses the int8 {type(state.float_network).__name__}: {error}"
            ) from error
        without_range = {node.name for node in unseen}
        rows, operations = _rows(
            state,
            network,
            example,
            left,
            lambda names: FxOperations(recording, example, names, found.values).rows(found.integers, without_range),
        )
        call_as_in_evaluation(network)
        notes = [f"No finite range was ever observed for {in_words(unseen)}: they stay float."] if unseen else []
        return Converted(network, rows, found.checks, notes, operations, found.whole)

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """See `Mode.coverage`."""
        state = prepared_state(prepared)
        rows, operations = _rows(
            state, prepared, example, set(), lambda names: FxOperations(prepared, example, names).rows()
        )
        return [*rows, *operations]

    def parts(self, prepared: nn.Module) -> list[str]:
        """See `Mode.parts`."""
        return [name for name in layers_and_ops(prepared) if name not in prepared_state(prepared).left_float]

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """See `Mode.leave_float`: for an op, only its conversion changes."""
        leave_weights_float(prepared, names)


def _why_other(network: nn.Module, mixed: list[str]) -> str:
    """Possible reasons why a graph returns another result than its network."""
    if mixed:
        return f"{type(network).__name__}.forward turns on {', '.join(mixed)}: {NOT_SEEN}"
    return (
        f"mode='fx' traces {type(network).__name__}.forward into a graph that returns something different from the "
        "network on the example. Tracing does not capture functions that change an argument in place, for example "
        "with += (write y = y + … and return it), or decisions that depend on values or on "
        "x.__class__ (write isinstance)."
    )


def _as_network(prepared: fx.GraphModule, plan: FxPlan, unrounded: list[str], read: dict[str, str]) -> GraphNetwork:
    """The network that trains: the graph with the changes of the plan, and each range observed in one place."""
    result = GraphNetwork(prepared)
    result.set_graph(passes.without(plan.graph, [*unrounded, *fx_pads.roundings_behind(plan.graph)]))
    passes.observe_each_range_once(result)
    passes.drop_unused(result, plan.graph)
    hide_second_names(result)
    for graph in (result.graph, plan.graph):
        put_back(result, graph, read)
    result.set_graph(result.graph)
    result._non_persistent_buffers_set.update(name for name in result._buffers if name.startswith(CONSTANT))
    return result


def _for_good(prepared: GraphNetwork, graph: fx.Graph) -> list[fx.Node]:
    """Round and fold the weights for conversion, and remove what never rounds from the graph to convert.

    Returns:
        The nodes whose range was never observed.
    """
    take_out_never_rounding(graph, dict(prepared.named_modules(remove_duplicate=False)))
    set_aside(prepared, graph)
    call_apart(prepared, graph)
    show_fused(prepared)
    round_weights_of_functions(prepared, graph)
    compute_biases_of_functions(prepared, graph)
    compute_weights_for_good(prepared, graph)
    round_weights_for_good(prepared)
    make_batchnorm_plain(prepared)
    give_parameters(prepared)
    passes.observe_everywhere(prepared)
    return take_out_unseen(graph, dict(prepared.named_modules(remove_duplicate=False)))


def _rows(
    state: PreparedState,
    network: nn.Module,
    example: Example,
    left: set[str],
    operations: Callable[[set[str]], Operations],
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """The rows of the layers and of custom modules with weights of their own, and of the ops between them."""
    seen = float_run(state.float_network, example)
    rows = with_reasons(layer_rows(state, network, seen.used, left), state.left_float)
    rows = layers_with_macs(rows, seen, example)
    names = {row.name for row in rows}
    ops = report(lambda: operations(names))
    rows, others = each_once(read_by_ops(rows, state.plan.graph, ops.weights), ops.rows)
    return [*rows, *custom_rows(state, seen.custom, ops.weights)], others
