"""The LightningModule for language models: next-token prediction."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity

from qat_lightning.demos.classification import ClassificationModule


class LanguageModule(ClassificationModule):
    """Trains a network to predict the next token, with AdamW and cross-entropy.

    Logs `train/loss`, and the loss (nats per token), the perplexity and the accuracy of `val/` and `test/`.

    Args:
        net: Maps integers of shape (batch, tokens) to scores of shape (batch, tokens, num_classes).
        num_classes: Number of different tokens.
        settings: See `ClassificationModule`.
    """

    def __init__(self, net: nn.Module, num_classes: int, **settings: Any) -> None:
        super().__init__(net, num_classes, **settings)
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        scores = self(batch[0])
        loss = cross_entropy(scores.flatten(0, 1), batch[1].flatten(), label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self._measure("val", self.val_perplexity, self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate a test batch."""
        self._measure("test", self.test_perplexity, self.test_acc, batch)

    def _measure(self, stage: str, perplexity: Perplexity, accuracy: Any, batch: tuple[Tensor, Tensor]) -> None:
        scores, targets = self(batch[0]), batch[1]
        loss = cross_entropy(scores.flatten(0, 1), targets.flatten())
        perplexity(scores.float(), targets)
        accuracy(scores.flatten(0, 1), targets.flatten())
        size = len(targets)
        self.log(f"{stage}/perplexity", perplexity, batch_size=size, prog_bar=stage == "val")
        self.log(f"{stage}/loss", loss, batch_size=size, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=size)
