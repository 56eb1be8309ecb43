"""Whole copies of sharded networks; with real shards in `tests/callbacks/test_sharded.py`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat_lightning import Example, Recipe, Scheme, prepare
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, prepared_state, set_phase
from qat_lightning.modes.sharded import blank_copy, is_sharded, keep_form, reshard, whole_copy


def prepared_tied() -> nn.Module:
    network = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    network[2].weight = network[0].weight
    scheme = Scheme(weight_bits=4, weight_observer="mse")
    example = Example((torch.arange(6),))
    return prepare(network, example, Recipe("eager", "x86", scheme, kind="weight_only", trained=True))


def test_a_whole_copy_has_present_weights_ties_and_switches() -> None:
    network = prepared_tied()
    keep_form(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    set_phase(network, fake_quant=False, observers=False, batchnorm_frozen=True)
    leave_float(network, {"1": "excluded"}, None)
    network[1].bias.requires_grad_(False)
    copied = whole_copy(network)
    assert copied is not None
    assert not is_sharded(copied)
    assert copied[2].weight is copied[0].weight
    assert copied[2].weight is not network[2].weight
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in network.parameters()]
    assert prepared_state(copied).left_float == {"1": "excluded"}
    assert not copied[0].weight_fake_quant.fake_quant_enabled
    for (name, left), right in zip(network.state_dict().items(), copied.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    x = torch.arange(6)
    assert torch.equal(cpu_copy(copied)(x), cpu_copy(whole_copy(network))(x))
    assert prepared_state(copied).float_network[2].weight is copied[2].weight


def test_only_shapes_are_kept_of_the_float_network() -> None:
    network = prepared_tied()
    keep_form(network)
    assert is_sharded(network)
    float_network = prepared_state(network).float_network
    assert all(parameter.is_meta for parameter in float_network.parameters())
    blank = blank_copy(float_network)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    assert {name: p.shape for name, p in blank.named_parameters()} == shapes
    assert blank[2].weight is blank[0].weight
    assert not any(parameter.is_meta for parameter in blank.parameters())


def test_a_process_that_wants_no_copy_gets_none() -> None:
    network = prepared_tied()
    keep_form(network)
    assert whole_copy(network, keep=False) is None


def test_copies_made_in_inference_mode_can_be_trained() -> None:
    network = prepared_tied()
    keep_form(network)
    with torch.inference_mode():
        copied = whole_copy(network)
    assert copied is not None
    copied(torch.arange(6)).sum().backward()
    assert copied[1].weight.grad is not None


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential()])
def test_resharding_what_is_not_sharded_does_nothing(module: nn.Module) -> None:
    reshard(module)
