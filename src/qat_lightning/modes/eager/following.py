"""The modules that follow a layer in an observed run: the only reader of its output, and the BatchNorm that folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qat_lightning.layers.batchnorm import folds_into, folds_into_phases
from qat_lightning.modes.eager.observation import Observation


def follower(module: nn.Module, observation: Observation) -> nn.Module | None:
    """The module that reads the output of every call of ``module``, if it is the only reader."""
    found: set[nn.Module] = set()
    calls: Sequence[Any] = observation.of(module)
    for call in calls:
        if len(call.outputs) != 1 or call.outputs[0] in observation.returned:
            return None
        consumers = observation.consumers(call.outputs[0])
        if len(consumers) != 1 or consumers[0].module is None or consumers[0].inputs != call.outputs:
            return None
        found.add(consumers[0].module)
    return found.pop() if len(found) == 1 else None


def batchnorm_behind(layer: nn.Module, observation: Observation) -> nn.Module | None:
    """The BatchNorm that can be folded into a layer: the only reader of its output.

    Args:
        layer: A convolution, transposed or not, or a linear layer.
        observation: A run of the network that contains both.
    """
    found = follower(layer, observation)
    if found is None or observation.reads(found):
        return None
    if not folds_into(found, layer) and not folds_into_phases(found, layer):
        return None
    calls = observation.of(layer)
    # BatchNorm normalizes dimension 1, which is not the channel dimension after a linear layer with token inputs, nor
    # after a layer with a single sample without a batch dimension.
    kernel: Any = layer.weight
    if any(call.output_dim != kernel.dim() for call in calls):
        return None
    return found if {call.outputs for call in calls} == {call.inputs for call in observation.of(found)} else None
