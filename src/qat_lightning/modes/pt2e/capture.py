"""Capturing a network with PT2 export, as one graph for all batch sizes."""

from __future__ import annotations

import inspect
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import CodeGen

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example, apart
from qat_lightning.graph.inference_call import InferenceCall, inference_call
from qat_lightning.graph.signature import (
    BATCH,
    CallSpec,
    batch_size,
    canonical,
    dynamic_shapes,
    inputs_of,
)
from qat_lightning.graph.structures import look_into
from qat_lightning.graph.training_flags import flags_kept
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.layers.operators import OPERATORS
from qat_lightning.layers.transformer import CONTAINERS, written_out
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.pt2e.padding import pad_by_numbers
from qat_lightning.modes.source_lines import reason_of
from qat_lightning.modes.tracing import WHAT_TO_DO, check_names

aten = torch.ops.aten

FUNCTIONAL: dict[Any, Any] = {in_place: row.overloads[0] for row in OPERATORS for in_place in row.in_place}
"""In-place ops and their functional counterparts."""

TRAINING_FLAG: dict[Any, tuple[int, Any]] = {
    overload: row.training_flag for row in OPERATORS if row.training_flag is not None for overload in row.overloads
}
"""Ops other than BatchNorm that differ in training: the argument that says so, and its value in evaluation."""

RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
"""Recurrent layers as one op, of which only the dropout between layers is random."""


def capture(
    network: nn.Module, example: Example, *, train: bool = True, by_numbers: bool = True
) -> tuple[fx.GraphModule, CallSpec]:
    """Export ``network`` in training mode, or in evaluation.

    Args:
        network: The float network; its flags are restored.
        example: One call, with a batch of 2 or more.
        train: Whether the graph is to be trained. A graph for evaluation may draw random numbers, as the network does.
        by_numbers: Whether convolutions padded by name are rewritten to a form that quantizers have rules for.

    Returns:
        A graph whose inputs are the tensors of a call and whose output is a flat tuple, and its signature.

    Raises:
        TraceError: It cannot be exported, or only for one batch size, or it behaves differently in evaluation.
    """
    look_into(example.args, example.kwargs)
    example = apart(example)
    size = batch_size(example)
    signature = inspect.signature(network.forward)
    args, kwargs = canonical(signature, example.args, example.kwargs)
    in_spec, inputs = inputs_of(network, example, size)
    check_names(network, "pt2e")
    run_apart(network, example)  # registers the types that it returns with pytree
    if train:
        _refuse_plain_averages(network)
    with flags_kept(network), warnings.catch_warnings():
        network.train(train)
        warnings.filterwarnings("ignore", module=r"torch\..*")
        program = _export(network, args, kwargs, dynamic_shapes(signature, args, kwargs, size))
        graph_module: fx.GraphModule = program.module()
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    spec = CallSpec(type(network).__name__, signature, in_spec, inputs, out_spec, size or 1)
    _refuse_fixed_batch(graph_module.graph, spec)
    _inline_no_grad(graph_module)
    for inner in _graphs(graph_module):
        _drop_checks(inner)
    _pass_over_equal_broadcasts(graph_module.graph)
    _clean(graph_module.graph, spec)
    _refuse_without_values(graph_module, spec.name)
    _ask_first_input(graph_module.graph)
    if train:
        for inner in _graphs(graph_module):
            _refuse_randomness(inner, spec.name)
    _make_functional(graph_module.graph)
    if by_numbers:
        pad_by_numbers(graph_module.graph)
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
            module.recompile()
    return graph_module, spec


def captured_inference(
    graph: fx.Graph,
    network: nn.Module,
    example: Example,
    capture_again: Callable[[Example], tuple[fx.GraphModule, CallSpec]],
) -> InferenceCall | None:
    """The call of a captured network without the inputs of its loss.

    Args:
        graph: The graph that was captured with ``example``.
        network: The float network.
        example: One call.
        capture_again: Captures the network with another call.

    Returns:
        None if there is no such call.
    """

    def again(lean: Example) -> tuple[fx.Graph, CallSpec]:
        graph_module, spec = capture_again(lean)
        return graph_module.graph, spec

    return inference_call(graph, network, example, again)


def _export(network: nn.Module, args: Any, kwargs: Any, shapes: Any) -> Any:
    """Export; prevents torch's transformer layers from reading the values of a mask to choose a kernel."""
    try:
        return torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=True)
    except Exception as error:
        if not any(type(module) in CONTAINERS for module in network.modules()):
            raise TraceError(_explain(network, error)) from error
    try:
        with written_out(network, lambda name: False):
            return torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=True)
    except Exception as error:
        raise TraceError(_explain(network, error)) from error


def _refuse_plain_averages(network: nn.Module) -> None:
    names = [
        repr(name)
        for name, module in network.named_modules()
        if is_batchnorm(module) and module.track_running_stats and module.momentum is None
    ]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise TraceError(
            "mode='pt2e' cannot export BatchNorm with momentum=None, which divides by the count of batches so far: "
            f"{', '.join(names[:5])}{more}. Give it a number, such as momentum=0.1, or use mode='fx' or mode='eager'."
        )


def _refuse_without_values(graph_module: fx.GraphModule, name: str) -> None:
    """Raise an error for constants that export made while it followed the network without values."""
    read = (
        operator.attrgetter(str(node.target))(graph_module) for node in graph_module.graph.find_nodes(op="get_attr")
    )
    if any(isinstance(value, FakeTensor) for value in read):
        raise TraceError(
            f"mode='pt2e' cannot export {name}: its forward uses the .data of a parameter, which is "
            f"not part of a graph. {WHAT_TO_DO}"
        )


def _explain(network: nn.Module, error: Exception) -> str:
    return f"mode='pt2e' cannot export {type(network).__name__} {reason_of(error)}. {WHAT_TO_DO}"


def _refuse_fixed_batch(graph: fx.Graph, spec: CallSpec) -> None:
    placeholders = graph.find_nodes(op="placeholder")
    for node, given in zip(placeholders, spec.inputs, strict=True):
        if given.shape is None or BATCH not in given.shape:
            continue
        size = node.meta["val"].shape[0]
        # Export turns AUTO into a symbol that is known to be constant.
        if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
            raise TraceError(
                f"mode='pt2e' can export {spec.name} only for the batch size {size} of the example, because its "
                f"forward uses the size of {given.path} as a constant (such as int(x.shape[0]), a reshape to a fixed "
                f"first dimension, or an assertion). {WHAT_TO_DO}"
            )


def _graphs(graph_module: fx.GraphModule) -> list[fx.Graph]:
    """The graph itself, and those of regions in it, such as one without autocast."""
    return [module.graph for module in graph_module.modules() if isinstance(module, fx.GraphModule)]


def _drop_checks(graph: fx.Graph) -> None:
    """Drop guards for the example's sizes and dtypes, which a network's file cannot store."""
    for node in reversed(list(graph.nodes)):
        is_guard = node.op == "call_module" and node.target == "_guards_fn"
        is_check = node.op == "call_function" and _name(node.target).startswith(
            ("aten._assert", "aten.sym_constrain", "_assert", "_check")
        )
        if (is_guard or is_check) and not node.users:
            graph.erase_node(node)


def _clean(graph: fx.Graph, spec: CallSpec) -> None:
    """Keep only nodes that compute: drop constant inputs, and nodes that only checks used."""
    graph.set_codegen(CodeGen())
    for node, given in zip(graph.find_nodes(op="placeholder"), spec.inputs, strict=True):
        if given.shape is None:
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        # Left over from checks: sizes, comparisons, and attributes that only they used.
        computes = node.op == "call_function" and not node.is_impure() and not _mutates(node)
        if (computes or node.op == "get_attr") and not node.users:
            graph.erase_node(node)
    output = graph.output_node()
    values, _ = pytree.tree_flatten(output.args[0], is_leaf=lambda value: isinstance(value, fx.Node))
    output.args = (tuple(values),)


def _pass_over_equal_broadcasts(graph: fx.Graph) -> None:
    """Read a tensor instead of its broadcast to the shape that it has, as losses make one of outputs and labels."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        together, place = node.args
        if together.target is not aten.broadcast_tensors.default:
            continue
        source = together.args[0][place]
        shapes = [[str(size) for size in each.meta["val"].shape] for each in (source, node)]
        if shapes[0] == shapes[1]:
            node.replace_all_uses_with(source)


def _ask_first_input(graph: fx.Graph) -> None:
    """Take each size from the first input that has it: export takes it from the last, which may be labels."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                first.setdefault(str(size.node.expr), (node, dim))
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = node.meta.get("val")
        if node.args[0].op == "placeholder" and isinstance(size, torch.SymInt) and str(size.node.expr) in first:
            node.args = first[str(size.node.expr)]


def _inline_no_grad(graph_module: fx.GraphModule) -> None:
    """Inline the body of ``with torch.no_grad()``, so that it can be quantized, with detached results and writes."""
    graph = graph_module.graph
    operator = torch.ops.higher_order.wrap_with_set_grad_enabled
    while regions := graph.find_nodes(op="call_function", target=operator):
        region = regions[0]
        enabled, body, *arguments = region.args
        inside: fx.GraphModule = getattr(graph_module, body.target)
        values: dict[fx.Node, Any] = dict(zip(inside.graph.find_nodes(op="placeholder"), arguments, strict=True))
        results: Any = ()
        with graph.inserting_before(region):
            for node in inside.graph.nodes:
                if node.op == "output":
                    results = [values[result] for result in node.args[0]]
                elif node.op != "placeholder":
                    written = node.args[:1] if _mutates(node) and not enabled else ()
                    given = {
                        source: _detached(graph, values[source])
                        if written and source not in written
                        else values[source]
                        for source in node.all_input_nodes
                    }
                    values[node] = graph.node_copy(node, given.__getitem__)
            if not enabled:
                results = [_detached(graph, result) for result in results]
        for user in list(region.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(region)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = {key: value for key, value in node.meta.items() if key not in ("source_fn_stack", "torch_fn")}
    return detached


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _refuse_randomness(graph: fx.Graph, name: str) -> None:
    """Raise an error for random ops other than dropout, which the graph would keep in evaluation."""
    for node in graph.nodes:
        target: Any = FUNCTIONAL.get(node.target, node.target)
        if not isinstance(target, torch._ops.OpOverload) or target in TRAINING_FLAG:
            continue
        if torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        if target.overloadpacket in RECURRENT:
            _refuse_dropout_inside(node, name)
            continue
        raise TraceError(
            f"mode='pt2e' keeps one graph for training and evaluation, and {name} draws random numbers "
            f"({target}){source_line(node)}, and would do so in evaluation too. Use nn.Dropout or F.dropout, or "
            f"mode='eager'. {WHAT_TO_DO}"
        )


def _refuse_dropout_inside(node: fx.Node, name: str) -> None:
    """Raise an error if a recurrent op has dropout between its layers: its training flag is a constant of the graph."""
    dropout = _argument(node, "dropout")
    if dropout == 0 or _argument(node, "num_layers") == 1:
        return
    raise TraceError(
        f"mode='pt2e' keeps one graph for training and evaluation, and {name} has {node.target} with "
        f"dropout={dropout} between its layers{source_line(node)}: its training flag is fixed in the graph, so it "
        "would drop values in evaluation too. Use mode='fx' or mode='eager', or dropout=0 and nn.Dropout between "
        "recurrent layers of one layer each."
    )


def _argument(node: fx.Node, name: str) -> Any:
    """The argument that an op's schema calls ``name``, passed by position or by name."""
    target: Any = node.target
    position = [argument.name for argument in target._schema.arguments].index(name)
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def source_line(node: fx.Node) -> str:
    """`` at file:line`` of the network's code that created this node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace", "")))
    root = str(torch.__path__[0])
    users = [frame for frame in frames if not frame[0].startswith(root)]
    return f" at {users[-1][0]}:{users[-1][1]}" if users else ""


def _make_functional(graph: fx.Graph) -> None:
    """Replace in-place activations and additions, so that an observed value does not change later.

    Only if nothing reads the old value under another name, such as a view, an input or a parameter.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in FUNCTIONAL:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or _aliases(source):
            continue
        if any(_aliases(user) and user.target not in FUNCTIONAL for user in source.users):
            continue
        # Readers of the old tensor after this op read the new value.
        source.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)  # type: ignore[misc]
        node.target = FUNCTIONAL[node.target]


def _aliases(node: fx.Node) -> bool:
    target: Callable[..., Any] | str = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)
