"""Layers that ``torch.nn.utils.prune`` prunes: a hook computes their weight before each call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def pruned_tensors(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The layers that are pruned: their names, the layers, and the names of the pruned parameters."""
    for name, module in network.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                yield name, module, hook._tensor_name


def copy_with_pruning_done(network: nn.Module) -> nn.Module:
    """A deep copy of a network, in which pruned weights are parameters with zeros, and nothing prunes any more.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=2)
        >>> copied = copy_with_pruning_done(layer)
        >>> sorted(copied.state_dict()), int((copied.weight == 0).sum())
        (['bias', 'weight'], 2)
        >>> sorted(layer.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
    """
    computed = [vars(module).get(name) for _, module, name in pruned_tensors(network)]
    copied = copy.deepcopy(network, {id(tensor): tensor.detach() for tensor in computed if tensor is not None})
    for _, module, name in list(pruned_tensors(copied)):
        _finish(module, name)
    return copied


@torch.no_grad()
def _finish(module: nn.Module, name: str) -> None:
    """`prune.remove` for modules that may share their parameters and hooks with another one, as fused layers do."""
    vars(module).pop(name, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
    original, mask = module._parameters.pop(f"{name}_orig", None), module._buffers.pop(f"{name}_mask", None)
    if original is not None and mask is not None:
        original.data = original * mask
        module._parameters[name] = original


def add_pruned(state: dict[str, Any]) -> None:
    """Add to a ``state_dict`` the weights that are pruned, which it has as parameters and masks."""
    for key in [key.removesuffix("_mask") for key in state if key.endswith("_mask")]:
        if key not in state and isinstance(original := state.get(f"{key}_orig"), Tensor):
            with torch.no_grad():
                state[key] = original * state[f"{key}_mask"]
