"""Layers that other code replaces in a prepared network: between two fits, in a fit, and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_lightning import calibrate, convert, prepare
from qat_lightning.artifact import load_quantized
from qat_lightning.callbacks.parts.checkpoints import float_state_dict
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.replaced import replaced_layers
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import CLASSES, Lit, Net, dataset, loader, trainer

pytestmark = pytest.mark.usefixtures("without_compiler")
IMAGES = dataset()[:32][0]
KINDS = [("eager", "static"), ("fx", "static"), ("eager", "weight_only")]
SETTINGS = [{"mode": mode, "kind": kind} for mode, kind in KINDS]


def _head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(72, CLASSES)


def _deeper() -> nn.Module:
    return nn.Sequential(nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Replacing(Lit):
    """Gets a new part in its second epoch."""

    def __init__(self, path: str, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.path, self.make = path, make

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.set_submodule(self.path, self.make())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("same", [True, False], ids=["same callback", "new callback"])
def test_a_further_fit_with_a_new_head_is_refused_and_the_remedy_works(settings: dict[str, str], same: bool) -> None:
    module, qat = Lit(), QuantizationAwareTraining(**settings)
    trainer(qat).fit(module, loader())
    module.net.head = _head()
    again = qat if same else QuantizationAwareTraining(**settings)
    with pytest.raises(NetworkError, match=r"'net\.head' was replaced by a Linear .* new LightningModule"):
        trainer(again).fit(module, loader())
    new, qat = Lit(), QuantizationAwareTraining(**settings)
    new.load_state_dict(float_state_dict(module.state_dict()))
    assert torch.equal(new.net.head.weight, module.net.head.weight)
    run = trainer(qat)
    run.fit(new, loader())
    run.test(new, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    assert next(row for row in qat.quantized.coverage if row.name == "head").quantized


@pytest.mark.slow
def test_a_graph_of_pt2e_reads_its_weights_from_a_new_head_of_the_same_class() -> None:
    module = Lit()
    trainer(QuantizationAwareTraining(mode="pt2e")).fit(module, loader())
    module.net.head = _head()
    qat = QuantizationAwareTraining(mode="pt2e")
    run = trainer(qat)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert not torch.equal(module.net.head.weight, _head().weight)
    assert qat.fidelity["sqnr_db"] > 40


@pytest.mark.slow
def test_a_further_fit_of_pt2e_with_a_deeper_head_is_refused() -> None:
    module, qat = Lit(), QuantizationAwareTraining(mode="pt2e")
    trainer(qat).fit(module, loader())
    module.net.head = _deeper()
    with pytest.raises(NetworkError, match=r"'net\.head' was replaced by a Sequential"):
        trainer(qat).fit(module, loader())


@pytest.mark.parametrize("mode", ["eager", "fx"])
@pytest.mark.parametrize("make", [_head, _deeper])
def test_a_head_that_is_replaced_in_the_fit_stays_float_and_costs_no_other_layer(
    mode: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    module, qat = Replacing("head", make), QuantizationAwareTraining(mode=mode)
    run = trainer(qat)
    run.fit(module, loader())
    rows = {row.name: row for row in qat.quantized.coverage}
    assert rows["features.0"].quantized
    assert all("was replaced by a" in row.reason for name, row in rows.items() if name.startswith("head"))
    run.test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    qat.save(tmp_path / "model.int8")
    network = Net()
    network.head = make()
    loaded = load_quantized(tmp_path / "model.int8", network=network if mode == "eager" else None)
    assert torch.equal(loaded(IMAGES), qat.quantized(IMAGES))


def test_a_batchnorm_that_is_replaced_in_the_fit_costs_the_layer_before_it() -> None:
    module, qat = Replacing("features.1", lambda: nn.BatchNorm2d(8)), QuantizationAwareTraining(mode="eager")
    run = trainer(qat)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    left = {row.name: row.reason for row in qat.quantized.coverage if not row.quantized}
    assert list(left) == ["features.0"]
    assert "was replaced" in left["features.0"]


def test_a_test_after_a_new_head_runs_the_new_one() -> None:
    module, qat = Lit(), QuantizationAwareTraining(mode="eager")
    run = trainer(qat)
    run.fit(module, loader())
    module.net.head = _head()
    run.test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    with torch.no_grad():
        assert torch.allclose(module.net.cpu().eval()(IMAGES), qat.quantized(IMAGES), atol=1e-2)


def test_an_added_layer_is_part_of_the_int8_network_and_float() -> None:
    network = prepare(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(8, 8),), Recipe("eager", "x86")
    )
    calibrate(network, [(torch.randn(8, 8),)])
    network.append(nn.Linear(4, 2))
    assert list(replaced_layers(network).values()) == ["was added after the network was prepared"]
    x = torch.randn(8, 8)
    assert convert(network, (x,))(x).shape == (8, 2)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e", "parts"])
def test_copies_and_converted_networks_count_as_unchanged(mode: str) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    network = nn.Sequential(body, nn.Flatten())
    example = Example((torch.randn(4, 3, 12, 12),))
    prepared = prepare(network, example, Recipe(mode, "x86"))
    prepared.train()(*example.args).sum().backward()
    convert(prepared, example)
    assert not replaced_layers(prepared)
    assert not replaced_layers(copy.deepcopy(prepared))
