"""The float network that a prepared one holds, with its weights as they are now."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from qat_lightning.modes.prepared import float_keys, prepared_state


def float_weights(prepared: nn.Module) -> dict[str, Any]:
    """A detached copy, on the CPU, of the part of a prepared network's ``state_dict`` that the float network has."""
    keys = float_keys(prepared)
    return {key: _copied(value) for key, value in prepared.state_dict().items() if key in keys}


def present_float(prepared: nn.Module) -> nn.Module:
    """The float network with the weights that a prepared network has now: on the CPU, in float32 and in evaluation."""
    network: nn.Module = copy.deepcopy(prepared_state(prepared).float_network).cpu().float()
    network.load_state_dict(float_weights(prepared))
    return network.eval()


def _copied(value: Any) -> Any:
    """A tensor, detached and on the CPU, or what a network's ``get_extra_state`` gave."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
