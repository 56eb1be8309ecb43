"""PostTrainingQuantization with kinds that need no calibration, in a real Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization, Scheme, evaluate_variants, load_quantized
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.settings.kinds import DIRECT
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, loader, state, trainer


class Rows(nn.Module):
    """Reads the rows of an image with a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Linear(8 * 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.flatten(1, 2))[0].flatten(1))


class OwnRows(Lit):
    """The same layers on the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.gru = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Linear(8 * 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.flatten(1, 2))[0].flatten(1))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@pytest.mark.parametrize("kind", DIRECT)
def test_a_fit_is_a_float_fit_and_ends_in_integers(mode: str, kind: str, tmp_path: Path) -> None:
    def fit(*callbacks: PostTrainingQuantization) -> tuple[LightningModule, object]:
        torch.manual_seed(0)
        module, run = Lit(Rows()), trainer(*callbacks, max_epochs=6)
        run.fit(module, loader(), loader())
        return module, run

    ptq = PostTrainingQuantization(mode=mode, kind=kind)  # type: ignore[arg-type]
    (alone, _), (module, run) = fit(), fit(ptq)
    assert_same_state(state(alone), state(module))
    assert ptq.variants == ("float", "int8")
    assert ptq.quantized.recipe.kind == kind
    summary = evaluate_variants(run, module, dataloaders=loader())
    assert summary["int8/test/acc"] >= summary["float/test/acc"] - 0.05
    assert summary["int8/test/acc"] > 0.8
    assert summary["int8/agreement"] >= 0.95
    if (kind, mode) != ("dynamic", "pt2e"):
        assert summary["size_ratio"] > 1.5
    ptq.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=Rows() if mode == "eager" else None)
    images = loader().dataset[:5][0]
    assert torch.equal(loaded(images), ptq.quantized(images))
    with pytest.raises(ConfigurationError, match="has none"):
        ptq.use_variant("fake_quant")


@pytest.mark.parametrize("kind", DIRECT)
def test_a_checkpoint_is_tested_without_a_fit_and_without_other_data(kind: str, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path)
    torch.manual_seed(0)
    trainer(saved, enable_checkpointing=True, max_epochs=6).fit(OwnRows(), loader())
    ptq = PostTrainingQuantization(mode="eager", kind=kind)  # type: ignore[arg-type]
    module = OwnRows()
    results = trainer(ptq).test(module, loader(), ckpt_path=saved.best_model_path, verbose=False)
    assert results[0]["test/acc"] > 0.8
    assert ptq.quantized.source == f"checkpoint {saved.best_model_path}"
    assert {row.name for row in ptq.quantized.coverage if row.quantized} == {"gru", "head"}
    assert type(module.gru) is nn.GRU
    outputs = trainer(ptq).predict(module, loader())
    images = loader().dataset[:2][0]
    assert torch.allclose(torch.cat(outputs)[:2], ptq.quantized(images), atol=1e-5 if kind == "weight_only" else 0.1)


def test_new_weights_are_quantized_anew() -> None:
    ptq, module = PostTrainingQuantization(mode="fx", kind="weight_only"), Lit(Rows())
    trainer(ptq).test(module, loader(), verbose=False)
    before = ptq.quantized
    trainer(ptq).test(module, loader(), verbose=False)
    assert ptq.quantized is before
    with torch.no_grad():
        module.net.head.weight.mul_(2)
    trainer(ptq).test(module, loader(), verbose=False)
    assert ptq.quantized is not before


def test_coverage_is_that_of_the_conversion() -> None:
    """There is no prepared network with coverage."""
    ptq = PostTrainingQuantization(kind="dynamic", mode="eager", backend="fbgemm")
    assert ptq.coverage is None
    trainer(ptq).test(Lit(Rows()), loader(), verbose=False)
    assert [(row.name, row.quantized) for row in ptq.coverage] == [("net.gru", True), ("net.head", True)]


def test_auto_takes_the_mode_with_the_most_integers_and_of_equal_ones_the_first_that_can_be_saved() -> None:
    ptq = PostTrainingQuantization(mode="auto", kind="dynamic")
    trainer(ptq).test(Lit(Rows()), loader(), verbose=False)
    assert ptq.quantized.recipe.mode == "fx"

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:  # which no graph follows
                x = -x
            return self.head(self.encoder(x.flatten(1, 2)).mean(1))

    trainer(ptq).test(Lit(Encoder()), loader(), verbose=False)
    assert ptq.quantized.recipe.mode == "eager"
    assert all(row.quantized for row in ptq.quantized.coverage)


def test_globs_are_relative_to_the_lightning_module() -> None:
    ptq = PostTrainingQuantization(mode="eager", kind="weight_only", exclude=["net.head"])
    trainer(ptq).test(Lit(Rows()), loader(), verbose=False)
    assert [row.reason for row in ptq.quantized.coverage] == ["", "excluded"]


def test_what_cannot_be_is_an_error_before_a_step_is_trained() -> None:
    with pytest.raises(ConfigurationError, match=r"kind='weight_only' is not supported for .*use kind="):
        PostTrainingQuantization(mode="pt2e", backend="xnnpack", kind="weight_only")
    with pytest.raises(ConfigurationError, match=r"use scheme\.weight_symmetric=True"):
        PostTrainingQuantization(kind="dynamic", scheme=Scheme(weight_symmetric=False))
    ptq = PostTrainingQuantization(kind="dynamic", exclude=["net.gru", "net.head"])
    run = trainer(ptq)
    with pytest.raises(NetworkError, match="gru: excluded; head: excluded"):
        run.fit(Lit(Rows()), loader())
    assert run.global_step == 0
