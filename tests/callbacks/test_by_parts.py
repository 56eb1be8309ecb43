"""Fits of networks that cannot be captured as a whole: a detector, and a decoder with a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import float_state_dict, load_quantized
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.errors import CombinationError
from tests.callbacks.lit import assert_same_state, qat, state, trainer
from tests.modes.parts.networks import Decoder, Detector


class Detects(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Detector()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(*batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("boxes", float(sum(boxes.shape[1] for boxes in self.net(batch[0]))))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Decodes(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Decoder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1][:, None, None]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader(*shape: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, *shape, generator=generator), torch.randn(16, generator=generator))
    return DataLoader(data, batch_size=4)


@pytest.mark.parametrize(
    ("lit", "shape", "parts", "layers"),
    [
        (Detects, (3, 8, 8), ["body", "head"], {"body.0": True, "head.0": True, "head.2": True, "spare": False}),
        (
            Decodes,
            (6,),
            ["encoder", "cell"],
            {"encoder.0": True, "encoder.2": True, "cell.0": True, "cell.2": True},
        ),
    ],
)
def test_auto_quantizes_the_parts_and_says_which(
    lit: type[LightningModule],
    shape: tuple[int, ...],
    parts: list[str],
    layers: dict[str, bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    module, callback = lit(), qat("auto", start=1)
    keys, order = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    with caplog.at_level("INFO"):
        trainer(callback, max_epochs=2).fit(module, loader(*shape))
    assert f"its parts {', '.join(map(repr, parts))}, and the code around them stays Python" in caplog.text
    assert callback.quantized.recipe.mode == "parts"
    covered = {row.name: row.quantized for row in callback.coverage if row.what == "layer"}
    assert covered == {f"net.{name}": quantized for name, quantized in layers.items()}
    assert [name for name, _ in module.named_parameters()] == order
    assert set(float_state_dict(module.state_dict())) == set(keys)
    callback.save(tmp_path / "a.int8")
    loaded = load_quantized(tmp_path / "a.int8", type(module.net)())
    x = torch.randn(3, *shape)
    for one, other in zip(callback.quantized(x), loaded(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("lit", "shape"), [(Detects, (3, 16, 16)), (Decodes, (6,))])
def test_a_resumed_fit_ends_as_one_that_was_not_stopped(
    lit: type[LightningModule], shape: tuple[int, ...], tmp_path: Path
) -> None:
    def fit(epochs: int, resumed: Path | None = None) -> tuple[LightningModule, Any]:
        torch.manual_seed(0)
        module, callback = lit(), qat("parts", start=1, freeze_observers=6, freeze_batchnorm=6, rehearse=False)
        run = trainer(callback, max_epochs=epochs)
        run.fit(module, loader(*shape), ckpt_path=resumed)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, callback

    fit(1)
    through, callback = fit(2)
    again, resumed = fit(2, tmp_path / "1.ckpt")
    assert_same_state(state(through), state(again))
    x = torch.randn(3, *shape)
    for one, other in zip(callback.quantized(x), resumed.quantized(x), strict=True):
        assert torch.equal(one, other)


def test_static_quantization_by_parts() -> None:
    torch.manual_seed(0)
    module, ptq = Detects(), PostTrainingQuantization("parts", calibration_dataloader=loader(3, 16, 16))
    run = trainer(ptq)
    run.test(module, loader(3, 16, 16), verbose=False)
    assert [row.name for row in ptq.quantized.coverage if row.quantized] == ["body.0", "head.0", "head.2"]


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_kinds_without_calibration_are_refused_in_words(kind: Any) -> None:
    with pytest.raises(CombinationError, match="use mode='eager'"):
        trainer(PostTrainingQuantization("parts", kind=kind)).validate(Detects(), loader(3, 16, 16), verbose=False)


def test_compiled_steps_are_refused_before_the_training() -> None:
    with pytest.raises(CombinationError, match="use compile=False"):
        trainer(qat("parts", compile=True)).fit(Decodes(), loader(6))
