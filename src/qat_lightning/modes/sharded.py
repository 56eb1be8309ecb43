"""Prepared networks whose parameters are sharded over processes: getting whole copies of them on the CPU.

While such a network runs forward, its layers see whole parameters and round them as usual. Between steps each process
holds only a part of them (``DTensor``), and the modules cannot be copied. Code that reads weights then gets a copy made
from the network's structure, kept from before sharding, and from parameters gathered over the processes. This works for
every kind of sharding that keeps names, such as ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.modes.prepared import prepared_state


def keep_form(prepared: nn.Module) -> None:
    """Keep the structure of a prepared network, without parameter values, before it is sharded.

    Args:
        prepared: The result of a mode's ``prepare``. Its float network, which shares the parameters, keeps only their
            shapes, so that no process holds all of them.

    Example:
        >>> from qat_lightning import Example, Recipe, prepare
        >>> network = prepare(nn.Linear(2, 3), Example((torch.ones(1, 2),)), Recipe("eager", "x86", kind="dynamic"))
        >>> keep_form(network)
        >>> is_sharded(network), whole_copy(network).weight.equal(network.weight)
        (True, True)
    """
    shapes: dict[int, Any] = {
        id(tensor): _like(tensor, torch.empty_like(tensor, device="meta")) for _, tensor in _tensors(prepared)
    }
    state = prepared_state(prepared)
    form = copy.deepcopy(prepared, shapes)
    state.__dict__["form"] = form
    state.__dict__["float_network"] = prepared_state(form).float_network


def is_sharded(prepared: nn.Module) -> bool:
    """Whether a prepared network is sharded, or will be: `keep_form` was called."""
    return prepared_state(prepared).form is not None


def whole_copy(prepared: nn.Module, *, keep: bool = True) -> nn.Module | None:
    """A copy of a sharded network with whole parameters on the CPU, and fake-quant in its present state; a collective.

    Args:
        prepared: A network for which `keep_form` was called before it was sharded.
        keep: Whether this process needs the copy; it takes part in any case.

    Returns:
        A network that is not sharded; None without ``keep``.
    """
    form = prepared_state(prepared).form
    assert form is not None
    # Lightning evaluates in inference mode, whose tensors can neither be trained nor copied into others.
    with torch.inference_mode(False), torch.no_grad():
        tensors: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for name, tensor in _tensors(prepared):
            if id(tensor) not in seen:
                seen[id(tensor)] = _gathered(tensor, keep)
            tensors[name] = seen[id(tensor)]
        if not keep:
            return None
        copied = copy.deepcopy(form, {id(shape): tensors[name] for name, shape in _tensors(form)})
        _carry_over(prepared, copied)
    return copied


def reshard(module: nn.Module) -> None:
    """Free whole parameters, so that each process holds only its shard, as between training steps.

    After an evaluation the outermost sharded module keeps whole parameters, which are not those of the optimizer.

    Args:
        module: Contains sharded modules; without any, nothing is done.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it is slow, and sharding code has imported it
    if fsdp is None:
        return
    for inner in module.modules():
        if isinstance(inner, fsdp.FSDPModule):
            inner.reshard()


def blank_copy(float_network: nn.Module) -> nn.Module:
    """The float network of a sharded one, with zero tensors of the same shapes on the CPU."""
    zeros = {id(tensor): _like(tensor, torch.zeros_like(tensor, device="cpu")) for _, tensor in _tensors(float_network)}
    return copy.deepcopy(float_network, zeros)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, under all of their names."""
    return itertools.chain(
        network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)
    )


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Wrap values as the kind of a module's tensor: a parameter, with or without gradient, or a buffer."""
    values = values.detach()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _gathered(tensor: Tensor, keep: bool) -> Tensor:
    from torch.distributed.tensor import DTensor  # importing it is slow, and only needed here

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not keep:
        return torch.empty(0)
    return _like(tensor, whole.detach().cpu().clone())


def _carry_over(prepared: nn.Module, copied: nn.Module) -> None:
    """Copy the switches, and other state that changed since the structure was kept."""
    modules = dict(copied.named_modules(remove_duplicate=False))
    for name, module in prepared.named_modules(remove_duplicate=False):
        known = modules[name].__dict__
        for key, value in module.__dict__.items():
            if key in known and (value is None or isinstance(value, (bool, int, float, str))):
                known[key] = value
        for key, buffer in module._buffers.items():
            if buffer is not None and modules[name]._buffers.get(key) is None:
                modules[name]._buffers[key] = buffer.detach().cpu().clone()
    state = prepared_state(copied)
    state.left_float = dict(prepared_state(prepared).left_float)
