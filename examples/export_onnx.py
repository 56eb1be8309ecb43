"""Train to int8 and write a verified ONNX file: python export_onnx.py. Needs pip install 'qat-lightning[onnx]'."""

import onnxruntime
import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining, QuantizedModelExport


class Classifier(LightningModule):
    """Your LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 100, 2))

    def training_step(self, batch, batch_idx):
        """Compute the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        """Create the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.005)


def main() -> None:
    """Fit, export, and run the file as another program would."""
    seed_everything(0)
    images = torch.randn(256, 1, 12, 12)
    data = DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=32)

    qat = QuantizationAwareTraining(start=0.3, freeze_observers=0.7)
    export = QuantizedModelExport(["onnx"], dirpath="artifacts", dataloader=data)
    trainer = Trainer(
        max_epochs=3, callbacks=[qat, export], logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(Classifier(), data)

    result = export.results["onnx"]
    print(f"{result.path}: {result.agreement:.1%} of predictions agree with fake-quantization")
    session = onnxruntime.InferenceSession(str(result.path))
    (scores,) = session.run(None, {session.get_inputs()[0].name: images[:4].numpy()})
    print("classes:", scores.argmax(1).tolist())


if __name__ == "__main__":
    main()
