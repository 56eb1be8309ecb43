"""Methods and bits on CIFAR-10: ``python -m benchmarks.cifar10 --data PATH [--networks …] [--seeds …] [--bits …]``.

For each network and seed one float network is trained. From it, float training and quantization-aware training continue
for the same number of epochs, with the same optimizer and the same order of data. Post-training quantization starts
from the end of the float training, so all results have equal training. Results are appended to a file, and float
networks are stored beside it: an interrupted benchmark continues where it stopped.

PATH is anything that `Cifar10DataModule` reads. Results on a copy re-encoded as JPEG are not CIFAR-10 results: say so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.results import Results
from benchmarks.training import silent, trainer
from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.demos import Cifar10DataModule, ClassificationModule, ResNet20, SmallMobileNet

NETWORKS = {
    "resnet20": lambda: ResNet20(num_classes=10),
    "small_mobilenet": lambda: SmallMobileNet(num_classes=10, in_channels=3, width=16, strides=[2, 2, 1]),
}


class Benchmark:
    """Runs the trainings, each once.

    Args:
        options: The command-line options.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.work)
        self.results = Results(self.folder / "cifar10.jsonl")
        self.data = Cifar10DataModule(path=options.data, batch_size=options.batch_size)

    def float_network(self, network: str, seed: int, *, branch: bool) -> nn.Module:
        """Return the common float network, or with ``branch`` the end of float training; trained if not stored."""
        o = self.options
        base = f"{network}-{seed}-{o.base_epochs}x{o.base_lr:g}-{o.base_precision}"
        file = self.folder / (f"{base}+{o.epochs}x{o.lr:g}.pt" if branch else f"{base}.pt")
        net = NETWORKS[network]()
        if file.exists():
            net.load_state_dict(torch.load(file))
            return net
        if branch:
            net = self.float_network(network, seed, branch=False)
            self._fit(net, seed, o.epochs, o.lr)
        else:
            seed_everything(seed, verbose=False)
            net = NETWORKS[network]()
            self._fit(net, seed, o.base_epochs, o.base_lr, precision=o.base_precision)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
        return net

    def accuracy(self, network: str, seed: int, method: str, bits: str = "") -> float:
        """Return the test accuracy of one run, from the stored results if available."""
        o = self.options
        shared = ("base_epochs", "base_lr", "base_precision", "epochs", "lr", "batch_size")
        settings = {"network": network, "seed": seed, "method": method, **{name: getattr(o, name) for name in shared}}
        if method == "float":
            figures = self.results.once(settings, lambda: self._test(self.float_network(network, seed, branch=True)))
        elif method == "ptq":
            settings |= {"bits": bits, "calibration_batches": o.calibration_batches}
            figures = self.results.once(settings, lambda: self._ptq(network, seed, scheme(bits)))
        else:
            chosen = scheme(bits, o.learned_step)
            settings |= {"bits": bits, "learned_step": chosen.learned_step}
            figures = self.results.once(settings, lambda: self._qat(network, seed, chosen))
        return figures["accuracy"]

    def _ptq(self, network: str, seed: int, scheme: Scheme) -> dict[str, float]:
        ptq = PostTrainingQuantization("fx", "x86", scheme=scheme, calibration_batches=self.options.calibration_batches)
        return self._test(self.float_network(network, seed, branch=True), ptq)

    def _qat(self, network: str, seed: int, scheme: Scheme) -> dict[str, float]:
        qat = QuantizationAwareTraining("fx", "x86", scheme=scheme, freeze_observers=0.7, freeze_batchnorm=0.7)
        net = self.float_network(network, seed, branch=False)
        model = self._fit(net, seed, self.options.epochs, self.options.lr, qat)
        return self._test(model, qat)

    def _fit(
        self, net: nn.Module, seed: int, epochs: int, lr: float, *callbacks: Callback, **settings: Any
    ) -> LightningModule:
        seed_everything(seed, verbose=False)
        self.data.seed = seed
        model = ClassificationModule(net.to(memory_format=torch.channels_last), num_classes=10, lr=lr)
        trainer(epochs, list(callbacks), **settings).fit(model, datamodule=self.data)
        return model

    def _test(self, net: nn.Module, *callbacks: Callback) -> dict[str, float]:
        model = net if isinstance(net, LightningModule) else ClassificationModule(net, num_classes=10)
        (metrics,) = trainer(0, list(callbacks)).test(model, datamodule=self.data, verbose=False)
        return {"accuracy": metrics["test/acc"]}


def print_table(benchmark: Benchmark, network: str) -> None:
    """Print a table of methods and bits for one network; missing results are computed."""
    o = benchmark.options
    floats = {seed: benchmark.accuracy(network, seed, "float") for seed in o.seeds}
    title = f"{network}, {o.base_epochs}+{o.epochs} epochs, test accuracy in %, mode fx, backend x86"
    table = Table(title=title, caption=describe())
    for column in ("run", *(f"seed {seed}" for seed in o.seeds), "mean", "mean minus float"):
        table.add_column(column, justify="left" if column == "run" else "right")
    table.add_row("float", *(f"{100 * value:.2f}" for value in floats.values()), f"{100 * mean(floats.values()):.2f}")
    for bits in o.bits:
        # All seeds where int8 should equal float; one seed is enough elsewhere.
        seeds = o.seeds if bits == "8/8" else o.seeds[:1]
        for method in o.methods:
            values = {seed: benchmark.accuracy(network, seed, method, bits) for seed in seeds}
            table.add_row(
                f"{method.upper()} {bits}",
                *(f"{100 * values[seed]:.2f}" if seed in values else "" for seed in o.seeds),
                f"{100 * mean(values.values()):.2f}",
                f"{100 * mean(value - floats[seed] for seed, value in values.items()):+.2f}",
            )
    Console(width=110).print(table)


def scheme(bits: str, learned_step: str = "none") -> Scheme:
    """Return the scheme for ``"weight bits/activation bits"``; scales are learned for few bits."""
    weights, activations = map(int, bits.split("/"))
    learned_step = "none" if (weights, activations) == (8, 8) else learned_step
    return Scheme(weight_bits=weights, activation_bits=activations, learned_step=learned_step)


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or tar archive with CIFAR-10")
    parser.add_argument("--work", default="cifar10_runs", help="folder for results and float networks")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of 8/8; other bits take the first")
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "4/4"], help="of weights/activations")
    parser.add_argument("--methods", nargs="+", default=["qat", "ptq"], choices=["qat", "ptq"])
    parser.add_argument("--base-epochs", type=int, default=3, help="of float training before the runs branch")
    parser.add_argument("--epochs", type=int, default=1, help="of each branch")
    parser.add_argument("--base-lr", type=float, default=4e-3)
    parser.add_argument(
        "--base-precision", default="32-true", help="of the float base: bf16-mixed is faster on some CPUs"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="of the branches")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learned-step", default="lsq", help="of Scheme, in training with fewer bits than 8/8")
    parser.add_argument("--calibration-batches", type=int, default=8)
    return parser


def main() -> None:
    """Compute missing results, and print the table."""
    options = parser().parse_args()
    silent()
    benchmark = Benchmark(options)
    for network in options.networks:
        print_table(benchmark, network)


if __name__ == "__main__":
    main()
