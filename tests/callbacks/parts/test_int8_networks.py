"""Int8 networks are created on demand, once, and again when they are stale."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.int8_networks import Int8Networks
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.callbacks.parts.variant_source import TrainedVariants
from qat_lightning.errors import ConfigurationError, ConversionError
from tests.callbacks.lit import Lit, loader, qat, trainer
from tests.callbacks.parts.placed import IMAGES, placed


def int8_of(networks: Networks) -> Int8Networks:
    return Int8Networks(networks, TrainedVariants(networks, FloatWeights(networks)))


def test_they_are_made_once_until_they_are_stale() -> None:
    _, networks = placed()
    int8 = int8_of(networks)
    assert int8.quantized is None
    int8.make()
    first = int8.quantized
    int8.make()
    assert int8.quantized is first
    with torch.no_grad():
        networks.prepared["net"].head.weight.mul_(-1)
    int8.make()
    assert int8.quantized is first
    int8.outdate()
    int8.make()
    assert not torch.equal(int8.quantized(IMAGES), first(IMAGES))


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
    assert pickle.loads(pickle.dumps(int8)).quantized is None
    int8.made_from = "a test"
    int8.make()
    again = pickle.loads(pickle.dumps(int8))
    assert "net" not in again
    assert torch.equal(again.quantized(IMAGES), int8.quantized(IMAGES))
    assert again.quantized.source == "a test"
    again.forget()
    assert again.quantized is None


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
