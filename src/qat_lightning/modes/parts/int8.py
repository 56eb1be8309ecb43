"""The int8 network by parts: the user's own code, with each part replaced by an int8 graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.modes.parts.finding import replace_modules
from qat_lightning.modes.plain_attributes import Attributes, set_attributes
from qat_lightning.modes.prepared import changed_attributes


@torch.no_grad()
def assemble(float_network: nn.Module, parts: Mapping[str, nn.Module], prepared: nn.Module) -> nn.Module:
    """Put int8 parts into a copy of the float network, with the trained values of everything else.

    Args:
        float_network: Not changed.
        parts: The int8 parts, by their first names.
        prepared: The network with fake-quant.
    """
    network = copy.deepcopy(float_network).float()
    changed = changed_attributes(prepared)
    set_attributes(network, changed)
    trained, buffers = prepared.state_dict(), dict(prepared.named_buffers())
    own, inside = set(network.state_dict()), _inside(network, parts)
    for name, buffer in network.named_buffers():
        if name not in own and name in buffers:
            buffer.data = buffers[name].detach().clone()
    rest = {key: trained[key] for key in own if not key.startswith(inside)}
    return with_parts(network, parts, rest, changed)


def with_parts(
    network: nn.Module, parts: Mapping[str, nn.Module], rest: Mapping[str, Any], attributes: Attributes
) -> nn.Module:
    """Put int8 parts into a float network, under all of their names; everything else in it is set to evaluation.

    Args:
        network: The float network, changed in place.
        parts: The int8 parts, by their first names.
        rest: The ``state_dict`` of everything outside of the parts.
        attributes: Plain attributes that training changed, which the network has already.

    Raises:
        RuntimeError: ``rest`` belongs to another network.
    """
    forms = forms_of(network)
    inside = _inside(network, parts)
    found = network.load_state_dict(dict(rest), strict=False)
    missing = [key for key in found.missing_keys if not key.startswith(inside)]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"its tensors differ: {', '.join([*missing, *found.unexpected_keys][:8])}")
    replace_modules(network, {network.get_submodule(name): part for name, part in parts.items()})
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.__dict__["quantization_parts"] = {"names": list(parts), "forms": forms, "attributes": attributes}
    return network.eval()


def forms_of(network: nn.Module) -> dict[str, list[int]]:
    """The shapes of a float network's tensors, by which a file recognizes it."""
    return {key: list(value.shape) for key, value in network.state_dict().items() if isinstance(value, Tensor)}


def rest_of(network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The ``state_dict`` of an int8 network outside of its parts, and the non-persistent buffers there."""
    inside = _inside(network, network.__dict__["quantization_parts"]["names"])
    state = network.state_dict()
    rest = {key: value for key, value in state.items() if not key.startswith(inside)}
    buffers = {
        name: buffer for name, buffer in network.named_buffers() if name not in state and not name.startswith(inside)
    }
    return rest, buffers


def _inside(network: nn.Module, parts: Iterable[str]) -> tuple[str, ...]:
    """The key prefixes of the parts, under each of their names."""
    modules = {network.get_submodule(name) for name in parts}
    return tuple(f"{name}." for name, module in network.named_modules(remove_duplicate=False) if module in modules)
