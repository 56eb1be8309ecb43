"""Int8 networks are created on demand, once, and again when they are stale."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.int8_networks import Int8Networks
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.callbacks.parts.variant_source import TrainedVariants
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import Lit, loader, qat, trainer
from tests.callbacks.parts.placed import IMAGES, placed


def int8_of(networks: Networks) -> Int8Networks:
    return Int8Networks(networks, TrainedVariants(networks, FloatWeights(networks)))


def test_they_are_made_once_until_they_are_stale() -> None:
    _, networks = placed()
    int8 = int8_of(networks)
    first = int8.quantized
    int8.make()
    assert int8.quantized is first
    int8.outdate()
    int8.make()
    assert int8.quantized is not first
    assert torch.equal(int8.quantized(IMAGES), first(IMAGES))


def test_there_is_none_before_a_range_is_known() -> None:
    _, networks = placed(observed=False)
    assert int8_of(networks).quantized is None


def _multiplied(network: Any) -> None:
    with torch.no_grad():
        network.head.weight.mul_(-1)


def _copied_behind_the_version(network: Any) -> None:
    network.head.weight.data.copy_(-network.head.weight.data)


def _exchanged(network: Any) -> None:
    network.head.weight.data = -network.head.weight.data


def _loaded(network: Any) -> None:
    entries = network.state_dict()
    network.load_state_dict(entries | {"head.weight": -entries["head.weight"]})


def _permuted(network: Any) -> None:
    network.head.weight.data.copy_(network.head.weight.data.flip(1))


def _statistics(network: Any) -> None:
    network.norm.running_mean.add_(1.0)


def _ranges(network: nn.Module) -> None:
    for _, fq in fake_quantizers(network):
        if fq.observed:
            fq.max_val.mul_(0.5)


@pytest.mark.parametrize(
    "change", [_multiplied, _copied_behind_the_version, _exchanged, _loaded, _permuted, _statistics, _ranges]
)
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_they_are_of_the_present_weights_however_these_were_changed(mode: str, change: Callable[..., None]) -> None:
    lit, networks = placed(mode)
    int8 = int8_of(networks)
    int8.make()
    first, number = int8.quantized, int8.conversion
    int8.made_from = "a test"
    change(lit.net)
    assert int8.made_from == "a test"
    second = int8.quantized
    assert not torch.equal(second(IMAGES), first(IMAGES))
    assert torch.allclose(second(IMAGES), lit.net(IMAGES), atol=1e-4)
    assert (int8.made_from, second.source) == ("the current weights", "the current weights")
    assert int8.conversion > number


def test_an_evaluation_of_fake_quant_outdates_nothing() -> None:
    lit, networks = placed()
    int8 = int8_of(networks)
    int8.make()
    first = int8.quantized
    lit.net(IMAGES)
    lit.net(torch.ones(3, 1, 8, 8))
    assert int8.quantized is first


def test_each_conversion_has_a_number_of_its_own() -> None:
    """Also among the conversions of other callbacks, whose descriptions of the weights may be the same."""
    _, networks = placed()
    int8, other = int8_of(networks), int8_of(networks)
    assert int8.conversion == other.conversion == 0
    numbers = []
    for one in (int8, other, int8):
        one.outdate()
        one.make()
        numbers.append(one.conversion)
        one.make()
        assert one.conversion == numbers[-1], "nothing was converted"
    assert len({0, *numbers}) == 4


def test_a_pickle_makes_them_again_when_they_are_asked_for() -> None:
    _, networks = placed()
    int8 = int8_of(networks)
    int8.made_from = "a test"
    int8.make()
    again = pickle.loads(pickle.dumps(int8))
    assert "net" not in again
    assert torch.equal(again.quantized(IMAGES), int8.quantized(IMAGES))
    assert again.quantized.source == "a test"
    again.forget()
    assert "net" not in again


def test_what_is_left_out_afterwards_is_float_in_both_networks() -> None:
    lit, networks = placed()
    int8 = int8_of(networks)
    quantized = int8.convert(exclude=["net.head"])
    assert [row.quantized for row in quantized.coverage if row.name == "head"] == [False]
    assert torch.allclose(quantized(IMAGES), lit(IMAGES), atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"net\.nothing"):
        int8.convert(exclude=["net.nothing"])


def test_there_is_nothing_to_convert_before_there_are_networks() -> None:
    int8 = int8_of(Networks(QuantizationSettings("fx", "x86")))
    with pytest.raises(ConversionError, match="nothing to convert yet"):
        int8.convert()
    with pytest.raises(ConversionError, match="no int8 network to save"):
        int8.save("never.int8")


def test_a_callback_that_reads_the_int8_network_while_a_second_fit_trains_gets_the_present_weights() -> None:
    module, callback = Lit(), qat()
    trainer(callback, max_epochs=1).fit(module, loader())
    read: list[Tensor] = []
    reader = LambdaCallback(on_train_batch_end=lambda *_: read.append(callback.quantized(IMAGES)))
    trainer(reader, callback, max_epochs=1).fit(module, loader())
    assert len({tuple(outputs.flatten().tolist()) for outputs in read}) == len(read) == 4
