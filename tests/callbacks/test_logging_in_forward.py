"""A LightningModule whose own forward logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from qat_lightning import PostTrainingQuantization
from qat_lightning.callbacks.quantization_callback import QuantizationCallback
from qat_lightning.errors import TraceError
from tests.callbacks.lit import Net, dataset, loader, qat, trainer

IMAGES = dataset()[:32][0]


class Logging(Net, LightningModule):
    """Logs a value that depends on the inputs, and one that does not."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        self.log("norm", scores.norm(), batch_size=len(x))
        self.log_dict({"half": 0.5}, batch_size=len(x))
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("norm of the step", self(batch[0]).norm(), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _assert_each_variant_logs_its_own(callback: QuantizationCallback, module: LightningModule, run: Any) -> None:
    norms = []
    for variant in ("float", "fake_quant", "int8"):
        callback.use_variant(variant)
        (tested,) = run.test(module, loader(), verbose=False)
        assert tested["norm"] == pytest.approx(tested["norm of the step"], rel=1e-6)
        assert tested["half"] == 0.5
        norms.append(tested["norm"])
    assert norms[0] != norms[1]
    assert callback.quantized(IMAGES).shape == (32, 4), "outside of a stage it only computes"


@pytest.mark.parametrize("settings", [{"mode": "eager"}, {"mode": "eager", "example_inputs": IMAGES}, {"mode": "auto"}])
def test_it_logs_in_training_and_of_the_variant_that_is_tested(settings: dict[str, Any]) -> None:
    module, callback = Logging(), qat(**settings, start=0.5)
    run = trainer(callback)
    run.fit(module, loader())
    assert callback.chosen_modes == {".": "eager"}
    assert {"norm", "half"} <= run.callback_metrics.keys()
    _assert_each_variant_logs_its_own(callback, module, run)


def test_it_logs_what_post_training_quantization_tests() -> None:
    module = Logging()
    trainer().fit(module, loader())
    ptq = PostTrainingQuantization(mode="eager", calibration_batches=2, calibration_dataloader=loader())
    _assert_each_variant_logs_its_own(ptq, module, trainer(ptq))


def test_the_comparison_with_fake_quant_logs_nothing() -> None:
    module, callback = Logging(), qat("eager", start=0.5)
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    calls = []
    module.__dict__["log_dict"] = lambda values, **_: calls.append(values)
    run.test(module, loader(), verbose=False)
    assert len(calls) == len(loader())


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_graph_that_would_log_nothing_is_refused(mode: str) -> None:
    with pytest.raises(TraceError, match=r"(?s)calls self\.log\b.* log in the steps .*mode='eager'"):
        trainer(qat(mode)).fit(Logging(), loader())
