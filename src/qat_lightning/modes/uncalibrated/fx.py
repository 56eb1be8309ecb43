"""FX graph mode: the network as a graph that a file can store, with layers and linear functions replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning.errors import NetworkError, first_line
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.integer import integer_layer
from qat_lightning.layers.transformer import written_out
from qat_lightning.modes.coverage import float_run
from qat_lightning.modes.fx.inference import traced_with_inference
from qat_lightning.modes.fx.other_sizes import aside, example_like
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.hooks import refuse_hooks
from qat_lightning.modes.judging import Names
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.reassigned_buffers import refuse_reassigned_buffers
from qat_lightning.modes.tracing import outer_parts, trace_evaluation
from qat_lightning.modes.uncalibrated.checking import (
    Call,
    check_layers,
    check_whole_of,
    end_to_end,
    refuse_nothing,
    run_float,
    run_integer,
)
from qat_lightning.modes.uncalibrated.eager import Shares, cover, float_copy
from qat_lightning.modes.uncalibrated.macs import with_macs
from qat_lightning.settings.recipe import Recipe


def quantize_fx(network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "", shares: Shares) -> Converted:
    """See `qat_lightning.modes.uncalibrated.quantize`."""
    original = float_copy(network)
    expected = run_float(original, example)
    selected = {name: recipe.selects(join(prefix, name)) for name, _ in original.named_modules() if name}
    whole = outer_parts(original, selected)
    with written_out(original, lambda name: False):  # attention becomes one integer layer
        (graph_module, sizes), at_inference = traced_with_inference(
            original, example, lambda network, example: trace_evaluation(network, example, whole)
        )
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    refuse_hooks(original, example, "fx", called=called)
    refuse_reassigned_buffers(original, example, "fx", train=False, graph=graph_module)
    used = float_run(original, example).used
    coverage = [_in_graph(row, graph_module.graph, used) for row in cover(original, recipe, prefix)]
    # Training rounds layers, and a network is converted as it was trained.
    functional = [] if recipe.trained else _linear_functions(graph_module, recipe, prefix)
    # If the network itself is a layer, it is traced through: its row describes the function inside.
    coverage = [row for row in coverage if row.name or not functional]
    if not functional:
        refuse_nothing(original, coverage, recipe)
    for row in coverage:
        if row.quantized:
            own = recipe.of(join(prefix, row.name))
            _put(graph_module, row.name, integer_layer(original.get_submodule(row.name), own, shares.get(row.name)))
    reached = [_owner(node) for node in functional]
    for node in functional:
        traced = _traced_through(node, graph_module.graph)
        weight = str(_linear_arguments(node)["weight"].target)
        made = _replace_function(graph_module, node, recipe.of(join(prefix, weight)))
        rows = [row.name for row in coverage]
        if traced in rows:
            coverage[rows.index(traced)] = replace(coverage[rows.index(traced)], quantized=True, reason="")
        else:
            coverage.append(made)
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.delete_all_unused_submodules()
    integer = GraphNetwork(graph_module).eval()
    again = None if sizes is None else QuantizesAgain(float_copy(network), recipe, prefix, shares)
    integer.give_sizes(sizes, again)
    integer.inference_call = at_inference
    _drop_unread(integer)
    actual, calls = run_integer(integer, example)
    named = Names(prefix, {name for name, _ in original.named_modules()})
    checks, notes = check_layers(calls, recipe.target, named)
    checked = check_whole_of(integer, actual, calls, example, checks, named)
    functions = _flops_of_functions(calls, [f"functional_{node.name}" for node in functional])
    coverage, between = with_macs(coverage, original, example, recipe, functions, reached, prefix=prefix)
    return Converted(integer, coverage, checks, [*notes, *end_to_end(expected, actual)], between, checked)


class QuantizesAgain:
    """Quantizes a float network again for other input sizes than its graph supports, until it is saved.

    Args:
        network: The float network; not changed.
        recipe: The recipe it is quantized with.
        prefix: Its name in the LightningModule.
        shares: The shares of clipped ranges that training chose.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, prefix: str, shares: Shares) -> None:
        self.network, self.recipe, self.prefix, self.shares = network, recipe, prefix, shares

    def __call__(self, network: GraphNetwork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The integer network for inputs like these; its first argument is the network.

        Raises:
            NetworkError: It cannot be quantized for them.
        """
        assert network.sizes is not None
        try:
            with aside():
                example = example_like(network, self.network, args, kwargs)
                made = quantize_fx(self.network, example, self.recipe, prefix=self.prefix, shares=self.shares).network
        except Exception as error:  # a network may raise anything for other sizes
            raise NetworkError(
                f"{network.sizes.refusal(network.sizes.others(args, kwargs))} ({first_line(error)})"
            ) from error
        return lambda network, *args, **kwargs: made(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizesAgain:
        """Itself, because it does not change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a file does not store the float network."""
        return type(None), ()


def _in_graph(row: LayerCoverage, graph: fx.Graph, used: set[str]) -> LayerCoverage:
    """Leave a layer float if the graph does not call it, or reads its weight directly."""
    called = [str(node.target) for node in graph.find_nodes(op="call_module")]
    if not row.excluded and row.name not in used:
        return LayerCoverage(row.name, row.kind, False, "not used by forward")
    if not row.quantized:
        return row
    if row.name not in called:
        whole = next((outer for outer in called if row.name.startswith(f"{outer}.")), None)
        reason = f"inside {whole!r}, which is called as a whole: mode='eager' and mode='pt2e' reach it"
        return LayerCoverage(row.name, row.kind, False, reason if whole else "forward only reads its weight")
    if any(str(node.target).startswith(f"{row.name}.") for node in graph.find_nodes(op="get_attr")):
        return LayerCoverage(row.name, row.kind, False, "forward reads its weight directly, besides calling it")
    return row


def _traced_through(node: fx.Node, graph: fx.Graph) -> str:
    """The layer of a custom class for a linear function, if the function is the only reader of its weight."""
    weight, layer = _linear_arguments(node)["weight"], _owner(node)
    called = any(other.target == layer for other in graph.find_nodes(op="call_module"))
    readers = [u for other in graph.find_nodes(op="get_attr", target=weight.target) for u in other.users]
    return "" if called or readers != [node] else layer


def _owner(node: fx.Node) -> str:
    """The module whose parameter is the weight of a linear function."""
    return str(_linear_arguments(node)["weight"].target).rpartition(".")[0]


def _linear_functions(graph_module: fx.GraphModule, recipe: Recipe, prefix: str) -> list[fx.Node]:
    """Calls of ``F.linear`` with a weight of the network."""
    found = []
    for node in graph_module.graph.find_nodes(op="call_function", target=F.linear):
        bound = _linear_arguments(node)
        weight, bias = bound.get("weight"), bound.get("bias")
        attributes = [part for part in (weight, bias) if part is not None]
        if not all(isinstance(part, fx.Node) and part.op == "get_attr" for part in attributes) or weight is None:
            continue
        if recipe.selects(join(prefix, str(weight.target))):
            found.append(node)
    return found


def _linear_arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)


def _replace_function(graph_module: fx.GraphModule, node: fx.Node, recipe: Recipe) -> LayerCoverage:
    arguments = _linear_arguments(node)
    weight = _value(graph_module, arguments["weight"])
    bias = None if arguments.get("bias") is None else _value(graph_module, arguments["bias"])
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")  # draws no random numbers
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    name = f"functional_{node.name}"
    graph_module.add_submodule(name, integer_layer(layer, recipe))
    with graph_module.graph.inserting_after(node):
        call = graph_module.graph.call_module(name, (arguments["input"],))
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    for part in (arguments["weight"], arguments.get("bias")):
        if isinstance(part, fx.Node) and not part.users:
            graph_module.graph.erase_node(part)
    return LayerCoverage(name, "F.linear", True)


def _flops_of_functions(calls: list[Call], names: list[str]) -> dict[str, int]:
    """Floating point operations of layers made from functions, each of which is called once."""
    found = {}
    for call in calls:
        if call.name in names and call.inputs is not None:
            weight: Any = call.layer.weight
            found[call.name] = 2 * call.inputs[0][0].numel() * weight.shape[0]
    return found


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    holder, _, leaf = str(node.target).rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(holder), leaf)
    return value.detach()


def _put(graph_module: fx.GraphModule, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    graph_module.get_submodule(parent)._modules[leaf] = layer


def _drop_unread(network: GraphNetwork) -> None:
    """Drop the parameters of functions that were replaced."""
    read = {str(node.target) for node in network.graph.find_nodes(op="get_attr")}
    called = tuple(f"{node.target}." for node in network.graph.find_nodes(op="call_module"))
    for name, _ in [*network.named_parameters(), *network.named_buffers()]:
        if name not in read and not name.startswith(called):
            holder, _, leaf = name.rpartition(".")
            module = network.get_submodule(holder)
            module._parameters.pop(leaf, None)
            module._buffers.pop(leaf, None)
