"""Tracing a network for all input sizes if possible, and recording the supported sizes if not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.graph.given_sizes import ANY, GivenInput, GivenSizes, leaves_by_path
from qat_lightning.graph.structures import parts
from qat_lightning.modes.fx.examples import CallFails, Calls, Plan, first_plan, is_number
from qat_lightning.modes.fx.shapes import SizesDecide
from qat_lightning.modes.fx.tracer import Traced, is_foreign

_Result = TypeVar("_Result")


def attempts(
    network: nn.Module, trace: Callable[[Plan | None], _Result], example: Example
) -> tuple[_Result, Plan | None]:
    """Trace a network without its sizes; otherwise with sizes as values of the graph; otherwise with fixed sizes.

    If functions that no file may call cannot be traced through without sizes, it is traced with them. None inside a
    container, such as for an optional entry of a dict, is known only in a trace with sizes: elsewhere ``is None`` is
    false without an error, unlike comparisons with other plain values, which end a trace.

    Args:
        network: The float network; attributes that a trace leaves on it are removed.
        trace: Traces it, following the calls of a plan, or none.
        example: One call.

    Returns:
        The trace, and its plan.

    Raises:
        TraceError: It cannot be traced in any of these ways.
    """
    plan = first_plan(example) if _has_none_in_containers(example) else None
    plain: list[_Result] = []
    while True:
        before = set(vars(network))
        try:
            result = trace(plan)
            if not _calls_foreign(result):
                return result, plan
            if plan is not None or plain:
                return (plain[0], None) if plain else (result, plan)
            plain, plan = [result], first_plan(example)
        except TraceError:
            if plan is not None and plan.is_last:
                if plain:
                    return plain[0], None
                raise
            plan = first_plan(example) if plan is None else Plan(plan.samples)
        except CallFails as failed:
            assert plan is not None
            plan = plan.without(failed.call, example)
        except SizesDecide as decided:
            assert plan is not None
            plan = plan.fixing(decided.call)
        for name in set(vars(network)) - before:
            delattr(network, name)  # constants of a discarded trace


def _has_none_in_containers(example: Example) -> bool:
    containers = [value for value in (*example.args, *example.kwargs.values()) if parts(value)]
    leaves = leaves_by_path((), (), {str(number): value for number, value in enumerate(containers)})
    return any(leaf is None for _, leaf in leaves)


def _calls_foreign(result: Any) -> bool:
    """Whether a trace, or one of the two that are returned, calls Python functions of other packages."""
    ways = [result] if isinstance(result, Traced) else [way for way in result if isinstance(way, Traced)]
    return any(is_foreign(node.target) for way in ways for node in way.graph_module.graph.nodes)


def given_sizes(
    graph: fx.Graph, network: nn.Module, example: Example, plan: Plan | None, *, fixed: bool
) -> GivenSizes | None:
    """The inputs that a graph supports.

    Args:
        graph: The graph.
        network: The network it was made from.
        example: One call.
        plan: The calls that were followed; None for a graph without sizes.
        fixed: Whether it may contain sizes as constants.

    Returns:
        None if it supports inputs of any size.
    """
    if plan is None:
        return None
    calls = Calls(example, plan)
    names = tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))
    leaves = [list(leaves_by_path(names, call.args, call.kwargs)) for call in calls.inputs]
    inputs = []
    for (path, leaf), *others in zip(*leaves, strict=True):
        if isinstance(leaf, Tensor):
            shapes = [leaf.shape, *(other.shape for _, other in others)]
            inputs.append(GivenInput(path, _common(shapes) if fixed else (ANY,) * leaf.ndim))
        elif plan.numbers and is_number(leaf):
            continue
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            inputs.append(GivenInput(path, None, leaf))
    if all(given.shape is not None and set(given.shape) <= {ANY} for given in inputs):
        return None
    return GivenSizes(type(network).__name__, names, tuple(inputs))


def _common(shapes: list[Any]) -> tuple[int, ...]:
    return tuple(sizes[0] if len(set(sizes)) == 1 else ANY for sizes in zip(*shapes, strict=True))
