"""Overhead of `QuantizationMonitor`: ``python -m benchmarks.monitor_cost [--mode fx] [--network mobilenetv2]``.

One fit in which every second step is measured, so that measured and other steps alternate. The extra time of a measured
step, divided by the interval, is the monitor's overhead.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.callback_cost import Classifier
from benchmarks.machine import describe
from benchmarks.networks import NETWORKS
from qat_lightning import QuantizationAwareTraining, QuantizationMonitor


class Begin(Callback):
    """Records when each batch begins; must be the first callback."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time."""
        self.at = time.perf_counter()


class End(Callback):
    """Records the duration of each batch with all callbacks; must be the last callback."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.seconds: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the duration."""
        self.seconds.append(time.perf_counter() - self.begin.at)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="fx")
    parser.add_argument("--network", default="resnet18", choices=sorted(NETWORKS))
    parser.add_argument("--logger", default="wandb", choices=["wandb", "csv"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    images = torch.randn(options.batch * options.steps, 3, options.size, options.size)
    loader = DataLoader(TensorDataset(images, torch.randint(0, 1000, (len(images),))), batch_size=options.batch)
    begin = Begin()
    end = End(begin)
    qat = QuantizationAwareTraining(
        options.mode, "x86", example_inputs=images[:2], freeze_batchnorm=None, convert_on_fit_end=False
    )
    monitor = QuantizationMonitor(every_n_steps=2, samples=options.samples)
    with tempfile.TemporaryDirectory() as folder:
        logger: Logger = CSVLogger(folder)
        if options.logger == "wandb":
            logger = WandbLogger(project="monitor-cost", save_dir=folder, offline=True)
            logger.experiment  # noqa: B018 (starts the W&B run before timing)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=logger,
            callbacks=[begin, qat, monitor, end],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(NETWORKS[options.network]()), loader)
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    measured, others = end.seconds[4::2], end.seconds[5::2]
    extra = statistics.median(measured) - statistics.median(others)
    default = QuantizationMonitor().every_n_steps
    table = Table(
        title=f"{options.network}, {options.size}x{options.size}, batch {options.batch}, mode {options.mode}, "
        f"{options.logger}, {len(monitor.layers)} rows",
        caption=describe(),
    )
    for column in ("step", "measured step", "extra", f"share at every_n_steps={default}"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{statistics.median(others) * 1e3:.0f} ms",
        f"{statistics.median(measured) * 1e3:.0f} ms",
        f"{extra / statistics.median(others):.0%} of a step",
        f"{extra / statistics.median(others) / default:.2%}",
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
