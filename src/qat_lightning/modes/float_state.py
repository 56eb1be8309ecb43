"""The float network inside a prepared one, with its current weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from qat_lightning.graph.pruning import add_pruned
from qat_lightning.layers.adapters import has_adapters
from qat_lightning.modes.plain_attributes import set_attributes
from qat_lightning.modes.prepared import changed_attributes, float_keys, prepared_state


def float_weights(prepared: nn.Module, leave_out: set[str] | None = None) -> dict[str, Any]:
    """Detached copies, on the CPU, of the entries of a prepared network's ``state_dict`` that the float network has.

    Args:
        prepared: The prepared network.
        leave_out: Keys to leave out.
    """
    keys = float_keys(prepared) - (leave_out or set())
    state = prepared.state_dict()
    add_pruned(state)
    return {key: _copied(value) for key, value in state.items() if key in keys}


def frozen_beside_adapters(prepared: nn.Module) -> set[str]:
    """Keys of frozen parameters in a network with adapters: they never change, and need no copy."""
    if not has_adapters(prepared):
        return set()
    return {
        name for name, parameter in prepared.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }


def present_float(prepared: nn.Module) -> nn.Module:
    """The float network as a prepared one is now, with its weights: on the CPU, in float32 and in evaluation."""
    network: nn.Module = copy.deepcopy(prepared_state(prepared).float_network).cpu().float()
    set_attributes(network, changed_attributes(prepared))
    network.load_state_dict(float_weights(prepared))
    return network.eval()


def _copied(value: Any) -> Any:
    """A tensor, detached and on the CPU; other values (of ``get_extra_state``) unchanged."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
