"""PT2 export mode: the network as one graph of aten ops, with integer weights in it, compiled by Inductor.

Dynamic linear layers have the ops that X86InductorQuantizer and XNNPACKQuantizer make of them
(https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html), which Inductor and ExecuTorch turn into int8 kernels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning.backends import Backend
from qat_lightning.errors import ConversionError
from qat_lightning.flows.base import Converted, Example, LayerCheck, LayerCoverage
from qat_lightning.flows.direct.checking import end_to_end, refuse_nothing, run, run_float, sqnr_of
from qat_lightning.flows.direct.eager import cover, float_copy
from qat_lightning.flows.eager_layers import without_fast_paths
from qat_lightning.flows.pt2e.capture import capture
from qat_lightning.flows.pt2e.convert import evaluate, tidy
from qat_lightning.flows.pt2e.int8 import Int8Network
from qat_lightning.flows.verify import Recorder, raise_if_faulty
from qat_lightning.integer_layers.weight_only import weights_of
from qat_lightning.integer_layers.weights import WeightGrid, dequantize_rows, quantize_rows, store
from qat_lightning.recipe import Recipe

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed

_EPS = float(torch.finfo(torch.float32).eps)


def quantize_pt2e(network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> Converted:
    """See `qat_lightning.flows.direct.quantize`."""
    original = float_copy(network)
    expected = run_float(original, example)
    without_fast_paths(original)
    coverage = cover(original, recipe, prefix)
    with _plain_attention():
        graph_module, spec = capture(original, example, train=False)
    evaluate(graph_module.graph)
    weights = _weights(original, graph_module, coverage)
    if recipe.kind == "dynamic":
        done = _make_dynamic(graph_module, weights, recipe)
    else:
        done = _make_weight_only(graph_module, weights, WeightGrid.of(recipe))
    coverage = [_after(row, original, weights, done, recipe) for row in coverage]
    refuse_nothing(original, coverage, recipe)
    graph_module.graph.eliminate_dead_code(lambda node: node.is_impure())
    graph_module.graph.lint()
    graph_module.recompile()
    decomposed = tidy(graph_module)
    integer = Int8Network(decomposed, spec, recipe.backend)
    tensors = spec.flatten(*_copies(example))
    try:
        checks = _check(decomposed, tensors, done, coverage, recipe.target)
        actual = spec.unflatten(decomposed(*tensors))
    except RuntimeError as error:
        raise ConversionError(
            f"{spec.name} does not run once its weights are integers: {error}. Use exclude= for the part at fault."
        ) from error
    return Converted(integer, coverage, checks, [*_notes(recipe), *end_to_end(expected, actual)])


def _copies(example: Example) -> tuple[Any, Any]:
    def keep(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    caught: tuple[Any, Any] = run(keep, example)  # type: ignore[arg-type]
    return caught


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as products of matrices and linear maps, and not as the one op that evaluation has for it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _weights(network: nn.Module, graph_module: fx.GraphModule, coverage: list[LayerCoverage]) -> dict[fx.Node, str]:
    """The nodes that read a weight of a layer to quantize, and the weight's full name."""
    names: dict[int, str] = {}
    for row in coverage:
        module = network.get_submodule(row.name)
        if row.quantized or "no dynamic kernel" in row.reason:
            for name in weights_of(module):
                names[module.get_parameter(name).data_ptr()] = f"{row.name}.{name}" if row.name else name
    found = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = _value(graph_module, node)
        if isinstance(value, Tensor) and value.data_ptr() in names:
            found[node] = names[value.data_ptr()]
    return found


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    holder, _, leaf = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(holder), leaf)


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    name = name.replace(".", "_")
    while hasattr(graph_module, name):
        name += "_"
    graph_module.register_buffer(name, value)
    return graph_module.graph.get_attr(name)


Done = dict[str, list[tuple[fx.Node, Any]]]
"""For each full name of a weight the nodes to check, and what their values are compared with."""


def _make_dynamic(graph_module: fx.GraphModule, weights: dict[fx.Node, str], recipe: Recipe) -> Done:
    grid = WeightGrid.of(recipe)
    low, high = recipe.target.activation_limits
    limits = (low, high, recipe.target.activation_dtype)
    done: Done = {}
    for node, name in weights.items():
        for linear in list(node.users):
            if linear.target is not aten.linear.default or linear.args[1] is not node or _value_dims(linear) == 1:
                continue
            integers, scales, _ = quantize_rows(_value(graph_module, node), grid)
            quantized = (integers, scales[:, 0].clone())
            with graph_module.graph.inserting_before(linear):
                weight = _integer_weight(graph_module, name, quantized, grid)
                rounded = _rounded(graph_module.graph, linear.args[0], limits)
            linear.args = (rounded, weight, *linear.args[2:])
            done.setdefault(name, []).append((linear, quantized))
    return done


def _value_dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 2


def _integer_weight(
    graph_module: fx.GraphModule, name: str, quantized: tuple[Tensor, Tensor], grid: WeightGrid
) -> fx.Node:
    integers, scales = quantized
    parts = [
        _constant(graph_module, f"{name}_integers", integers),
        _constant(graph_module, f"{name}_scales", scales),
        _constant(graph_module, f"{name}_zero_points", torch.zeros_like(scales, dtype=torch.int64)),
    ]
    return graph_module.graph.call_function(
        ops.dequantize_per_channel.default, (*parts, 0, grid.quant_min, grid.quant_max, torch.int8)
    )


def _rounded(graph: fx.Graph, source: Any, limits: tuple[int, int, torch.dtype]) -> fx.Node:
    low, high, dtype = limits
    qparams = graph.call_function(ops.choose_qparams.tensor, (source, low, high, _EPS, dtype))
    scale = graph.call_function(operator.getitem, (qparams, 0))
    zero_point = graph.call_function(operator.getitem, (qparams, 1))
    grid = (scale, zero_point, low, high, dtype)
    integers = graph.call_function(ops.quantize_per_tensor.tensor, (source, *grid))
    return graph.call_function(ops.dequantize_per_tensor.tensor, (integers, *grid))


def _make_weight_only(graph_module: fx.GraphModule, weights: dict[fx.Node, str], grid: WeightGrid) -> Done:
    done: Done = {}
    for node, name in weights.items():
        weight: Tensor = _value(graph_module, node)
        integers, scales, zero_points = quantize_rows(weight, grid)
        stored = store(integers, grid)
        points = None if grid.symmetric else zero_points
        with graph_module.graph.inserting_before(node):
            made = _dequantized(graph_module, name, (stored, scales, points), tuple(weight.shape), grid)
        node.replace_all_uses_with(made)
        values = weight[0].numel()
        done[name] = [(made, dequantize_rows(stored, scales, points, values, grid).reshape(weight.shape))]
    return done


def _dequantized(
    graph_module: fx.GraphModule, name: str, parts: tuple[Tensor, Tensor, Tensor | None], shape: Any, grid: WeightGrid
) -> fx.Node:
    """`dequantize_rows` as nodes."""
    stored, scales, points = parts
    graph, rows, values = graph_module.graph, stored.shape[0], math.prod(shape[1:])
    call = graph.call_function
    node = _constant(graph_module, f"{name}_integers", stored)
    if grid.packs:
        low = call(aten.bitwise_and.Scalar, (node, 15))
        high = call(aten.bitwise_right_shift.Tensor_Scalar, (node, 4))
        both = call(aten.stack.default, ([low, high], -1))
        node = call(aten.sub.Scalar, (_float(graph, both), 8.0))
    else:
        node = _float(graph, node)
    node = call(aten.reshape.default, (node, [rows, scales.shape[1], -1]))
    if points is not None:
        offset = _float(graph, _constant(graph_module, f"{name}_zero_points", points[..., None]))
        node = call(aten.sub.Tensor, (node, offset))
    node = call(aten.mul.Tensor, (node, _constant(graph_module, f"{name}_scales", scales[..., None])))
    node = call(aten.reshape.default, (node, [rows, -1]))
    node = call(aten.slice.Tensor, (node, 1, 0, values))
    return call(aten.reshape.default, (node, list(shape)))


def _float(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})


def _after(
    row: LayerCoverage, network: nn.Module, weights: dict[fx.Node, str], done: Done, recipe: Recipe
) -> LayerCoverage:
    """What became of a layer."""
    if not row.quantized:
        return row
    names = [f"{row.name}.{name}" if row.name else name for name in weights_of(network.get_submodule(row.name))]
    if any(name not in weights.values() for name in names):
        return LayerCoverage(row.name, row.kind, False, "not used by forward, or its weight is that of another layer")
    if any(name not in done for name in names):
        reason = (
            f"backend {recipe.backend!r} has no dynamic kernel for {row.kind} in an exported graph: mode='eager' and "
            "mode='fx' have"
        )
        return LayerCoverage(row.name, row.kind, False, reason)
    return row


@torch.no_grad()
def _check(
    decomposed: fx.GraphModule, tensors: list[Tensor], done: Done, coverage: list[LayerCoverage], target: Backend
) -> list[LayerCheck]:
    """Compare linear layers with the same rounding in float64, and other weights with what their integers stand for."""
    recorder = Recorder(decomposed, decomposed.graph)
    recorder.run(*tensors)
    checks = []
    for name, rows in done.items():
        # The weight of attention's last linear layer is one of attention's.
        layer = max((row.name for row in coverage if name.startswith(f"{row.name}.")), key=len, default="")
        for original, wanted in rows:
            node = next(node for node in decomposed.graph.nodes if node.name == original.name)
            got = recorder.values[node.name]
            reference = _linear_in_float64(node, recorder, wanted, target) if isinstance(wanted, tuple) else wanted
            checks.append(LayerCheck(layer, str(node.target), sqnr_of(reference, got)))
    raise_if_faulty(checks, target, "its integers give in float64")
    return checks


def _linear_in_float64(node: fx.Node, recorder: Recorder, quantized: tuple[Tensor, Tensor], target: Backend) -> Tensor:
    rounded: Any = node.args[0]
    x = recorder.values[rounded.args[0].args[0].name]
    low, high = target.activation_limits
    scale, zero_point = (
        part.double() for part in ops.choose_qparams.tensor(x, low, high, _EPS, target.activation_dtype)
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
