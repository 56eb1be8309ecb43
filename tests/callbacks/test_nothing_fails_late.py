"""No network fails after the first training step: layers that cannot be int8 are found before it, or stay float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from qat_lightning import QuantizationAwareTraining, load_quantized
from qat_lightning.errors import QuantizationError
from qat_lightning.modes.coverage import int8_share
from qat_lightning.numerics.sqnr import sqnr_db
from tests.callbacks.lit import trainer
from tests.support.varied_networks import VARIED, Varied

MODES = ("eager", "fx", pytest.param("pt2e", marks=pytest.mark.slow))
STEPS = 3


class Squares(LightningModule):
    """Trains any network on the squares of its outputs, to test that everything runs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.steps = net, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum(leaf.pow(2).mean() for leaf in tree_leaves(self.net(batch)) if isinstance(leaf, Tensor))

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def _fit(row: Varied, mode: str) -> tuple[Squares, QuantizationAwareTraining]:
    torch.manual_seed(0)
    lit, qat = Squares(row.make()), QuantizationAwareTraining(mode=mode)
    batches = [torch.randn(row.shape) for _ in range(STEPS)]
    try:
        trainer(qat, max_epochs=1).fit(lit, DataLoader(batches, batch_size=None))
    except QuantizationError:
        assert lit.steps == 0, "refused after the first step"
        raise
    return lit, qat


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", VARIED, ids=lambda row: row.name)
@pytest.mark.slow
def test_a_network_reaches_its_share_of_int8_or_is_refused_before_the_first_step(
    row: Varied, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    if mode not in row.least:
        with pytest.raises(QuantizationError, match=r"Tried on this network: .*mode='eager' works"):
            _fit(row, mode)
        assert "eager" in row.least  # the remedy is a row of its own
        return
    _, qat = _fit(row, mode)
    share = int8_share([*qat.quantized.coverage, *qat.quantized.operations])
    assert share is not None
    assert share >= row.least[mode], [(r.name, r.reason, r.macs) for r in qat.quantized.coverage if not r.quantized]
    x = torch.randn(row.shape)
    with torch.no_grad():
        wanted, got = tree_leaves(qat.network("fake_quant")(x)), tree_leaves(qat.quantized(x))
    assert min(sqnr_db(one, other) for one, other in zip(wanted, got, strict=True)) > 30
    qat.save(tmp_path / "network.int8")
    loaded = load_quantized(tmp_path / "network.int8", row.make())
    assert all(torch.equal(one, other) for one, other in zip(tree_leaves(loaded(x)), got, strict=True))


@pytest.mark.parametrize("row", [row for row in VARIED if "fx" not in row.least], ids=lambda row: row.name)
def test_auto_takes_the_mode_that_a_refusal_names(row: Varied) -> None:
    _, qat = _fit(row, "auto")
    assert qat.quantized.recipe.mode == "eager"
