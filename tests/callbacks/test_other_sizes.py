"""A network whose forward computes with sizes is fitted, resumed and tested with images of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.callbacks.lit import Lit, assert_same_state, dataset, loader, qat, state, trainer


class Sized(nn.Module):
    """Adds a ramp of the image's height, and branches on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        if x.shape[2] % 2:
            raise ValueError("an odd height")
        ramp = torch.linspace(0, 1, x.shape[2], device=x.device).to(x.dtype)
        return self.head((x * ramp[:, None]).mean((2, 3)))


class SeveralSizes(Lit):
    """Every other batch is larger; evaluation uses other sizes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0] if batch_idx % 2 == 0 else nn.functional.pad(batch[0], (1, 1, 1, 1))
        return super().training_step((images, batch[1]), batch_idx)

    def _evaluate(self, stage: str, batch: Any) -> None:
        super()._evaluate(stage, (batch[0][:, :, 1:7], batch[1]))


def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Any, SeveralSizes, Any]:
    seed_everything(0, verbose=False)
    module, callback = SeveralSizes(Sized()), qat("fx", start=0.3, freeze_observers=0.7)
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitting = trainer(callback, checkpoints, max_epochs=3, enable_checkpointing=True)
    fitting.fit(module, loader(), loader(20), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


@pytest.mark.slow
def test_a_fit_with_images_of_several_sizes_resumes_and_is_tested(tmp_path: Path) -> None:
    fitting, module, callback = run(tmp_path)
    [tested] = fitting.test(module, loader(20), verbose=False)
    assert tested["test/acc"] >= 0.0
    images = dataset(8)[:][0]
    for size in (slice(0, 8), slice(1, 7)):
        fake_quant = callback.prepared.eval()(images[:, :, size])
        assert callback.quantized(images[:, :, size]).shape == (8, 4)
        torch.testing.assert_close(callback.quantized(images[:, :, size]), fake_quant, rtol=0.05, atol=0.05)
    _, resumed, again = run(tmp_path / "resumed", tmp_path / "epoch=0.ckpt")
    assert_same_state(state(resumed), state(module))
    assert torch.equal(again.quantized(images), callback.quantized(images))
