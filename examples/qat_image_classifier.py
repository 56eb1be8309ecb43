"""Train an image classifier to int8 with one callback: python qat_image_classifier.py."""

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining, evaluate_variants, load_quantized


class Classifier(LightningModule):
    """Replace the network and the data by yours; this class needs no changes for quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 2),
        )

    def training_step(self, batch, batch_idx):
        """Compute the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch, batch_idx):
        """Log the accuracy."""
        images, labels = batch
        self.log("test/acc", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """Create the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    """Fit, test float, fake-quant and int8, save and load."""
    seed_everything(0)
    images = torch.randn(512, 1, 12, 12)
    labels = (images[..., :6].mean((1, 2, 3)) > images[..., 6:].mean((1, 2, 3))).long()
    data = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

    qat = QuantizationAwareTraining(mode="fx", backend="x86", start=0.3, freeze_observers=0.7)
    model = Classifier()
    trainer = Trainer(max_epochs=5, callbacks=[qat], logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, data)
    evaluate_variants(trainer, model, dataloaders=data)  # accuracy, size and latency of each variant

    qat.save("classifier.int8")
    network = load_quantized("classifier.int8")
    print("classes:", network(images[:8]).argmax(1).tolist())


if __name__ == "__main__":
    main()
