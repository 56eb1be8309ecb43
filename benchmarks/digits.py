"""Int8 accuracy compared with a float run of equal length: ``python -m benchmarks.digits [--seeds 0 1 2] [--modes …]``.

For each seed, one float run, and for each mode one quantization-aware run with the same epochs, optimizer and data
order, on scikit-learn's digits with the network of ``python train.py``. Reports the accuracy on the test images.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from qat_lightning import QuantizationAwareTraining
from qat_lightning.demos import ClassificationModule, DigitsDataModule, SmallMobileNet


def accuracy(seed: int, epochs: int, mode: str | None, backend: str) -> tuple[float, float]:
    """Train one network.

    Returns:
        Test accuracy (of the int8 network if a mode is given), and int8's agreement with fake-quant (1 for float).
    """
    seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=64, seed=seed)
    net = SmallMobileNet(num_classes=10, in_channels=1, width=16, strides=[1, 2], blocks=2, expansion=3)
    model = ClassificationModule(net, num_classes=10)
    callbacks = []
    if mode is not None:
        callbacks = [QuantizationAwareTraining(mode, backend, start=0.3, freeze_observers=0.7, freeze_batchnorm=0.7)]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return metrics["test/acc"], callbacks[0].fidelity["agreement"] if callbacks else 1.0


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["eager", "fx", "pt2e"])
    parser.add_argument("--backend", default="x86")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    floats = [accuracy(seed, options.epochs, None, "")[0] for seed in options.seeds]
    table = Table(
        title=f"digits, small MobileNet, {options.epochs} epochs, test accuracy in %, backend {options.backend}",
        caption=describe(),
    )
    for column in ("run", *(f"seed {seed}" for seed in options.seeds), "mean", "mean minus float", "int8 = fake-quant"):
        table.add_column(column, justify="left" if column == "run" else "right")
    table.add_row("float", *(f"{100 * value:.2f}" for value in floats), f"{100 * statistics.mean(floats):.2f}", "", "")
    for mode in options.modes:
        runs = [accuracy(seed, options.epochs, mode, options.backend) for seed in options.seeds]
        values = [value for value, _ in runs]
        table.add_row(
            f"int8, {mode}",
            *(f"{100 * value:.2f}" for value in values),
            f"{100 * statistics.mean(values):.2f}",
            f"{100 * (statistics.mean(values) - statistics.mean(floats)):+.2f}",
            f"{100 * min(agreement for _, agreement in runs):.2f} %",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
