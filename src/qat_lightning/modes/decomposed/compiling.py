"""Compiling a decomposed graph to int8 kernels with AOTInductor, and verifying the result."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qat_lightning.checks import LayerCheck
from qat_lightning.graph.example import Example, part_that_runs
from qat_lightning.graph.scopes import scope_of
from qat_lightning.graph.signature import BATCH, CallSpec
from qat_lightning.modes.decomposed.compile_apart import can_compile_apart, compile_apart
from qat_lightning.modes.decomposed.ops import DEQUANTIZE, QUANTIZE, main_op
from qat_lightning.modes.decomposed.progress import said_while_it_lasts
from qat_lightning.modes.judging import is_faulty
from qat_lightning.modes.recording import RunsApart
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend

_ROWS_TO_COMPARE = 8

_FUSED_WITH_CONVOLUTIONS = (torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default, QUANTIZE[0])


def compile_library(decomposed: fx.GraphModule, spec: CallSpec, tensors: list[Tensor]) -> Library:
    """Compile with AOTInductor: one library for all batch sizes."""
    dynamic = tuple({0: torch.export.Dim.AUTO} if shape[:1] == (BATCH,) else None for shape in _shapes(spec))
    computed = fx.GraphModule(decomposed, copy.deepcopy(decomposed.graph))
    computed.graph.output_node().args = (
        tuple(value for value in computed.graph.output_node().args[0] if isinstance(value, fx.Node)),  # type: ignore[union-attr]
    )
    make = compile_apart if can_compile_apart(computed) else compile_package
    compiled = make(computed, tuple(_zeros(spec, tensors)), dynamic)
    return load_library(compiled, decomposed, spec, tensors)


@torch.no_grad()  # with gradients, Inductor keeps the graph for the backward pass, without any int8 kernel
def compile_package(graph_module: fx.GraphModule, examples: tuple[Tensor, ...], dynamic: tuple[Any, ...]) -> bytes:
    """Compile a graph of flat tensors to int8 kernels, as the bytes of an AOTInductor package.

    Args:
        graph_module: Quantize, dequantize and plain ops; modified.
        examples: Its inputs.
        dynamic: The dynamic shapes of each.
    """
    _register_int8_passes()
    _choose_grids_that_hold_zero(graph_module.graph)
    _make_linear_inputs_contiguous(graph_module.graph)
    _part_additions_from_activations(graph_module.graph)
    _widen_conv1d(graph_module)
    _pad_single_channels(graph_module)
    graph_module.recompile()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder:
        warnings.simplefilter("ignore")
        with said_while_it_lasts("AOTInductor compiles the int8 network for this CPU, once for every batch size"):
            program = torch.export.export(graph_module, examples, dynamic_shapes=dynamic)
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, "int8.pt2")), inductor_configs={"freezing": True}
            )
        return Path(package).read_bytes()


def answer_process() -> None:
    """Compile the input file of `compile_apart`, named first, and write the file named second."""
    asked, answer = map(Path, sys.argv[1:])
    portable, examples, dynamic, threads = pickle.loads(asked.read_bytes())
    torch.set_num_threads(threads)  # the compiler hard-codes the number of threads
    answer.write_bytes(compile_package(portable.module, examples, dynamic))


def _register_int8_passes() -> None:
    """Register the passes that turn dequantize, op, quantize into oneDNN's int8 ops."""
    from qat_lightning.modes import _torchao  # noqa: F401, I001 - before anything else imports torchao
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401


def as_compiled(tensor: Tensor) -> Tensor:
    """An input as compiled code reads it, which checks neither memory format nor dtype; bf16 training passes bf16."""
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def load_library(package: bytes, decomposed: fx.GraphModule, spec: CallSpec, tensors: list[Tensor]) -> Library:
    """Load a package, compiled here or in another process on this machine, from a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder:
        path = Path(folder, "int8.pt2")
        path.write_bytes(package)
        # Same as `torch._inductor.aoti_load_package`, without importing the compiler.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    outputs = list(decomposed.graph.output_node().args[0])  # type: ignore[arg-type]
    is_tensor = [isinstance(value, Tensor) for value in decomposed(*_zeros(spec, tensors))]
    return Library(package, loader.boxed_run, outputs, is_tensor)


def _shapes(spec: CallSpec) -> list[Any]:
    return [given.shape for given in spec.inputs if given.shape is not None]


def _zeros(spec: CallSpec, tensors: list[Tensor]) -> list[Tensor]:
    # As captured, rather than as called now: a batch size of 1 would become a constant.
    return [
        tensor.new_zeros([spec.batch if size == BATCH else size for size in shape])
        for tensor, shape in zip(tensors, _shapes(spec), strict=True)
    ]


def _choose_grids_that_hold_zero(graph: fx.Graph) -> None:
    """Write out how a dynamic layer chooses its grid, as the op does: the range is widened to hold 0.

    Inductor's implementation of the op does not widen it, and would clamp the values of a tensor of one sign.
    """
    aten = torch.ops.aten
    call = graph.call_function
    for chosen in graph.find_nodes(op="call_function", target=torch.ops.quantized_decomposed.choose_qparams.tensor):
        source, quant_min, quant_max, eps, _ = chosen.args
        with graph.inserting_before(chosen):
            low = call(aten.clamp.default, (call(aten.amin.default, (source,)), None, 0.0))
            high = call(aten.clamp.default, (call(aten.amax.default, (source,)), 0.0))
            steps = call(aten.div.Tensor, (call(aten.sub.Tensor, (high, low)), float(quant_max - quant_min)))
            scale = call(aten.clamp.default, (steps, eps))
            lowest = call(aten.round.default, (call(aten.div.Tensor, (low, scale)),))
            zero_point = call(aten.clamp.default, (call(aten.rsub.Scalar, (lowest, quant_min)), quant_min, quant_max))
            made = (
                call(aten.to.dtype, (scale, torch.float64)),
                call(aten.to.dtype, (zero_point, torch.int64)),
            )
        for part in list(chosen.users):
            part.replace_all_uses_with(made[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(chosen)


def _make_linear_inputs_contiguous(graph: fx.Graph) -> None:
    """Make inputs of linear layers contiguous: oneDNN's patterns miss transposed ones if the batch size is dynamic."""
    for linear in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        quantize = linear.args[0].args[0] if linear.args[0].args else None
        if isinstance(quantize, fx.Node) and quantize.args and isinstance(quantize.args[0], fx.Node):
            with graph.inserting_before(quantize):
                contiguous = graph.call_function(torch.ops.aten.contiguous.default, (quantize.args[0],))
            quantize.update_arg(0, contiguous)


def _part_additions_from_activations(graph: fx.Graph) -> None:
    """Work around torchao's fusion of a linear layer with an activation whose output is then added to a tensor.

    It fuses the activation into the layer, and then does not expect one when it fuses the addition. Rewritten as a
    subtraction of the negative, with the same result, the addition stays outside.
    """
    aten = torch.ops.aten
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        activated = [arg for arg in add.args if isinstance(arg, fx.Node) and _is_quantized_linear(arg.args[:1])]
        if not activated or add.kwargs or not all(isinstance(arg, fx.Node) for arg in add.args):
            continue
        with graph.inserting_before(add):
            negative = graph.call_function(aten.neg.default, (add.args[1],))
        add.target, add.args = aten.sub.Tensor, (add.args[0], negative)


def _is_quantized_linear(nodes: Any) -> bool:
    linear = nodes[0] if nodes else None
    if not isinstance(linear, fx.Node) or linear.target is not torch.ops.aten.linear.default:
        return False
    rounded: Any = linear.args[0]
    return rounded.target in (DEQUANTIZE[0], torch.ops.quantized_decomposed.dequantize_per_tensor.tensor)


def _widen_conv1d(graph_module: fx.GraphModule) -> None:
    """Turn 1-d convolutions into 2-d convolutions on images one row high.

    Once the weights are packed, Inductor assumes a kernel length of 1, and so expects a longer output of a padded
    convolution than the kernel returns. The extra dimension is removed after the ops that are fused with the
    convolution.
    """
    aten = torch.ops.aten
    graph = graph_module.graph
    for conv in graph.find_nodes(op="call_function", target=aten.conv1d.default):
        activation, weight = conv.args[:2]
        if activation.target is not DEQUANTIZE[0] or weight.target not in DEQUANTIZE or weight.args[0].op != "get_attr":
            continue
        name = f"{weight.args[0].target}_of_one_row".replace(".", "_")
        if not hasattr(graph_module, name):
            graph_module.register_buffer(name, _attribute(graph_module, weight.args[0]).unsqueeze(2))
        given: list[Any] = list(conv.args[2:])
        bias, stride, padding, dilation, groups = given + [None, [1], [0], [1], 1][len(given) :]
        with graph.inserting_before(conv):
            row = graph.call_function(aten.unsqueeze.default, (activation.args[0], 2))
            inputs = graph.call_function(activation.target, (row, *activation.args[1:]), activation.kwargs)
            weights = graph.call_function(weight.target, (graph.get_attr(name), *weight.args[1:]), weight.kwargs)
        conv.target = aten.conv2d.default
        conv.args = (inputs, weights, bias, [1, *stride], [0, *padding], [1, *dilation], groups)
        last = conv
        while len(last.users) == 1 and next(iter(last.users)).target in _FUSED_WITH_CONVOLUTIONS:
            last = next(iter(last.users))
        with graph.inserting_after(last):
            sequence = graph.call_function(aten.squeeze.dim, (last, 2))
        last.replace_all_uses_with(sequence, delete_user_cb=lambda user, kept=sequence: user is not kept)


def _pad_single_channels(graph_module: fx.GraphModule) -> None:
    """Pad images of one channel, and the weights, with a second channel of zeros.

    With dynamic batch size, Inductor assumes that the output of a convolution has the memory format of its input. With
    one channel the format is ambiguous; the kernel returns channels last, and the following ops would read wrong
    values.
    """
    graph = graph_module.graph
    conv2d = torch.ops.aten.conv2d.default
    for conv in graph.find_nodes(op="call_function", target=conv2d):
        activation, weight = conv.args[:2]
        if activation.target is not DEQUANTIZE[0] or weight.target not in DEQUANTIZE or weight.args[0].op != "get_attr":
            continue
        integers = _attribute(graph_module, weight.args[0])
        if integers.shape[1] != 1 or (conv.args[6] if len(conv.args) > 6 else 1) != 1:
            continue
        name = f"{weight.args[0].target}_of_two_channels".replace(".", "_")
        graph_module.register_buffer(name, F.pad(integers, (0, 0, 0, 0, 0, 1)))
        with graph.inserting_before(conv):
            wider = graph.call_function(
                torch.ops.aten.constant_pad_nd.default, (activation.args[0], [0, 0, 0, 0, 0, 1], activation.args[2])
            )
            inputs = graph.call_function(activation.target, (wider, *activation.args[1:]), activation.kwargs)
            weights = graph.call_function(weight.target, (graph.get_attr(name), *weight.args[1:]), weight.kwargs)
        conv.args = (inputs, weights, *conv.args[2:])


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    holder, _, leaf = str(node.target).rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(holder), leaf)
    return value


class Library:
    """A compiled library with the outputs of the graph: sizes as numbers, and constants.

    Args:
        package: The compiled package, to load in other processes.
        runner: The loaded package; takes a list of inputs, which it empties.
        outputs: Outputs of the graph: nodes and constants.
        is_tensor: Which of them are tensors.
    """

    def __init__(self, package: bytes, runner: Callable[..., Any], outputs: list[Any], is_tensor: list[bool]) -> None:
        self.package = package
        self.runner = runner
        self.constants = [None if isinstance(value, fx.Node) else value for value in outputs]
        self.is_computed = [isinstance(value, fx.Node) for value in outputs]
        self.is_tensor = is_tensor

    def __call__(self, *tensors: Tensor) -> list[Any]:
        """Run it; returns a flat list, as the graph does."""
        rest = iter(self.runner(list(tensors)))
        outputs = []
        for constant, is_computed, is_tensor in zip(self.constants, self.is_computed, self.is_tensor, strict=True):
            value = next(rest) if is_computed else constant
            if isinstance(value, Tensor) and not is_tensor:
                value = value.item()
            outputs.append(value)
        return outputs


def difference(
    decomposed: fx.GraphModule, compiled: Callable[..., Any], spec: CallSpec, tensors: list[Tensor], target: Backend
) -> str:
    """Describe how the compiled network differs from the decomposed graph on real inputs; empty if it does not.

    A deep network amplifies a difference in the last bit of a float to steps of its int8 layers, so a correct library
    can be far from the decomposed graph. If the outputs do not settle it, the graph is compiled a second time, with
    every quantized tensor as an output, and each layer is compared on the compiled network's own inputs to it.
    """
    batched = [given.shape[:1] == (BATCH,) for given in spec.inputs if given.shape is not None]
    rows = tuple(_several_rows(t) if b else t for t, b in zip(tensors, batched, strict=True))
    few = list(part_that_runs(decomposed, Example(rows), Example(tuple(tensors))).args)
    pairs = zip(decomposed(*few), compiled(*few), strict=True)
    outputs = [(one, other) for one, other in pairs if isinstance(one, Tensor) and one.is_floating_point()]
    if all(sqnr_db(one, other) >= target.tolerance_db for one, other in outputs):
        return ""
    faulty = [check for check in check_kernels(decomposed, spec, few) if is_faulty(check, target)]
    if not faulty:
        return ""
    worst = min(faulty, key=lambda check: check.sqnr_db)
    steps = "" if math.isnan(worst.max_steps) else f", up to {worst.max_steps:.0f} steps apart"
    return (
        f"the compiled layer {worst.name!r} ({worst.op}) is at {worst.sqnr_db:.1f} dB of SQNR from it on the same "
        f"inputs{steps}"
    )


def _several_rows(tensor: Tensor) -> Tensor:
    """A tensor with enough rows to tell an error from chance; if there are fewer, they are repeated with shifts."""
    rows = [tensor.roll(shift, -1) if shift else tensor for shift in range(_ROWS_TO_COMPARE)]
    return torch.cat(rows)[:_ROWS_TO_COMPARE].contiguous()


def check_kernels(decomposed: fx.GraphModule, spec: CallSpec, tensors: list[Tensor]) -> list[LayerCheck]:
    """Compile, and compare each layer with the decomposed graph on the outputs of the compiled layers before it."""
    graph = copy.deepcopy(decomposed.graph)
    quantized = [node for node in graph.nodes if node.target is QUANTIZE[0]]
    output = graph.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    output.args = ((*returned, *quantized),)
    results = compile_library(fx.GraphModule(decomposed, graph), spec, tensors)(*tensors)
    integers = dict(zip((node.name for node in quantized), results[len(returned) :], strict=True))
    comparison = _Kernels(decomposed, integers)
    for node, wanted, got in zip(returned, comparison.run(*tensors), results, strict=False):
        if isinstance(wanted, Tensor) and wanted.is_floating_point():
            layer = main_op(node)
            comparison.checks.append(LayerCheck(scope_of(layer) or layer.name, str(layer.target), sqnr_db(wanted, got)))
    return comparison.checks


class _Kernels(RunsApart):
    """Runs a decomposed graph with the integers of the compiled one wherever a tensor is quantized."""

    def __init__(self, graph_module: fx.GraphModule, integers: dict[str, Tensor]) -> None:
        super().__init__(graph_module)
        self.integers = integers
        self.checks: list[LayerCheck] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.integers:
            return value
        source: Any = n.args[0]
        zero_point: Any = n.args[2]
        actual = self.integers[n.name]
        steps = float((actual.int() - value.int()).abs().max()) if value.numel() else 0.0
        layer = main_op(source)
        ratio = sqnr_db(value.float() - zero_point, actual.float() - zero_point)
        self.checks.append(LayerCheck(scope_of(layer) or layer.name, str(layer.target), ratio, steps))
        return actual
