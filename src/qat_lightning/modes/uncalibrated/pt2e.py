"""PT2 export mode: the network as one graph of aten ops with integer weights, compiled by Inductor.

Dynamic linear layers consist of the ops that X86InductorQuantizer and XNNPACKQuantizer produce
(https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html), which Inductor and ExecuTorch turn into int8 kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import ConversionError
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join, scope_of
from qat_lightning.graph.signature import CallSpec
from qat_lightning.layers.integer import lacks_kernel
from qat_lightning.layers.integer.weight_only import weights_of
from qat_lightning.layers.integer.weights import (
    WeightGrid,
    dequantize_rows,
    quantize_rows,
    store,
    transposed_groups,
    weight_of_rows,
    weight_rows,
)
from qat_lightning.modes.decomposed.int8 import Int8Network
from qat_lightning.modes.eager.layers import without_fast_paths
from qat_lightning.modes.hooks import refuse_hooks
from qat_lightning.modes.judging import Names, raise_if_faulty
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.modes.pt2e.capture import capture, captured_inference
from qat_lightning.modes.pt2e.convert import evaluate, tidy
from qat_lightning.modes.reassigned_buffers import refuse_reassigned_buffers
from qat_lightning.modes.uncalibrated.checking import (
    EXACT,
    end_to_end,
    inputs_of,
    plain_attention,
    refuse_nothing,
    run_float,
    sqnr_of,
)
from qat_lightning.modes.uncalibrated.eager import Shares, cover, float_copy
from qat_lightning.modes.uncalibrated.macs import with_macs
from qat_lightning.modes.uncalibrated.pt2e_nodes import EPS, dequantized, integer_weight, rounded_dynamically
from qat_lightning.modes.verify import Recorder
from qat_lightning.modes.whole import check_whole, is_right, raise_if_wrong
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.recipe import Recipe

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed


def quantize_pt2e(
    network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "", shares: Shares
) -> Converted:
    """See `qat_lightning.modes.uncalibrated.quantize`."""
    original = float_copy(network)
    expected = run_float(original, example)
    refuse_hooks(original, example, "pt2e")
    without_fast_paths(original)
    coverage = cover(original, recipe, prefix)
    with plain_attention():
        graph_module, spec = capture(original, example, train=False)
        at_inference = captured_inference(
            graph_module.graph, original, example, lambda call: capture(original, call, train=False)
        )
    refuse_reassigned_buffers(original, example, "pt2e", train=False)
    evaluate(graph_module.graph)
    uses = _uses(original, graph_module, coverage, recipe)
    chosen = {f"{layer}.{name}" if layer else name: share for layer, of in shares.items() for name, share in of.items()}

    def grid_of(use: _Use) -> WeightGrid:
        return WeightGrid.of(recipe.of(join(prefix, use.layer)))

    if recipe.kind == "dynamic":
        done = _make_dynamic(graph_module, uses, recipe.target, grid_of, chosen)
    else:
        done = _make_weight_only(graph_module, uses, grid_of, chosen)
    used = {use.name for found in uses.values() for use in found}
    coverage = [_after(row, original, used, done, recipe) for row in coverage]
    refuse_nothing(original, coverage, recipe)
    graph_module.graph.eliminate_dead_code(lambda node: node.is_impure())
    graph_module.graph.lint()
    graph_module.recompile()
    decomposed = tidy(graph_module)
    integer = Int8Network(decomposed, spec, recipe.backend, inference_call=at_inference)
    tensors = spec.flatten(*inputs_of(example))
    try:
        names = Names(prefix, {name for name, _ in original.named_modules()})
        checks = _check(decomposed, tensors, done, coverage, recipe.target, names)
        with buffers_copied(decomposed):
            actual = spec.unflatten(decomposed(*tensors))
        whole = _check_whole(decomposed, tensors, done, spec, actual, (recipe.target, checks, names))
    except RuntimeError as error:
        raise ConversionError(
            f"{spec.name} does not run once its weights are integers: {error}. Use exclude= for the part that fails."
        ) from error
    coverage, between = with_macs(coverage, original, example, recipe, prefix=prefix)
    return Converted(integer, coverage, checks, [*_notes(recipe), *end_to_end(expected, actual)], between, whole)


@dataclass
class _Use:
    """A node that computes with a weight of a layer.

    Attributes:
        node: The node.
        layer: The layer with the weight; if several share it, the one that the node belongs to.
        name: The weight's full name.
        wanted: Whether it is to be quantized.
        transposed_groups: Result of the function of this name for the layer.
    """

    node: fx.Node
    layer: str
    name: str
    wanted: bool
    transposed_groups: int


Uses = dict[fx.Node, list[_Use]]
"""For each node that reads a weight, the nodes that compute with it."""

GridOf = Callable[[_Use], WeightGrid]
"""The grid of a layer's weight."""


def _uses(network: nn.Module, graph_module: fx.GraphModule, coverage: list[LayerCoverage], recipe: Recipe) -> Uses:
    owners: dict[int, list[tuple[LayerCoverage, str]]] = {}
    for row in coverage:
        module = network.get_submodule(row.name)
        for name in weights_of(module):
            full = f"{row.name}.{name}" if row.name else name
            owners.setdefault(module.get_parameter(name).data_ptr(), []).append((row, full))
    found: Uses = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = _value(graph_module, node)
        if not isinstance(value, Tensor) or value.data_ptr() not in owners:
            continue
        for user in node.users:
            for row, name in _belonging(user, owners[value.data_ptr()]):
                layer = network.get_submodule(row.name)
                # Without a kernel for the whole layer; training rounds only whole layers.
                in_parts = not recipe.trained and not row.excluded and lacks_kernel(layer, recipe.kind)
                wanted = row.quantized or in_parts
                groups = transposed_groups(layer)
                found.setdefault(node, []).append(_Use(user, row.name, name, wanted, groups))
    return found


def _belonging(user: fx.Node, owners: list[tuple[LayerCoverage, str]]) -> list[tuple[LayerCoverage, str]]:
    """The layers in whose ``forward`` a node is; if it is in none of them, all that share the weight."""
    scope = f"{scope_of(user)}."
    return [owner for owner in owners if scope.startswith(f"{owner[0].name}.")] or owners


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    holder, _, leaf = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(holder), leaf)


Done = dict[str, list[tuple[fx.Node, Any]]]
"""For each full name of a weight, the nodes to check, and the reference values."""


def _make_dynamic(
    graph_module: fx.GraphModule, uses: Uses, target: Backend, grid_of: GridOf, shares: Mapping[str, Tensor]
) -> Done:
    limits = (*target.activation_limits, target.activation_dtype)
    done: Done = {}
    for node, found in uses.items():
        for linear in dict.fromkeys(use.node for use in found if use.wanted):
            if linear.target is not aten.linear.default or linear.args[1] is not node or _value_dims(linear) == 1:
                continue
            of_linear = [use for use in found if use.node is linear and use.wanted]
            names, grid = [use.name for use in of_linear], grid_of(of_linear[0])
            integers, scales, _ = quantize_rows(_value(graph_module, node), grid, shares.get(names[0]))
            quantized = (integers, scales[:, 0].clone())
            with graph_module.graph.inserting_before(linear):
                weight = integer_weight(graph_module, names[0], quantized, grid)
                rounded = rounded_dynamically(graph_module.graph, linear.args[0], limits)
            linear.args = (rounded, weight, *linear.args[2:])
            for name in names:
                done.setdefault(name, []).append((linear, quantized))
    return done


def _value_dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 2


def _make_weight_only(graph_module: fx.GraphModule, uses: Uses, grid_of: GridOf, shares: Mapping[str, Tensor]) -> Done:
    done: Done = {}
    for node, found in uses.items():
        chosen = [use for use in found if use.wanted]
        if not chosen:
            continue
        weight: Tensor = _value(graph_module, node)
        groups, grid = chosen[0].transposed_groups, grid_of(chosen[0])
        rows = weight_rows(weight, groups)
        integers, scales, zero_points = quantize_rows(rows, grid, shares.get(chosen[0].name))
        stored = store(integers, grid)
        points = None if grid.symmetric else zero_points
        with graph_module.graph.inserting_before(node):
            made = dequantized(graph_module, chosen[0].name, (stored, scales, points), weight.shape, groups, grid)
        for use in chosen:
            use.node.replace_input_with(node, made)
        rows = dequantize_rows(stored, scales, points, integers.shape[1], grid)
        for name in dict.fromkeys(use.name for use in chosen):
            done.setdefault(name, []).append((made, weight_of_rows(rows, weight.shape, groups)))
    return done


def _after(row: LayerCoverage, network: nn.Module, used: set[str], done: Done, recipe: Recipe) -> LayerCoverage:
    """The coverage row of a layer after conversion."""
    if not row.quantized:
        return row
    names = [f"{row.name}.{name}" if row.name else name for name in weights_of(network.get_submodule(row.name))]
    if any(name not in used for name in names):
        return LayerCoverage(row.name, row.kind, False, "not used by forward")
    if any(name not in done for name in names):
        reason = (
            f"backend {recipe.backend!r} has no dynamic kernel for {row.kind} in an exported graph: mode='eager' and "
            "mode='fx' have"
        )
        return LayerCoverage(row.name, row.kind, False, reason)
    return row


@torch.no_grad()
def _check(
    decomposed: fx.GraphModule,
    tensors: list[Tensor],
    done: Done,
    coverage: list[LayerCoverage],
    target: Backend,
    names: Names,
) -> list[LayerCheck]:
    """Compare linear layers with the same rounding in float64, and other weights with their dequantized integers."""
    recorder = Recorder(decomposed, decomposed.graph)
    recorder.run(*tensors)
    checks = []
    for name, rows in done.items():
        # The weight of attention's output projection belongs to attention.
        layer = max((row.name for row in coverage if name.startswith(f"{row.name}.")), key=len, default="")
        for original, wanted in rows:
            node = next(node for node in decomposed.graph.nodes if node.name == original.name)
            got = recorder.values[node.name]
            reference = _linear_in_float64(node, recorder, wanted, target) if isinstance(wanted, tuple) else wanted
            checks.append(LayerCheck(layer, str(node.target), sqnr_of(reference, got)))
    raise_if_faulty(checks, target, names, EXACT)
    return checks


def _check_whole(
    decomposed: fx.GraphModule,
    tensors: list[Tensor],
    done: Done,
    spec: CallSpec,
    actual: Any,
    checking: tuple[Backend, list[LayerCheck], Names],
) -> WholeCheck | None:
    """Compare the whole network with a run whose integer layers compute in float64."""
    target, checks, names = checking
    wanted = {original.name: value for rows in done.values() for original, value in rows}

    def exact(disturb: Callable[[Any], Any] = lambda value: value) -> Any:
        runner = _Exact(decomposed, wanted, target, disturb)
        return spec.unflatten(runner.run(*(disturb(tensor.clone()) for tensor in tensors)))

    whole = check_whole(exact(), actual, (exact,))
    if whole is not None and not is_right(whole):
        suspects = sorted(checks, key=lambda check: check.sqnr_db)[:1]
        raise_if_wrong(whole, [check.name for check in suspects], checks, names, EXACT)
    return whole


class _Exact(Recorder):
    """Runs a graph with its integer layers in float64."""

    def __init__(
        self, module: fx.GraphModule, wanted: dict[str, Any], target: Backend, disturb: Callable[[Any], Any]
    ) -> None:
        super().__init__(module, module.graph)
        self.wanted, self.target, self.disturb = wanted, target, disturb

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.wanted:
            return value
        exact = self.wanted[n.name]
        if isinstance(exact, tuple):
            exact = _linear_in_float64(n, self, exact, self.target, self.disturb)
        self.values[n.name] = exact = exact.to(value)
        return exact


def _linear_in_float64(
    node: fx.Node,
    recorder: Recorder,
    quantized: tuple[Tensor, Tensor],
    target: Backend,
    disturb: Callable[[Any], Any] = lambda value: value,
) -> Tensor:
    rounded: Any = node.args[0]
    x = disturb(recorder.values[rounded.args[0].args[0].name])
    low, high = target.activation_limits
    scale, zero_point = (
        part.double() for part in ops.choose_qparams.tensor(x, low, high, EPS, target.activation_dtype)
    )
    integers = (torch.round(x.double() / scale) + zero_point).clamp(low, high)
    bias: Any = node.args[2] if len(node.args) > 2 else None
    weight = quantized[0].double() * quantized[1].double()[:, None]
    bias = None if bias is None else recorder.values[bias.name].double()
    return F.linear((integers - zero_point) * scale, weight, bias)


def _notes(recipe: Recipe) -> list[str]:
    if recipe.backend == "xnnpack":
        return [
            "backend='xnnpack': on this machine the int8 network runs as a decomposed graph, and not at the speed of "
            "the phone's kernels."
        ]
    if recipe.kind == "weight_only":
        return ["Compiled code holds the weights as float: the file is smaller, and the speed is that of float."]
    return []
