"""Overhead of the callback itself: ``python -m benchmarks.callback_cost [--mode fx] [--rounds 7]``.

Compares fits with the callback and fits of the same prepared network without it, alternating, with the same Trainer.
Both compute fake-quantization, so the ratio is the overhead of the callback's hooks. Only batches are timed, not
preparation and conversion, which happen once per fit.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import describe
from benchmarks.networks import ResNet18
from qat_lightning import QuantizationAwareTraining
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe


class Classifier(LightningModule):
    """A network and cross-entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Compute the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Clock(Callback):
    """Measures the seconds of a fit's batches, without the first few."""

    def __init__(self, skip: int = 3) -> None:
        self.skip = skip
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == self.skip:
            self._begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._begin


def fit(net: nn.Module, callbacks: list[Callback], steps: int, size: int, batch: int) -> float:
    """Return the seconds of a fit's batches."""
    torch.manual_seed(0)
    images = torch.randn(batch * steps, 3, size, size)
    loader = DataLoader(TensorDataset(images, torch.randint(0, 1000, (len(images),))), batch_size=batch)
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        # First and last callback, so that all hooks of the other are measured.
        callbacks=[clock, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), loader)
    return clock.seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="fx")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    example = Example((torch.randn(2, 3, options.size, options.size),))
    recipe = Recipe(options.mode, "x86")
    prepared = get_mode(options.mode).prepare(ResNet18(), example, recipe)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    shape = options.steps, options.size, options.batch
    without, with_callback = [], []
    for _ in range(options.rounds):
        without.append(fit(copy.deepcopy(prepared), [], *shape))
        qat = QuantizationAwareTraining(options.mode, "x86", example_inputs=example.args, convert_on_fit_end=False)
        with_callback.append(fit(ResNet18(), [qat], *shape))
    table = Table(
        title=f"ResNet-18, {options.size}x{options.size}, batch {options.batch}, mode {options.mode}",
        caption=describe(),
    )
    for column in ("fit", "median s", "fastest", "slowest", "ratio of medians", "ratio of fastest"):
        table.add_column(column, justify="left" if column == "fit" else "right")
    for name, values in (("prepared network, no callback", without), ("with the callback", with_callback)):
        table.add_row(
            name,
            f"{statistics.median(values):.3f}",
            f"{min(values):.3f}",
            f"{max(values):.3f}",
            f"{statistics.median(values) / statistics.median(without):.3f}",
            f"{min(values) / min(without):.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
