"""Kinds of training that are difficult to resume exactly, each as the parts of `worker.fit`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn

from qat_lightning.callbacks.distillation import Distillation
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import CLASSES, Lit, Net, loader

START, FREEZE_BATCHNORM, FREEZE_OBSERVERS = 3, 6, 9

KINDS = (
    "plain",
    "manual",
    "swa",
    "ema",
    "several",
    "ptq",
    "dynamic",
    "weight_only",
    "w4a8_token",
    "taught",
    "adapters",
)
"""Of training: as a user first would; with manual optimization; with stochastic weight averaging; with a moving average
of the weights; of two networks; without training for the grid; of a network of tokens for the grids of
``kind="dynamic"`` and ``kind="weight_only"``, and for 4-bit weights in groups with a range for each token; with
distillation from the float network; with adapters of peft."""

MODES = ("eager", "fx", "pt2e")

MODES_OF = {"w4a8_token": ("eager", "fx")}
"""The modes that have a kind, where not all have it."""

_UNCALIBRATED: dict[str, dict[str, Any]] = {
    "dynamic": {"kind": "dynamic"},
    "weight_only": {"kind": "weight_only"},
    "w4a8_token": {
        "kind": "dynamic",
        "scheme": Scheme(
            weight_bits=4, weight_granularity="per_group", weight_group_size=16, activation_granularity="per_token"
        ),
    },
}

MORE_STEPS = {"swa": 1}
"""Lightning counts the epoch in which stochastic weight averaging estimates statistics as a step."""


class Parts(NamedTuple):
    """The parts of a fit.

    Attributes:
        module: The LightningModule.
        callback: The quantizing callback.
        others: Callbacks after it in the Trainer's list.
    """

    module: Task
    callback: QuantizationAwareTraining | PostTrainingQuantization
    others: list[Callback]


class Task(Lit):
    """Adam, a decreasing learning rate, and dropout whose random state is in the checkpoint.

    Lightning does not store random states; a resumed run has the same dropout only if they are restored.
    """

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net or Net(dropout=0.3))
        self._random: Tensor | None = None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint["random"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None


class Tokens(nn.Module):
    """A table, attention with LayerNorm and dropout, a BatchNorm, and a linear layer, on pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (4 * x.flatten(1)[:, ::4].clamp(-2, 2) + 8).long()
        return self.head(self.norm(self.block(self.table(tokens)).mean(1)))


class Manual(Task):
    """Steps its optimizer and its learning rate manually."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        return loss


class Averaged(Task):
    """Without its own learning rate schedule, because stochastic weight averaging has one."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Several(Task):
    """Two quantized networks."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Net(dropout=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + F.cross_entropy(self.other(batch[0]), batch[1])

    def _evaluate(self, stage: str, batch: Any) -> None:
        super()._evaluate(stage, batch)
        self.log(f"{stage}/other", F.cross_entropy(self.other(batch[0]), batch[1]))


def parts(kind: str, mode: str) -> Parts:
    """The parts of a fit of one of `KINDS`."""
    if kind == "ptq":
        calibration = loader(32)
        return Parts(
            Task(),
            PostTrainingQuantization(mode, calibration_batches=2, calibration_dataloader=calibration),
            [],
        )
    if kind in _UNCALIBRATED or kind in ("taught", "adapters"):
        return _of_tokens(kind, mode)
    module = {"manual": Manual, "swa": Averaged, "several": Several}.get(kind, Task)()
    callback = QuantizationAwareTraining(
        mode,
        start={"step": START},
        freeze_batchnorm={"step": FREEZE_BATCHNORM},
        freeze_observers={"step": FREEZE_OBSERVERS},
        module=["net", "other"] if kind == "several" else None,
    )
    others: dict[str, list[Callback]] = {
        "swa": [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)],
        "ema": [EMAWeightAveraging(decay=0.9)],
    }
    return Parts(module, callback, others.get(kind, []))


def _of_tokens(kind: str, mode: str) -> Parts:
    """A fit of a token network with a kind without calibration."""
    settings = _UNCALIBRATED.get(kind, _UNCALIBRATED["weight_only"])
    points = {"start": {"step": START}, "freeze_batchnorm": {"step": FREEZE_BATCHNORM}}
    network: nn.Module = Tokens()
    if kind == "adapters":
        from peft import LoraConfig, get_peft_model

        network = get_peft_model(network, LoraConfig(r=2, target_modules=["head", "linear1", "linear2"]))  # type: ignore[arg-type]
    others = [Distillation(features=["net.block"])] if kind == "taught" else []
    return Parts(Task(network), QuantizationAwareTraining(mode, **settings, **points), others)
