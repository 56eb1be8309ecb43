"""How close int8 is to fake-quant in a test, whatever a network returns; it never ends the test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.measure.fidelity import Fidelity


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
    assert values == {"agreement": 1.0, "sqnr_db": float("inf")}


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
