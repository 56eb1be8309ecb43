"""Tracing a network to a graph that behaves like it in training and evaluation, or raising an error with the line."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import TraceError, in_brief
from qat_lightning.graph.example import Example
from qat_lightning.graph.generators import generators_kept
from qat_lightning.graph.given_sizes import GivenSizes
from qat_lightning.graph.graph_inputs import drop_checks, fixed_parameters, give_parameters
from qat_lightning.graph.signature import one_sample
from qat_lightning.graph.structures import same
from qat_lightning.graph.training_flags import flags_kept
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.modes.checkpointing import loses_checkpoints
from qat_lightning.modes.eager.observation import run_apart
from qat_lightning.modes.fx.autocast import noting_autocast
from qat_lightning.modes.fx.batchnorm import name_batchnorms, plain_frozen
from qat_lightning.modes.fx.calls import (
    drop_unread,
    give_all_arguments,
    give_operands_by_position,
    one_module_a_call,
    read_what_was_written,
)
from qat_lightning.modes.fx.examples import ONE, Plan
from qat_lightning.modes.fx.layer_settings import LayerSettings
from qat_lightning.modes.fx.shapes import ShapesTracer
from qat_lightning.modes.fx.sizes import attempts, given_sizes
from qat_lightning.modes.fx.tracer import (
    CallAsWhole,
    DecidesByChance,
    NetworkTracer,
    Traced,
    batchnorms_take_anything,
    counting,
    holds_no_layer,
)
from qat_lightning.modes.fx.train_and_eval import (
    BY_MODE,
    flags_by_mode,
    mark_dropouts,
    owner_of_parting,
    parting,
    set_module,
)
from qat_lightning.modes.own_gradients import (
    OwnGradient,
    is_traced,
    loses_gradient,
    no_own_gradients,
    stop_gradients,
)
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.modes.source_lines import line_at_fault
from qat_lightning.numerics.recomputation import Checkpointed, no_checkpoints

WHAT_TO_DO = (
    "What to do: give module='<a submodule that can be traced>' to quantize a part, or use mode='eager', which needs "
    "no graph, or mode='auto', which chooses the best mode that works."
)


def check_names(network: nn.Module, mode: str) -> None:
    """Raise an error for children whose names a graph module uses itself.

    Raises:
        TraceError: There is such a child; the message names it.
    """
    reserved = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | {"meta"}
    for name in (*network._modules, *network._parameters, *network._buffers):
        if name in reserved:
            raise TraceError(
                f"{type(network).__name__}.{name} has a name that torch.fx keeps for itself "
                f"({', '.join(sorted(name for name in reserved if not name.startswith('_')))}), so that mode={mode!r} "
                "cannot hold it. What to do: rename it, or use mode='eager' or mode='auto'."
            )


MIXED = "regions of mixed precision"
"""Key in the ``meta`` of a trace: the mixed-precision regions that the forward entered."""

EVALUATED = "evaluated"
"""Key in the ``meta`` of a trace: the layers that the forward itself puts in evaluation while the network trains."""

TWO_AND_MORE = "two samples and more"
"""Key in the ``meta`` of a trace: whether a single sample could not be followed, and has to be tried."""


def trace(
    network: nn.Module, example: Example, leaves: list[str], *, learns: bool = True, by_example: bool = False
) -> tuple[fx.GraphModule, dict[str, Any], GivenSizes | None]:
    """Trace ``network`` as FX does, in training mode.

    If that needs shapes, it is traced along with the example.

    Args:
        network: The float network.
        example: One call; parameters of ``forward`` that it omits are fixed to their defaults, and those that it gives
            as None to None.
        leaves: Names of submodules to call as a whole instead of tracing through them.
        learns: Whether the graph is to be trained, and so needs the gradients of the network.
        by_example: Treat ops that leave the example unchanged as dropout, as earlier releases did.

    Returns:
        The graph module, with the network's own layers except for modules that act as a BatchNorm; the scope of each
        node, as upstream's prepare needs it; and the sizes that it is valid for, None for any.

    Raises:
        TraceError: It cannot be traced, or takes different paths in training and in evaluation.
    """
    check_names(network, "fx")
    frozen = plain_frozen(network)
    with noting_autocast() as mixed:
        (traced, evaluation, whole), plan = attempts(
            network, lambda plan: _both_ways(network, example, [*leaves, *frozen], plan, learns=learns), example
        )
    graph_module, scopes = traced.graph_module, traced.scopes
    name_batchnorms(traced, evaluation, network, example)
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    for path in called & set(frozen):
        set_module(graph_module, path, frozen[path])
    paths = [path for path in called if path in whole or path.rpartition(".")[2].startswith(BY_MODE)]
    mark_dropouts(traced, network, example, paths, by_example=by_example)
    one_module_a_call(graph_module)
    give_all_arguments(graph_module.graph)
    if learns:
        stop_gradients(graph_module, scopes, network, example)
    read_what_was_written(graph_module)
    graph_module.recompile()
    graph_module.meta[MIXED] = sorted(mixed)
    graph_module.meta[EVALUATED] = sorted(traced.evaluated)
    graph_module.meta[TWO_AND_MORE] = plan is not None and ONE not in plan.samples
    sizes = given_sizes(graph_module.graph, network, example, plan, fixed=traced.fixed or evaluation.fixed)
    return graph_module, scopes, sizes


def _both_ways(
    network: nn.Module, example: Example, leaves: list[str], plan: Plan | None, *, learns: bool
) -> tuple[Traced, Traced, list[str]]:
    """Trace the paths of a network in training and in evaluation, with corresponding nodes.

    Returns:
        Both traces, the first with flags in place of constants of training, and the paths of the modules without layers
        that are called as a whole.
    """
    whole: list[str] = []
    while True:
        try:
            training = _trace_once(network, example, [*leaves, *whole], plan, train=True, learns=learns)
            evaluation = _trace_once(network, example, [*leaves, *whole], plan, train=False)
        except CallAsWhole as found:
            whole += _alike(network, found.path)
            continue
        parts = parting(training, evaluation)
        if parts is None:
            flags_by_mode(training, evaluation)
            return training, evaluation, whole
        path = owner_of_parting(network, parts, training, evaluation)
        if path is None or path in whole:
            raise _other_way(network, parts)
        whole += _alike(network, path)


def _alike(network: nn.Module, path: str) -> list[str]:
    """A module, and all others of its class without layers: what is found for one holds for all."""
    cls = type(network.get_submodule(path))
    return [name for name, module in network.named_modules() if type(module) is cls and holds_no_layer(module)]


def trace_evaluation(
    network: nn.Module, example: Example, leaves: list[str]
) -> tuple[fx.GraphModule, GivenSizes | None]:
    """Trace the path that ``network`` takes in evaluation, whatever it does in training; see `trace`.

    Raises:
        TraceError: It cannot be traced.
    """
    check_names(network, "fx")
    traced, plan = attempts(network, lambda plan: _evaluation(network, example, leaves, plan), example)
    graph = traced.graph_module.graph
    return traced.graph_module, given_sizes(graph, network, example, plan, fixed=traced.fixed)


def _evaluation(network: nn.Module, example: Example, leaves: list[str], plan: Plan | None) -> Traced:
    whole: list[str] = []
    while True:
        try:
            return _trace_once(network, example, [*leaves, *whole], plan, train=False)
        except CallAsWhole as found:
            whole += _alike(network, found.path)


def outer_parts(network: nn.Module, selected: dict[str, bool]) -> list[str]:
    """Submodules that stay float entirely: they are called as a whole, so their code need not be traceable.

    Except for a BatchNorm that contains other layers, which has to be frozen like others.

    Args:
        network: The float network.
        selected: For each module name, whether the module is to be quantized.
    """
    return [
        name
        for name, module in network.named_modules()
        if name
        and not any(selected[inner] for inner in selected if inner == name or inner.startswith(name + "."))
        and any(True for _ in module.children())
        and not is_batchnorm(module)
    ]


def leave_inside_float(graph_module: fx.GraphModule, selected: dict[str, bool]) -> None:
    """Deselect layers inside of modules that a graph calls as a whole, such as `nn.TransformerEncoderLayer`.

    Args:
        graph_module: A traced network.
        selected: For each module name, whether the module is to be quantized; changed in place.
    """
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    whole = tuple(f"{name}." for name in called)
    for name in selected:
        # The activation inside a BatchNorm is called separately.
        if name.startswith(whole) and name not in called:
            selected[name] = False


def take_out_constants(graph: fx.Graph) -> Callable[[fx.Graph], None]:
    """Replace constants among a graph's outputs, such as numbers, by None, because upstream's prepare refuses them.

    Returns:
        A function that restores the constants in the graph that was made from this one.
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


def refuse_another_for_one(prepared: nn.Module, network: nn.Module, example: Example) -> None:
    """Run `refuse_other_results` on the first sample of the example, if the float network accepts a single one.

    Raises:
        TraceError: The results differ, or the prepared network does not accept a single sample.
    """
    one = one_sample(example)
    try:
        run_apart(copy.deepcopy(network), copy.deepcopy(one))
    except Exception:  # noqa: BLE001 - a network that takes no single sample has none to agree on
        return
    reason = (
        f"{type(network).__name__}.forward depends on the batch size: for one sample it returns something different "
        "from the graph of mode='fx', which is traced for two or more."
    )
    try:
        refuse_other_results(prepared, network, one, reason)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"{reason} ({type(error).__name__}: {error}) {WHAT_TO_DO}") from error


@torch.no_grad()
def refuse_other_results(prepared: nn.Module, network: nn.Module, example: Example, reason: str) -> None:
    """Compare a prepared network, without rounding and in evaluation, with its float network.

    Args:
        prepared: The network with fake-quant.
        network: The float network.
        example: One call.
        reason: Reason for the message.

    Raises:
        TraceError: The results differ.
    """
    ours, theirs = copy.deepcopy(prepared), copy.deepcopy(network)
    for _, fq in fake_quantizers(ours):
        fq.enable_fake_quant(False)
    results = []
    for module in (theirs, ours):
        with generators_kept(module, seed=0):
            results.append(run_apart(module, copy.deepcopy(example)))
    wanted, got = results
    if not same_results(wanted, got):
        raise TraceError(f"{reason} {WHAT_TO_DO}")


def same_results(wanted: Any, got: Any) -> bool:
    """Whether two networks returned the same result, except for the last digits."""
    return same(wanted, got, _close)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    return torch.allclose(
        one.double(), other.double(), rtol=1e-3, atol=1e-4 * float(one.double().abs().max() + 1), equal_nan=True
    )


def _trace_once(
    network: nn.Module, example: Example, leaves: list[str], plan: Plan | None, *, train: bool, learns: bool = False
) -> Traced:
    signature = inspect.signature(network.forward)
    fixed = fixed_parameters(signature, example)
    with (
        flags_kept(network),
        counting(network) as counted,
        no_checkpoints() if train else contextlib.nullcontext(),
        no_own_gradients(is_traced) if learns else contextlib.nullcontext(),
    ):
        network.train(train)
        try:
            settings = LayerSettings(network)
            tracer, graph = _graph(network, example, leaves, plan, fixed, settings)
        except CallAsWhole:
            raise
        except Checkpointed as error:
            raise loses_checkpoints(network, "fx", line_at_fault(error)) from None
        except OwnGradient as error:
            raise loses_gradient(network, "fx", error) from None
        except Exception as error:
            raise _no_trace(network, error) from error
    if plan is None:
        drop_checks(graph, signature, fixed)
    give_parameters(graph, signature, fixed)
    graph_module = fx.GraphModule(network, graph)
    give_operands_by_position(graph_module)
    drop_unread(graph_module.graph)
    graph_module.recompile()
    has_sizes = getattr(tracer, "fixed", False)
    return Traced(graph_module, tracer.node_name_to_scope, counted, settings.evaluated, fixed=has_sizes)


def _graph(
    network: nn.Module,
    example: Example,
    leaves: list[str],
    plan: Plan | None,
    fixed: dict[str, Any],
    settings: LayerSettings,
) -> tuple[NetworkTracer, fx.Graph]:
    def tracer(*, buffers: bool) -> NetworkTracer:
        if plan is None:
            made = NetworkTracer(leaves, buffers=buffers)
        else:
            made = ShapesTracer(leaves, example, plan, buffers=buffers)
        made.layer_settings = settings
        return made

    with batchnorms_take_anything():
        try:
            first = tracer(buffers=True)
            return first, first.trace(network, concrete_args=fixed)
        except (CallAsWhole, Checkpointed, DecidesByChance, OwnGradient):
            raise
        except Exception:  # noqa: BLE001 - an error that is not about a buffer is raised again by the second trace
            # A forward may read the values of a buffer, which are then constants.
            second = tracer(buffers=False)
            return second, second.trace(network, concrete_args=fixed)


def _no_trace(network: nn.Module, error: Exception) -> TraceError:
    if isinstance(error, DecidesByChance):
        return TraceError(
            f"mode='fx' keeps one path through {type(network).__name__}.forward, and {str(error) or 'forward'!r} draws "
            "random numbers outside of the graph, as a constant or to choose a path: move the random part to a module "
            f"without layers, or draw the numbers as a tensor (torch.rand_like). {WHAT_TO_DO}"
        )
    where = line_at_fault(error)
    return TraceError(
        f"mode='fx' cannot trace {type(network).__name__}"
        + (f" at {where}" if where else "")
        + f" ({in_brief(error)}). {WHAT_TO_DO}"
    )


def _other_way(network: nn.Module, parts: tuple[fx.Node | None, fx.Node | None]) -> TraceError:
    part = f"; they diverge before {parts[0].name!r}" if parts[0] is not None else ""
    return TraceError(
        f"mode='fx' keeps one path through {type(network).__name__}.forward, which differs between training and "
        f"evaluation (it depends on self.training{part}). {WHAT_TO_DO}"
    )
