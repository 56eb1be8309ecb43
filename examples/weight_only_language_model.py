"""Fine-tune a language model for 4-bit weights distilled from float: python weight_only_language_model.py."""

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from qat_lightning import Distillation, QuantizationAwareTraining, Scheme
from qat_lightning.demos.networks import CharTransformer

W4 = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32)


class Language(LightningModule):
    """Predicts the next token; replace the network by yours, such as one of Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CharTransformer(num_tokens=64, context=16, dim=64, depth=2, heads=4)

    def training_step(self, batch, batch_idx):
        """Compute the loss."""
        loss = nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """Create the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train in float, then for 4 bits."""
    seed_everything(0)
    starts = torch.randint(0, 64, (512, 1))
    data = DataLoader((starts + torch.arange(17)) % 64, batch_size=32, shuffle=True)  # counting
    model = Language()
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    Trainer(max_epochs=5, **quiet).fit(model, data)

    qat = QuantizationAwareTraining(mode="eager", kind="weight_only", scheme=W4)
    teacher = Distillation(features="blocks", task_weight=1.0)
    Trainer(max_epochs=2, callbacks=[qat, teacher], **quiet).fit(model, data)

    with torch.no_grad():
        scores = qat.quantized(torch.arange(5, 15)[None])
    print("after 14 comes", scores[0, -1].argmax().item())
    qat.save("language.int8")


if __name__ == "__main__":
    main()
