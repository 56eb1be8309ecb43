"""What follows a layer in a run that was observed: the module that takes all it gives, the BatchNorm that folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qat_lightning.layers.batchnorm import folds_into, folds_into_phases
from qat_lightning.modes.eager.observation import Observation


def follower(module: nn.Module, observation: Observation) -> nn.Module | None:
    """The one module that takes the output of every call of ``module``, and nothing else does."""
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
    """The BatchNorm that folds into a layer: it takes all that the layer gives and nothing else, as one with it.

    Args:
        layer: A convolution, transposed or not, or a linear layer.
        observation: Of a run of the network that both are in.
    """
    found = follower(layer, observation)
    if found is None or observation.reads(found):
        return None
    if not folds_into(found, layer) and not folds_into_phases(found, layer):
        return None
    calls = observation.of(layer)
    # BatchNorm normalizes dimension 1, which is another than that of the channels behind a linear layer that takes
    # tokens, and behind any layer that takes one sample without a batch.
    kernel: Any = layer.weight
    if any(call.output_dim != kernel.dim() for call in calls):
        return None
    return found if {call.outputs for call in calls} == {call.inputs for call in observation.of(found)} else None
