"""Tracing a network together with its call at inference, without inputs that only its loss reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.inference_call import InferenceCall, inference_call, optional_inputs
from qat_lightning.modes.prepared import copy_of_modules
from qat_lightning.modes.structured_tracer import makes_container

_Traced = TypeVar("_Traced", bound=tuple[Any, ...])


def traced_with_inference(
    network: nn.Module, example: Example, trace: Callable[[nn.Module, Example], _Traced]
) -> tuple[_Traced, InferenceCall | None]:
    """Trace a network, and once more without the inputs of its loss if it has any.

    Args:
        network: The float network, on which a trace may leave constants.
        example: One call.
        trace: Traces a network with a call; the first of its results is the graph module.

    Returns:
        The trace, and the call at inference; None if there is none.
    """
    untouched = copy_of_modules(network) if optional_inputs(network, example) else network
    traced = trace(network, example)
    graph: fx.Graph = traced[0].graph

    def again(lean: Example) -> tuple[fx.Graph, None]:
        return trace(untouched, lean)[0].graph, None

    return traced, inference_call(graph, untouched, example, again, makes_container)
