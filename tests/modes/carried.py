"""Taking a network through a mode: it trains like the float network, and int8 computes what fake-quant did."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Recipe


def prepared_as_float(network: nn.Module, inputs: Tensor, mode: str = "fx", **settings: Any) -> nn.Module:
    """Prepare a network, and check that a training step without fake-quantization equals the float network's."""
    plain = copy.deepcopy(network).train()
    prepared = get_mode(mode).prepare(network.train(), Example((inputs,)), Recipe(mode, "x86", **settings))
    keys = list(plain.state_dict())
    assert [key for key in prepared.state_dict() if key in set(keys)] == keys
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    outputs = []
    for net in (plain, prepared):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            outputs.append(net(inputs))
            outputs[-1].square().mean().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(prepared.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in prepared.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    return prepared


def carried_through(network: nn.Module, inputs: Tensor, mode: str = "fx", **settings: Any) -> Converted:
    """Prepare, train briefly and convert; frozen statistics do not change, and int8 equals fake-quant's output."""
    prepared = prepared_as_float(network, inputs, mode, **settings)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared(inputs)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=True)
    before = {key: value.clone() for key, value in prepared.state_dict().items() if "running_" in key}
    prepared(inputs)
    assert all(torch.equal(value, prepared.state_dict()[key]) for key, value in before.items())
    fake_quant = cpu_copy(prepared)
    converted = get_mode(mode).convert(cpu_copy(prepared), Example((inputs,)))
    with torch.no_grad():
        off = 0.02 if onednn_is_exact() else 0.1  # QNNPACK is a step off in single values
        torch.testing.assert_close(converted.network(inputs), fake_quant(inputs), rtol=off, atol=off)
    return converted
