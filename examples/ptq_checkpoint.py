"""Quantize a trained checkpoint without training it: python ptq_checkpoint.py."""

import torch
from lightning import LightningModule, Trainer, seed_everything
from rich import print as show
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import PostTrainingQuantization, coverage_table

QUIET = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}


class Classifier(LightningModule):
    """Your LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 64, 2)

    def forward(self, images):
        """Run both parts; module="." quantizes everything that forward runs."""
        return self.head(self.net(images))

    def training_step(self, batch, batch_idx):
        """Compute the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        """Log the accuracy."""
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        """Create the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.005)


def main() -> None:
    """Train a float checkpoint (in place of yours), then calibrate and convert it."""
    seed_everything(0)
    images = torch.randn(512, 1, 12, 12)
    data = DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=32)
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(Classifier(), data)
    trainer.save_checkpoint("float.ckpt")

    ptq = PostTrainingQuantization(module=".", calibration_batches=8, calibration_dataloader=data)
    model = Classifier.load_from_checkpoint("float.ckpt")
    Trainer(callbacks=[ptq], **QUIET).test(model, data)  # calibrates, converts, and tests int8
    show(coverage_table(ptq.quantized.coverage))
    ptq.save("classifier.int8")


if __name__ == "__main__":
    main()
