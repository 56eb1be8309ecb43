"""Layers that ``torch.nn.utils.prune`` prunes, by hand or by Lightning's callback, which need not make it permanent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import NetworkError
from qat_lightning.graph.pruning import add_pruned, copy_with_pruning_done
from tests.callbacks.lit import Lit, dataset, loader, trainer

IMAGES = dataset()[:32][0]


class PrunedInFit(Lit):
    def on_fit_start(self) -> None:
        for layer in (self.net.features[0], self.net.head):
            if not prune.is_pruned(layer):
                prune.l1_unstructured(layer, "weight", amount=0.5)


def _weight(layer: Any) -> Tensor:
    found: Tensor = (layer.op if hasattr(layer, "op") else layer).weight()
    return found.dequantize()


def _check(module: Lit, qat: QuantizationAwareTraining) -> None:
    """Everything is int8, the pruned weights are 0 in it, and it computes what the trained network does."""
    assert all(row.quantized for row in qat.quantized.coverage if row.what == "layer")
    assert prune.is_pruned(module.net.features[0])
    zeros = module.net.head.weight == 0
    assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert bool((_weight(qat.quantized.network.head)[zeros] == 0).all())
    trainer(qat).test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_layers_pruned_in_the_fit_are_int8_with_their_zeros(mode: str) -> None:
    module, qat = PrunedInFit(), QuantizationAwareTraining(mode=mode, start=0.5)
    run = trainer(qat)
    run.fit(module, loader())
    _check(module, qat)
    qat.use_variant("float")
    run.test(module, loader(), verbose=False)
    qat.convert(exclude=["net.head"])
    assert not next(row for row in qat.quantized.coverage if row.name == "head").quantized
    with torch.no_grad():
        module.net.cpu().eval()
        assert torch.allclose(module.net(IMAGES), qat.quantized(IMAGES), atol=1e-3)


def test_the_pruning_of_lightnings_callback_need_not_be_permanent() -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False, apply_pruning=_in_first_epoch)
    module, qat = Lit(), QuantizationAwareTraining(mode="eager")
    trainer(qat, pruning).fit(module, loader())
    assert all(row.quantized for row in qat.quantized.coverage if row.what == "layer")
    assert prune.is_pruned(module.net.head)
    # With a Trainer of its own: the pruning callback copies the LightningModule in every stage, which torch refuses.
    trainer(qat).test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40


def _in_first_epoch(epoch: int) -> bool:
    return epoch == 0


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_network_that_is_pruned_before_is_refused_and_the_remedies_work(mode: str) -> None:
    module = Lit()
    prune.l1_unstructured(module.net.head, "weight", amount=0.5)
    with pytest.raises(NetworkError, match=r"compute the weights of 'head'.*prune\.remove\(layer, 'weight'\)"):
        trainer(QuantizationAwareTraining(mode=mode)).fit(module, loader())
    prune.remove(module.net.head, "weight")
    qat = QuantizationAwareTraining(mode=mode)
    trainer(qat).fit(module, loader())
    assert qat.quantized is not None


def test_a_copy_has_plain_parameters_and_the_network_stays_pruned() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(network[0], "weight", amount=3)
    prune.random_unstructured(network[0], "weight", amount=3)
    copied = copy_with_pruning_done(network)
    assert isinstance(copied[0].weight, nn.Parameter)
    assert not prune.is_pruned(copied)
    assert prune.is_pruned(network)
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), network(x))
    state = dict(network.state_dict())
    add_pruned(state)
    assert torch.equal(state["0.weight"], copied[0].weight)
