"""The language model of the demos: data, metric, and a fit with 4-bit weights and per-token ranges."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from qat_lightning import QuantizationAwareTraining, Scheme, evaluate_variants
from qat_lightning.demos import CharTransformer, LanguageModule, TextFileDataModule
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import trainer

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_text_is_split_by_position_and_shifted_by_one(text: Path) -> None:
    data = TextFileDataModule(text, context=16, batch_size=4)
    assert [len(split) for split in data.splits] == [116, 6, 6]
    inputs, targets = data.splits.train[3]
    assert bytes(inputs.tolist()).decode() == TEXT[48:64]
    assert bytes(targets.tolist()).decode() == TEXT[49:65]
    batch = next(iter(data.val_dataloader()))
    assert batch[0].dtype is torch.int64
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])


def test_what_is_no_text_or_too_short_is_refused(text: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a file"):
        TextFileDataModule(text.parent / "none.txt")
    with pytest.raises(ConfigurationError, match="context=102"):
        TextFileDataModule(text, context=500).setup("fit")
    TextFileDataModule(text, context=102).setup("fit")


def test_a_token_does_not_see_what_follows() -> None:
    network = CharTransformer(context=8, dim=16, depth=2, heads=2).eval()
    tokens = torch.randint(0, 256, (2, 8))
    later = tokens.clone()
    later[:, 5:] = 0
    assert torch.allclose(network(tokens)[:, :5], network(later)[:, :5], atol=1e-5)


@pytest.mark.parametrize("mode", ["fx", pytest.param("eager", marks=pytest.mark.slow)])
def test_it_trains_for_4_bits_and_ranges_of_each_token(mode: str, text: Path) -> None:
    seed_everything(0, verbose=False)
    scheme = Scheme(
        weight_bits=4, weight_granularity="per_group", weight_group_size=16, activation_granularity="per_token"
    )
    data = TextFileDataModule(text, context=16, batch_size=16)
    module = LanguageModule(CharTransformer(context=16, dim=32, depth=1, heads=2), 256, lr=0.01)
    callback = QuantizationAwareTraining(mode=mode, kind="dynamic", scheme=scheme, start=0.5)
    run = trainer(callback, max_epochs=12)
    run.fit(module, datamodule=data)
    summary = evaluate_variants(run, module, datamodule=data)
    assert summary["int8/test/perplexity"] == pytest.approx(summary["fake_quant/test/perplexity"], rel=1e-4)
    assert summary["int8/test/perplexity"] == pytest.approx(math.exp(summary["int8/test/loss"]), rel=0.02)
    assert summary["int8/test/perplexity"] < 3
    assert {row.name for row in callback.quantized.coverage if row.quantized} >= {"blocks.0.query", "head"}
