"""Tracing a network into a graph that trains and evaluates as the network does, or refusing with the line at fault."""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torchao
import typing_extensions
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.errors import TraceError
from qat_lightning.flows.base import Example, fake_quantizers
from qat_lightning.flows.checkpointing import loses_checkpoints
from qat_lightning.flows.eager_chains import run_apart
from qat_lightning.flows.structured_tracer import StructuredTracer
from qat_lightning.recomputation import Checkpointed, no_checkpoints
from qat_lightning.relu_rounding import writes_in_place
from qat_lightning.structures import same

_DROPOUTS: dict[Callable[..., Any], type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}

WHAT_TO_DO = (
    "What to do: give module='<a submodule that can be>' to quantize a part, or use mode='eager', which needs no "
    "graph, or mode='auto', which takes the best mode that works."
)


def line_at_fault(error: BaseException) -> str:
    """The innermost line of the user's code in an error's traceback, as ``file:line in function: code``."""
    frames = traceback.extract_tb(error.__traceback__)
    roots = (
        str(torch.__path__[0]),
        str(torchao.__path__[0]),
        *(str(module.__file__) for module in (inspect, contextlib, typing_extensions)),
    )
    own = __file__.rsplit("/", 2)[0]
    users = [f for f in frames if not f.filename.startswith((*roots, own, "<"))]
    if not users:
        return ""
    frame = users[-1]
    code = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {code}"


def check_names(network: nn.Module, mode: str) -> None:
    """Refuse children whose names a graph module needs for itself.

    Raises:
        TraceError: There is one; the message says which.
    """
    reserved = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | {"meta"}
    for name in (*network._modules, *network._parameters, *network._buffers):
        if name in reserved:
            raise TraceError(
                f"{type(network).__name__}.{name} has a name that torch.fx keeps for itself "
                f"({', '.join(sorted(name for name in reserved if not name.startswith('_')))}), so that mode={mode!r} "
                "cannot hold it. What to do: rename it, or use mode='eager' or mode='auto'."
            )


def trace(network: nn.Module, example: Example, leaves: list[str]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Trace ``network`` as FX does, in training mode.

    Args:
        network: The float network.
        example: One call; parameters of ``forward`` that it does not give are fixed to their defaults.
        leaves: Names of submodules to call as they are instead of looking inside.

    Returns:
        The graph module, whose layers are the network's own, and the scope of each node as upstream's prepare wants it.

    Raises:
        TraceError: It cannot be traced, or its evaluation takes another way through the code than its training.
    """
    check_names(network, "fx")
    training = _trace_once(network, example, leaves, train=True)
    evaluation = _trace_once(network, example, leaves, train=False)
    _refuse_other_way_in_eval(network, training[0], evaluation[0])
    graph_module, scopes = training
    _read_own_training_flag(graph_module, scopes)
    _one_module_a_call(graph_module)
    _give_all_arguments(graph_module.graph)
    _read_what_was_written(graph_module)
    graph_module.recompile()
    return graph_module, scopes


def trace_evaluation(network: nn.Module, example: Example, leaves: list[str]) -> fx.GraphModule:
    """Trace the way that ``network`` takes in evaluation, whatever it does in training; see `trace`.

    Raises:
        TraceError: It cannot be traced.
    """
    check_names(network, "fx")
    return _trace_once(network, example, leaves, train=False)[0]


def outer_parts(network: nn.Module, selected: dict[str, bool]) -> list[str]:
    """Submodules that stay float as a whole are called as they are: what is inside need not be traceable.

    Args:
        network: The float network.
        selected: For each name of a module whether it is to be quantized.
    """
    return [
        name
        for name, module in network.named_modules()
        if name
        and not any(selected[inner] for inner in selected if inner == name or inner.startswith(name + "."))
        and any(True for _ in module.children())
    ]


def leave_inside_float(graph_module: fx.GraphModule, selected: dict[str, bool]) -> None:
    """Deselect the layers inside of what a graph calls as a whole, such as `nn.TransformerEncoderLayer`.

    Args:
        graph_module: A traced network.
        selected: For each name of a module whether it is to be quantized; changed.
    """
    whole = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    for name in selected:
        if name.startswith(whole):
            selected[name] = False


def take_out_constants(graph: fx.Graph) -> Callable[[fx.Graph], None]:
    """Put None in the place of what a graph returns as it is, such as a number, which upstream's prepare refuses.

    Returns:
        What puts the constants back, into the graph that was made of this one.
    """
    output = graph.output_node()
    returned = output.args[0]
    output.args = (_only_nodes(returned),)

    def put_back(prepared: fx.Graph) -> None:
        made = prepared.output_node()
        made.args = (_with_constants(returned, made.args[0]),)

    return put_back


def _only_nodes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_only_nodes(part) for part in value])
    if isinstance(value, dict):
        return {key: _only_nodes(part) for key, part in value.items()}
    return value if isinstance(value, fx.Node) else None


def _with_constants(constants: Any, made: Any) -> Any:
    if isinstance(constants, (list, tuple)):
        return type(constants)(_with_constants(one, other) for one, other in zip(constants, made, strict=True))
    if isinstance(constants, dict):
        return {key: _with_constants(one, made[key]) for key, one in constants.items()}
    return made if isinstance(constants, fx.Node) else constants


@torch.no_grad()
def refuse_other_results(prepared: nn.Module, network: nn.Module, example: Example, reason: str) -> None:
    """Compare a prepared network, without rounding and in evaluation, with the float network that it was made of.

    Args:
        prepared: The network with fake-quant.
        network: The float network.
        example: One call.
        reason: What to say if they differ.

    Raises:
        TraceError: They differ.
    """
    ours, theirs = copy.deepcopy(prepared), copy.deepcopy(network)
    for _, fq in fake_quantizers(ours):
        fq.enable_fake_quant(False)
    wanted, got = (run_apart(module, copy.deepcopy(example)) for module in (theirs, ours))
    if not same(wanted, got, _close):
        raise TraceError(f"{reason} {WHAT_TO_DO}")


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=1e-3, atol=1e-4 * float(one.double().abs().max() + 1), equal_nan=True
    )


def _trace_once(
    network: nn.Module, example: Example, leaves: list[str], *, train: bool
) -> tuple[fx.GraphModule, dict[str, Any]]:
    tracer = StructuredTracer(leaves, [])
    with _in_mode(network, train), no_checkpoints() if train else contextlib.nullcontext():
        try:
            graph = tracer.trace(network, concrete_args=_defaults_not_given(network, example))
        except Checkpointed as error:
            raise loses_checkpoints(network, "fx", line_at_fault(error)) from None
        except Exception as error:
            where = line_at_fault(error)
            raise TraceError(
                f"mode='fx' cannot trace {type(network).__name__}"
                + (f" at {where}" if where else "")
                + f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). {WHAT_TO_DO}"
            ) from error
    graph_module = fx.GraphModule(network, graph)
    _drop_defaults(graph_module)
    return graph_module, tracer.node_name_to_scope


@contextmanager
def _in_mode(network: nn.Module, train: bool) -> Iterator[None]:
    before = {module: module.training for module in network.modules()}
    network.train(train)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _defaults_not_given(network: nn.Module, example: Example) -> dict[str, Any]:
    parameters = list(inspect.signature(network.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = {p.name for p in positional[: len(example.args)]} | set(example.kwargs)
    return {
        p.name: p.default
        for p in parameters
        if p.name not in given
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        # Others, such as a tuple of sizes, are traced as they come.
        and (p.default is None or isinstance(p.default, (bool, int, float, str)))
    }


def _drop_defaults(graph_module: fx.GraphModule) -> None:
    """Remove the checks that tracing adds for a fixed parameter; `GraphNetwork` keeps the parameter out altogether."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert and "specialized" in str(node.args[-1]):
            compared = node.args[0]
            graph_module.graph.erase_node(node)
            if isinstance(compared, fx.Node) and not compared.users:
                graph_module.graph.erase_node(compared)
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "_assert_is_none":
            graph_module.graph.erase_node(node)
    for node in list(graph_module.graph.nodes):
        if (
            node.op == "placeholder"
            and not node.users
            and ("_" in node.target)
            and node.target.rsplit("_", 1)[1] == "1"
        ):
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _refuse_other_way_in_eval(network: nn.Module, training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    ways = [[(node.op, str(node.target)) for node in gm.graph.nodes] for gm in (training, evaluation)]
    if ways[0] == ways[1]:
        return
    different = next(
        (
            node
            for node, other in zip(training.graph.nodes, ways[1], strict=False)
            if (node.op, str(node.target)) != other
        ),
        None,
    )
    part = f"; they part before {different.name!r}" if different else ""
    raise TraceError(
        f"mode='fx' keeps one way through {type(network).__name__}.forward, and it takes another way in training than "
        f"in evaluation (it looks at self.training{part}). {WHAT_TO_DO}"
    )


def _read_own_training_flag(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Turn ``F.dropout(x, training=self.training)``, whose flag tracing has fixed, into modules with a flag."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in _DROPOUTS:
            continue
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        if not bound.arguments["training"]:
            continue
        name = f"_functional_dropout_{count}"
        count += 1
        setattr(graph_module, name, _DROPOUTS[node.target](p=bound.arguments["p"]))
        with graph_module.graph.inserting_after(node):
            module_node = graph_module.graph.call_module(name, (bound.arguments["input"],))
        scopes[module_node.name] = scopes[node.name]
        node.replace_all_uses_with(module_node)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION_DEFAULTS = (None, None, None, 1, 0, 1, 1)


def _give_all_arguments(graph: fx.Graph) -> None:
    """Write functional convolutions with all their arguments in order, which upstream's lowering takes for granted."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.conv1d, F.conv2d, F.conv3d):
            given = dict(zip(_CONVOLUTION_ARGUMENTS, node.args, strict=False)) | node.kwargs
            defaults = zip(_CONVOLUTION_ARGUMENTS, _CONVOLUTION_DEFAULTS, strict=True)
            weight, bias, *rest = (given.get(name, default) for name, default in list(defaults)[1:])
            dims = 1 + [F.conv1d, F.conv2d, F.conv3d].index(node.target)
            each = [(value,) * dims if isinstance(value, int) else value for value in rest[:3]]
            node.args = (given["input"], weight, bias, *each, rest[3])
            node.kwargs = {}


def _read_what_was_written(graph_module: fx.GraphModule) -> None:
    """Let whoever reads a tensor after ``x.relu_()`` or the like read the result of that call.

    It is the same tensor. But what is put between a tensor and its readers, such as its rounding, stands where the
    tensor is made, and would not see what was written later.
    """
    order = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if writes_in_place(node, module) and node.args and isinstance(node.args[0], fx.Node):
            node.args[0].replace_all_uses_with(
                node,
                delete_user_cb=lambda user, node=node: order[user] > order[node],  # type: ignore[misc]
            )


_STATELESS = (nn.ReLU, nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)
"""Layers that may be called from several places as one: they have no range of their own."""


def _one_module_a_call(graph_module: fx.GraphModule) -> None:
    """Give each call of a shared layer a module of its own, with the same parameters.

    Every call has its own output range, and one may be followed by a BatchNorm to fold where another is not. Layers
    with buffers (BatchNorm) stay one, since a buffer that moves to another device would part.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(graph_module.get_submodule(str(node.target)), []).append(node)
    for module, nodes in calls.items():
        shareable = isinstance(module, _STATELESS) or any(True for _ in module.buffers())
        if shareable or any(True for _ in module.children()):
            continue
        for number, node in enumerate(nodes[1:], start=1):
            alias = module.__class__.__new__(module.__class__)
            alias.__dict__.update(module.__dict__)
            alias.__dict__["_parameters"] = module._parameters.copy()
            name = f"{node.target}_call_{number}"
            graph_module.add_submodule(name, alias)
            node.target = name
    graph_module.recompile()


def shared_batchnorms(graph_module: fx.GraphModule) -> list[nn.Module]:
    """The BatchNorms that are called from several places, and so cannot be folded into one layer."""
    calls: dict[nn.Module, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            calls[module] = calls.get(module, 0) + 1
    return [module for module, count in calls.items() if count > 1 and isinstance(module, _BatchNorm)]
