"""Weights that other code changes after a fit or in a test: what is tested and saved is int8 of the present ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from qat_lightning import PostTrainingQuantization, load_quantized
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import Lit, Net, assert_same_state, dataset, loader, qat, state, trainer

IMAGES, LABELS = dataset().tensors


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_weights_loaded_by_hand_are_what_is_tested_and_saved(mode: str, tmp_path: Path) -> None:
    module, callback = Lit(), qat(mode)
    run = trainer(callback)
    run.fit(module, loader())
    kept = state(module)
    (before,) = run.test(module, loader(), verbose=False)
    module.load_state_dict({key: value * 0.5 if key.endswith("weight") else value for key, value in kept.items()})
    (changed,) = run.test(module, loader(), verbose=False)
    assert changed["test/loss"] != pytest.approx(before["test/loss"], rel=0.05)
    assert callback.fidelity["sqnr_db"] > 40
    (expected,) = run.validate(module, loader(), verbose=False)
    assert changed["test/loss"] == pytest.approx(expected["val/loss"], rel=1e-3)
    module.load_state_dict(kept)
    network = callback.quantized
    if mode == "fx":
        callback.save(tmp_path / "model.int8")
        network = load_quantized(tmp_path / "model.int8")
    assert F.cross_entropy(network(IMAGES), LABELS).item() == pytest.approx(before["test/loss"], rel=1e-5)


def test_a_further_fit_without_the_callback_is_converted() -> None:
    module, callback = Lit(), qat()
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    first = callback.quantized
    trainer(max_epochs=2).fit(module, loader())
    (tested,) = run.test(module, loader(), verbose=False)
    assert not torch.equal(callback.quantized(IMAGES), first(IMAGES))
    assert callback.fidelity["sqnr_db"] > 40
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(callback.quantized(IMAGES), LABELS).item(), rel=1e-5)


class Averaging(Lit):
    """Copies an average of the weights into the network for validation and test, and back, as torch_ema does."""

    def __init__(self) -> None:
        super().__init__()
        self.average = [p.detach().clone() for p in self.net.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        for mean, parameter in zip(self.average, self._parameters_of_net(), strict=True):
            mean.mul_(0.5).add_(parameter.detach(), alpha=0.5)

    def _parameters_of_net(self) -> list[nn.Parameter]:
        return list(self.net.parameters())[: len(self.average)]

    def swap(self) -> None:
        for index, parameter in enumerate(self._parameters_of_net()):
            self.average[index], parameter.data = parameter.data.clone(), self.average[index].clone()

    on_validation_epoch_start = on_validation_epoch_end = on_test_epoch_start = on_test_epoch_end = swap
    on_predict_epoch_start = on_predict_epoch_end = swap


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_an_average_that_hooks_copy_in_is_what_int8_tests_and_predicts(mode: str) -> None:
    module, callback = Averaging(), qat(mode, freeze_batchnorm=0.5)
    run = trainer(callback, max_epochs=4)
    run.fit(module, loader())
    (validated,) = run.validate(module, loader(), verbose=False)
    (tested,) = run.test(module, loader(), verbose=False)
    assert tested["test/loss"] == pytest.approx(validated["val/loss"], rel=1e-3)
    assert callback.fidelity["sqnr_db"] > 40
    plain = callback.quantized(IMAGES)
    batches: Any = run.predict(module, loader())
    predicted = torch.cat(batches)
    assert F.cross_entropy(predicted, LABELS).item() == pytest.approx(tested["test/loss"], rel=1e-4)
    assert not torch.allclose(predicted, plain, atol=1e-3), "the average is not what the network trains with"
    assert torch.equal(callback.quantized(IMAGES), plain)


def test_an_average_that_hooks_copy_in_is_what_post_training_quantization_calibrates() -> None:
    module = Averaging()
    trainer(max_epochs=4).fit(module, loader())
    ptq = PostTrainingQuantization(calibration_batches=4, calibration_dataloader=loader())
    (tested,) = trainer(ptq).test(module, loader(), verbose=False)
    (expected,) = trainer().test(module, loader(), verbose=False)
    assert tested["test/loss"] == pytest.approx(expected["test/loss"], rel=0.02)
    assert ptq.fidelity["sqnr_db"] > 40


class Exchanging(Lit):
    """Puts a second network in place of the first for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Net()

    def exchange(self) -> None:
        self.net, self.second = self.second, self.net

    on_test_epoch_start = on_test_epoch_end = exchange


def test_a_network_exchanged_for_the_test_is_not_reported_as_int8(tmp_path: Path) -> None:
    module, callback = Exchanging(), qat(module="net")
    run = trainer(callback, logger=CSVLogger(tmp_path, "", ""))
    run.fit(module, loader())
    prepared, second = module.net, module.second
    with pytest.warns(UserWarning, match=r"'net' was exchanged for another module .* not int8"):
        run.test(module, loader(), verbose=False)
    assert callback.fidelity == {}
    assert "int8/test/acc" not in (tmp_path / "metrics.csv").read_text()
    assert module.net is prepared
    assert module.second is second


def test_a_network_that_stands_in_has_the_weights_of_the_one_it_stands_for() -> None:
    module, callback = Lit(), qat()
    run = trainer(callback)
    run.fit(module, loader())
    before = state(module)
    seen: dict[str, Any] = {}
    reader = LambdaCallback(on_test_epoch_start=lambda *_: seen.update(state(module)))
    trainer(callback, reader).test(module, loader(), verbose=False)
    assert_same_state(seen, before)


def test_the_agreement_of_an_earlier_test_is_not_that_of_a_later_one() -> None:
    module, callback = Lit(), qat()
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    tested = callback.fidelity
    callback.use_variant("fake_quant")
    run.test(module, loader(), verbose=False)
    assert callback.fidelity == tested, "another variant was asked for"
    callback.use_variant(None)
    for _, fq in fake_quantizers(callback.prepared):
        fq.forget()
    callback._int8.outdate()
    with pytest.warns(UserWarning, match="no range was observed"):
        run.test(module, loader(), verbose=False)
    assert callback.fidelity == {}


class Drifting(Lit):
    """Changes its weights while it is tested."""

    net: Any

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.net.head.weight.data.mul_(-1)


def test_a_test_warns_of_int8_that_is_far_from_fake_quant() -> None:
    module, callback = Drifting(), qat()
    run = trainer(callback)
    run.fit(module, loader())
    with pytest.warns(UserWarning, match=r"int8 is -?\d+\.\d dB from fake-quant in this test, less than 20 dB"):
        run.test(module, loader(), verbose=False)
