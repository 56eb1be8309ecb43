"""benchmarks.peers_qat: all tools train on the same batches and convert; tools that are not installed are named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import peers_qat
from benchmarks.peers import PEERS
from benchmarks.results import Results
from qat_lightning import Scheme
from qat_lightning.demos import ClassificationModule


class Stripes(LightningDataModule):
    """Images of four classes, given by the bright row; shuffled by the global generator."""

    def _loader(self, count: int, shuffle: bool) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(count)
        labels = torch.randint(0, 4, (count,), generator=generator)
        images = 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
        images[torch.arange(count), :, 2 * labels] += 2
        return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(160, shuffle=True)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(99, shuffle=False)


def tiny(scheme: Scheme) -> peers_qat.Task:
    def model() -> ClassificationModule:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6()]
        head = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)]
        return ClassificationModule(nn.Sequential(*layers, *head), num_classes=4, lr=1e-2)

    return peers_qat.Task(model, Stripes(), "predict", scheme, epochs=4, calibration=2, rounds=2)


@pytest.mark.nightly
def test_ways_learn_the_same_batches_and_end_near_float() -> None:
    task = tiny(Scheme(weight_granularity="per_tensor"))
    ways = [peers_qat.FLOAT, peers_qat.OURS, "torch FX", "torchao PT2E"]
    figures = {way: peers_qat.train(task, way) for way in ways}
    peers_qat.check_same_data(figures)
    assert figures[peers_qat.FLOAT]["before"] < 0.6
    for found in figures.values():
        assert found["steps"] == 40
        assert found["accuracy"] > 0.9
        assert found["ratio"] > 0


@pytest.mark.slow
def test_one_scale_a_tensor_is_what_the_peers_train_with() -> None:
    task = tiny(Scheme(weight_granularity="per_tensor"))
    images = next(iter(task.data.train_dataloader()))[0]
    for name in ("torch FX", "torchao PT2E"):
        sizes = {}
        for per_tensor in (True, False):
            prepared = PEERS[name].prepare(task.model().net, [images], per_tensor)
            prepared(images)
            sizes[per_tensor] = {module.scale.numel() for module in prepared.modules() if hasattr(module, "scale")}
        assert sizes == {True: {1}, False: {1, 4, 8}}, name


def test_a_peer_that_is_not_installed_is_named_and_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"photos": None, "cifar": None, "cifar_work": tmp_path, "threads": 1, "python": "python"}
    results = Results(tmp_path / "peers_qat.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers_qat, "ask_worker", lambda *given: "pip install nncf openvino: No module named 'nncf'")
        found = peers_qat.figures_of("ResNet-20 per channel", 0, "NNCF", argparse.Namespace(**words), results)
    assert "pip install nncf openvino" in str(found)
    assert "left out: ResNet-20 per channel, seed 0, NNCF: pip install nncf" in capsys.readouterr().out
    assert not results.rows


def test_other_data_is_refused() -> None:
    with pytest.raises(SystemExit, match="not trained on the same images"):
        peers_qat.check_same_data({"float, trained on": {"digest": 1}, "NNCF": {"digest": 2}})
