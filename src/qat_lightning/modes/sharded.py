"""Prepared networks whose parameters are sharded over processes: what they are as a whole, on the CPU.

While such a network runs forward its layers see whole parameters, and round them as ever. Between steps each process
holds a part of them (``DTensor``), and the modules cannot be copied. Whatever looks at weights then gets a copy that is
made of the network's form, kept from before it was sharded, and of parameters that the processes gather. This works
for any way of sharding that leaves names as they are, such as ``torch.distributed.fsdp.fully_shard``.
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
    """Let a prepared network be sharded from now on: keep its form, without the values of any parameter.

    Args:
        prepared: What a mode's ``prepare`` made. Its float network, which shares its parameters, keeps their shapes
            only, so that no process goes on holding the whole of them.

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
    """Whether a prepared network is, or is going to be, sharded: `keep_form` was called."""
    return prepared_state(prepared).form is not None


def whole_copy(prepared: nn.Module, *, keep: bool = True) -> nn.Module | None:
    """A sharded network with whole parameters on the CPU, with fake-quant as it is now; a collective.

    Args:
        prepared: `keep_form` was called before it was sharded.
        keep: Whether this process wants it; it takes part all the same.

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
    """Let each process hold its part only, as between training steps.

    After an evaluation the outermost sharded module keeps whole parameters, which are not those of the optimizer.

    Args:
        module: With sharded modules in it, or with none, when nothing is done.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a while, and whoever shards has imported it
    if fsdp is None:
        return
    for inner in module.modules():
        if isinstance(inner, fsdp.FSDPModule):
            inner.reshard()


def blank_copy(float_network: nn.Module) -> nn.Module:
    """The float network of a sharded one with tensors of its shapes on the CPU, all of them zero."""
    zeros = {id(tensor): _like(tensor, torch.zeros_like(tensor, device="cpu")) for _, tensor in _tensors(float_network)}
    return copy.deepcopy(float_network, zeros)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, under every name that they have."""
    return itertools.chain(
        network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)
    )


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values as what a tensor is in its module: a parameter, which trains or not, or a buffer."""
    values = values.detach()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _gathered(tensor: Tensor, keep: bool) -> Tensor:
    from torch.distributed.tensor import DTensor  # its import takes a while, and others need none

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not keep:
        return torch.empty(0)
    return _like(tensor, whole.detach().cpu().clone())


def _carry_over(prepared: nn.Module, copied: nn.Module) -> None:
    """The switches, and what else changed since the form was kept."""
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
