"""Embeddings in fits: trained, resumed and saved as integers; resumed fits of earlier releases leave them float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme, load_quantized
from qat_lightning.numerics.state_entries import from_entry, to_tensor
from tests.callbacks.lit import CLASSES, Lit, trainer


class Words(nn.Module):
    """Classifies words by class, and identifies the word with the table's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(40, 16, padding_idx=0), nn.EmbeddingBag(40, 16, padding_idx=0)
        self.inner, self.head, self.scores = nn.Linear(16, 16), nn.Linear(16, 40, bias=False), nn.Linear(16, CLASSES)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.words(ids).mean(1) + self.bag(ids)))
        y: Tensor = self.scores(x) + 0.01 * F.adaptive_avg_pool1d(self.head(x)[:, None], CLASSES)[:, 0]
        return y


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % CLASSES
    ids = torch.randint(1, 10, (64, 6), generator=generator) + 10 * labels[:, None] - labels[:, None].clamp(max=1)
    ids[:, -1] = 0
    return DataLoader(TensorDataset(ids, labels), batch_size=16)


def lit() -> Lit:
    torch.manual_seed(0)
    return Lit(Words(), lr=0.2)


def qat(mode: str, **arguments: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(mode=mode, start={"epoch": 1}, freeze_observers={"epoch": 3}, **arguments)


TRAINED: list[dict[str, Any]] = [
    {},
    {"kind": "dynamic"},
    {"kind": "dynamic", "scheme": Scheme(4, activation_granularity="per_token")},
]


@pytest.mark.parametrize("arguments", TRAINED, ids=["static", "dynamic", "by token"])
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fit_ends_with_integer_tables_and_resumes_to_the_same(
    mode: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    whole = qat(mode, **arguments)
    network = lit()
    fit = trainer(whole, max_epochs=4)
    fit.fit(network, batches())
    (result,) = fit.test(network, batches(), verbose=False)
    assert result["test/acc"] > 0.9
    assert whole.quantized is not None
    rows = {row.name.removeprefix("net."): row for row in whole.quantized.coverage}
    assert all(rows[name].quantized for name in ("words", "bag", "head")), rows
    whole.save(tmp_path / "whole.int8")
    (ids, _) = next(iter(batches()))
    loaded = load_quantized(tmp_path / "whole.int8", network=Words())
    assert torch.equal(loaded(ids), whole.quantized(ids))

    first = trainer(qat(mode, **arguments), max_epochs=2)
    first.fit(lit(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = qat(mode, **arguments)
    resumed = lit()
    trainer(again, max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert again.quantized is not None
    assert torch.equal(again.quantized(ids), whole.quantized(ids))


@pytest.mark.parametrize(("kind", "family"), [("static", "tables"), ("dynamic", "dynamic_tables")])
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fit_that_resumes_from_an_earlier_release_leaves_tables_float(
    mode: str, kind: str, family: str, tmp_path: Path
) -> None:
    first = trainer(qat(mode, kind=kind), max_epochs=2)
    first.fit(lit(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    (key,) = [name for name in checkpoint["state_dict"] if name.endswith("_quantization._extra_state")]
    entry = from_entry(checkpoint["state_dict"][key])
    entry["families"].remove(family)
    checkpoint["state_dict"][key] = to_tensor(entry)
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    again = qat(mode, kind=kind)
    trainer(again, max_epochs=3).fit(lit(), batches(), ckpt_path=tmp_path / "earlier.ckpt")
    assert again.quantized is not None
    assert {row.name.removeprefix("net.") for row in again.quantized.coverage if not row.quantized} == {"words", "bag"}


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_calibration_keeps_tables_as_integers(mode: str) -> None:
    network, ptq = lit(), PostTrainingQuantization(mode=mode, exclude=["net.bag"])
    fit = trainer(ptq, max_epochs=4)
    fit.fit(network, batches(), batches())
    (result,) = fit.test(network, batches(), verbose=False)
    assert result["test/acc"] > 0.9
    assert ptq.quantized is not None
    rows = {row.name.removeprefix("net."): row.reason for row in ptq.quantized.coverage if not row.quantized}
    assert rows == {"bag": "excluded"}


class Scores(Words):
    """Uses the table as the weight of a function, like a tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.words(ids).mean(1) + self.bag(ids)))
        y: Tensor = (
            self.scores(x) + 0.01 * F.adaptive_avg_pool1d(F.linear(x, self.words.weight)[:, None], CLASSES)[:, 0]
        )
        return y


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_table_that_forward_reads_as_a_weight_is_float_from_the_start(mode: str, kind: str) -> None:
    callback = qat(mode, kind=kind)
    torch.manual_seed(0)
    trainer(callback, max_epochs=4).fit(Lit(Scores(), lr=0.2), batches())
    assert callback.quantized is not None
    rows = {row.name.removeprefix("net."): row.reason for row in callback.quantized.coverage if not row.quantized}
    assert set(rows) - {"head"} == {"words"}
    assert "forward also reads its weight directly" in rows["words"]
