"""Recipes for few bits, one at a time, on digits: ``python -m benchmarks.few_bits [--seeds 0 1 2] [--rows …]``.

For each seed one float network is trained. Every row starts from it: post-training quantization to 2- and 3-bit
weights, or three epochs of training with 3-bit weights and activations. It takes minutes where `benchmarks.recipes`
takes hours, but digits are much easier than photos: results may not transfer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, seed_everything
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.results import Results
from benchmarks.training import silent, trainer
from qat_lightning import AdaRound, PostTrainingQuantization, QuantizationAwareTraining, Scheme, WeightOscillations
from qat_lightning.demos import ClassificationModule, DigitsDataModule, SmallMobileNet


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        method: ``"float"``, ``"ptq"`` or ``"qat"``.
        scheme: Bits and observers.
        against: The row that it is compared with.
        arguments: Additional arguments of the quantizing callback.
        callbacks: Creates additional callbacks.
    """

    method: Literal["float", "ptq", "qat"]
    scheme: Scheme = field(default_factory=Scheme)
    against: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list


W2, W3, W3A3 = Scheme(weight_bits=2), Scheme(weight_bits=3), Scheme(weight_bits=3, activation_bits=3)
LAYERS, BLOCKS = AdaRound(iterations=500), AdaRound(iterations=500, blocks="auto")

ROWS = {"float": Row("float")}
for _name, _scheme in (("2-bit weights", W2), ("3-bit weights", W3)):
    _plain = f"PTQ, {_name}"
    ROWS |= {
        _plain: Row("ptq", _scheme),
        f"{_plain}, sequential MSE": Row("ptq", _scheme, _plain, {"sequential_mse": True}),
        f"{_plain}, AdaRound": Row("ptq", _scheme, _plain, {"adaround": LAYERS}),
        f"{_plain}, AdaRound by blocks": Row("ptq", _scheme, _plain, {"adaround": BLOCKS}),
        f"{_plain}, both": Row("ptq", _scheme, _plain, {"sequential_mse": True, "adaround": BLOCKS}),
    }
QAT = "QAT, 3-bit weights and activations"
ROWS |= {
    QAT: Row("qat", W3A3),
    f"{QAT}, ranges of least error": Row("qat", replace(W3A3, activation_observer="histogram_mse"), QAT),
    f"{QAT}, ranges by percentile": Row(
        "qat", replace(W3A3, activation_observer="percentile", activation_percentile=99.0), QAT
    ),
    f"{QAT}, sequential MSE": Row("qat", W3A3, QAT, {"sequential_mse_batches": 8}),
    f"{QAT}, weights frozen": Row("qat", W3A3, QAT, callbacks=lambda: [WeightOscillations()]),
    f"{QAT}, weights dampened": Row(
        "qat", W3A3, QAT, callbacks=lambda: [WeightOscillations(freezing=None, dampening=(0.0, 0.1))]
    ),
}


def network() -> SmallMobileNet:
    """Return the network of ``python train.py``."""
    return SmallMobileNet(num_classes=10, in_channels=1, width=16, strides=[1, 2], blocks=2, expansion=3)


def trained(seed: int, epochs: int) -> dict[str, Any]:
    """Train a float network and return its weights."""
    seed_everything(seed, verbose=False)
    module = ClassificationModule(network(), num_classes=10)
    trainer(epochs).fit(module, datamodule=DigitsDataModule(batch_size=64, seed=seed))
    return module.state_dict()


def accuracy(row: Row, seed: int, weights: dict[str, Any]) -> dict[str, float]:
    """Return the test accuracy of a row's int8 network; for a simulated scheme, of fake-quant."""
    seed_everything(seed, verbose=False)
    module = ClassificationModule(network(), num_classes=10, lr=5e-4)
    module.load_state_dict(weights)
    data = DigitsDataModule(batch_size=64, seed=seed)
    callbacks: list[Callback] = []
    if row.method == "ptq":
        callbacks = [PostTrainingQuantization(scheme=row.scheme, calibration_batches=8, **row.arguments)]
    elif row.method == "qat":
        callbacks = [
            QuantizationAwareTraining(scheme=row.scheme, freeze_observers=0.7, freeze_batchnorm=0.7, **row.arguments),
            *row.callbacks(),
        ]
    run = trainer(3, callbacks)
    if row.method == "qat":
        run.fit(module, datamodule=data)
    (metrics,) = run.test(module, datamodule=data, verbose=False)
    return {"accuracy": metrics["test/acc"]}


def main() -> None:
    """Compute missing results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20, help="of the float network")
    parser.add_argument("--work", type=Path, default=Path("few_bits"), help="folder of results and float networks")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="some only")
    options = parser.parse_args()
    silent()
    results = Results(options.work / "few_bits.jsonl")
    figures: dict[str, list[float]] = {}
    for seed in options.seeds:
        file = options.work / f"{options.epochs}-{seed}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(trained(seed, options.epochs), file)
        weights = torch.load(file)
        for name, row in ROWS.items():
            if name not in {*options.rows, *(ROWS[other].against for other in options.rows)}:
                continue
            settings = {"row": name, "seed": seed, "epochs": options.epochs, "scheme": row.scheme.to_dict()}
            settings["arguments"] = {key: repr(value) for key, value in row.arguments.items()}
            found = results.once(settings, lambda row=row, seed=seed, weights=weights: accuracy(row, seed, weights))
            figures.setdefault(name, []).append(found["accuracy"])
    table = Table(title="digits, small MobileNet, few bits, test accuracy in %", caption=describe())
    for column in ("network", *(f"seed {seed}" for seed in options.seeds), "mean", "gain"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, values in figures.items():
        mean, against = statistics.mean(values), ROWS[name].against
        gain = f"{100 * (mean - statistics.mean(figures[against])):+.2f}" if against else ""
        table.add_row(name, *(f"{100 * value:.2f}" for value in values), f"{100 * mean:.2f}", gain)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
