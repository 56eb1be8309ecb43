"""Agreement of int8 with fake-quant in a test, for any outputs; it never ends the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizedModelExport
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.measure.fidelity import Fidelity
from tests.callbacks.lit import CLASSES, Lit, Net, dataset, loader, qat, trainer


def test_outputs_that_cannot_be_compared_are_left_out_and_counted() -> None:
    fidelity = Fidelity()
    fidelity.update(
        {"boxes": torch.zeros(3, 4), "sizes": torch.ones(2)}, {"boxes": torch.zeros(2, 4), "sizes": torch.ones(2)}
    )
    fidelity.update([torch.zeros(1, 4)] * 3, [torch.zeros(1, 4)] * 2)
    fidelity.update(torch.tensor([1, 2]), torch.tensor([1, 3]))
    fidelity.update({"count": 3, "none": None, "empty": torch.zeros(0, 4)}, {"count": 2, "none": None})
    with pytest.warns(UserWarning, match="3 times: an output has a different shape"):
        values = fidelity.compute()
    assert values == {"sqnr_db": float("inf")}


def test_a_single_scalar_and_a_spectrum_have_an_sqnr() -> None:
    fidelity = Fidelity()
    fidelity.update(torch.tensor(10.0), torch.tensor(10.0))
    fidelity.update(torch.tensor([0.0 + 0.0j]), torch.tensor([0.0 + 1.0j]))
    assert fidelity.compute() == {"sqnr_db": pytest.approx(20.0)}


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Any:
        raise RuntimeError("not on this batch")


def test_a_reference_that_fails_does_not_end_the_test() -> None:
    fidelity = Fidelity()
    stand = Stand(nn.Identity(), nn.Identity(), on_cpu=True, fidelity=fidelity, reference=Fails())
    assert torch.equal(stand(torch.ones(2, 2)), torch.ones(2, 2))
    with pytest.warns(UserWarning, match="RuntimeError: not on this batch"):
        assert fidelity.compute() == {}


class Noisy(Net):
    """Draws a latent, as a variational autoencoder does."""

    def forward(self, x: Tensor) -> Tensor:
        mean = super().forward(x)
        return mean + torch.randn_like(mean)


class Drawing(Lit):
    """Draws in its step, too."""

    def __init__(self) -> None:
        super().__init__(Noisy())
        self.drawn: list[Tensor] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.drawn += [self.net(batch[0]), torch.rand(3)]


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_the_reference_gets_the_random_numbers_of_int8_and_takes_none(mode: str) -> None:
    module, callback = Drawing(), qat(mode)
    run = trainer(callback)
    run.fit(module, loader())
    torch.manual_seed(0)
    run.test(module, loader(), verbose=False)
    assert callback.fidelity["sqnr_db"] > 30
    torch.manual_seed(0)
    alone = [drawn for batch in loader() for drawn in (callback.quantized(batch[0]), torch.rand(3))]
    assert all(torch.equal(one, other) for one, other in zip(module.drawn, alone, strict=True))


class Boxes(nn.Module):
    """A box and scores for each image, the box first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()
        self.box = nn.Linear(CLASSES, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.body(x)
        return {"boxes": self.box(scores), "scores": scores}


class Detector(Lit):
    def __init__(self) -> None:
        super().__init__(Boxes())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.net(batch[0])
        return F.cross_entropy(found["scores"], batch[1]) + found["boxes"].square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/boxes", self.net(batch[0])["boxes"].square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/boxes", self.net(batch[0])["boxes"].square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
def test_the_class_is_compared_of_what_the_data_labels_and_of_nothing_else(labelled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Detector(), qat()
    images, labels = dataset().tensors
    data = DataLoader(TensorDataset(images, labels if labelled else torch.rand(len(images), CLASSES)), batch_size=16)
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path))
    run = trainer(callback, export, max_epochs=1)
    run.fit(module, loader(), data)
    run.test(module, data, verbose=False)
    assert ("agreement" in callback.fidelity) == labelled
    assert callback.fidelity["sqnr_db"] > 20
    result = export.results["torchscript"]
    assert result.passed
    assert (result.agreement is not None) == labelled
    assert set(result.sqnr_db_of_outputs) == {"['boxes']", "['scores']"}


def test_outputs_that_do_not_depend_on_the_inputs_say_nothing() -> None:
    fidelity = Fidelity()
    for rows in (4, 4, 2):
        fidelity.update({"boxes": torch.ones(rows, 3)}, {"boxes": torch.ones(rows, 3)}, torch.randn(rows, 8))
    with pytest.warns(UserWarning, match=r"are the same in all 3 calls .* train for more steps"):
        assert fidelity.compute() == {}
    fidelity.update({"boxes": torch.zeros(2, 3)}, {"boxes": torch.zeros(2, 3)}, torch.randn(2, 8))
    assert fidelity.compute()["sqnr_db"] == float("inf")
    same_input, x = Fidelity(), torch.randn(4, 8)
    for _ in range(2):
        same_input.update(torch.ones(4, 3), torch.ones(4, 3), x)
    assert same_input.compute()["sqnr_db"] == float("inf")
