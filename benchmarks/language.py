"""Bits per character of a small language model, by grid: ``python -m benchmarks.language TEXT``.

A `CharTransformer` with a million parameters is trained on a text in float: the first 90 % for training, 5 % each for
validation and testing. From there, training continues with fake-quantization for each grid (QAT) and in float, on the
same batches with the same optimizer. Post-training quantization (PTQ) quantizes the final float network, calibrated on
8 batches for fixed ranges. Reports bits per character of the integer network on the last 5 %. The other tool is
torchao's QAT flow, for the one grid that both support; its fake-quantized network is measured. Steps are timed
afterwards, alternating.

Results are stored in a folder as they are computed; an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.machine import describe
from benchmarks.results import Results
from qat_lightning import Example, Recipe, Scheme, calibrate, convert, prepare, quantize
from qat_lightning.demos import CharTransformer, TextFileDataModule
from qat_lightning.demos.data.text_file import Windows

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "weight_group_size": 32}
GRIDS: dict[str, tuple[str, Scheme]] = {
    "w8a8 static": ("static", Scheme()),
    "w8a8 dynamic": ("dynamic", Scheme()),
    "w4 in groups, a8 per token": ("dynamic", Scheme(weight_bits=4, activation_granularity="per_token", **GROUPS)),
    "w4": ("weight_only", Scheme(weight_bits=4)),
    "w3": ("weight_only", Scheme(weight_bits=3)),
    "w2": ("weight_only", Scheme(weight_bits=2)),
}
PEER = "w4 in groups, a8 per token"

Batch = tuple[Tensor, Tensor]


def batches(data: Windows, count: int, size: int, seed: int) -> list[Batch]:
    """Return ``count`` batches in a random order given by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [data.__getitems__(torch.randint(len(data), (size,), generator=generator).tolist()) for _ in range(count)]


def step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Run one training step."""
    optimizer.zero_grad()
    cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
    optimizer.step()


def train(network: nn.Module, given: Sequence[Batch], lr: float) -> nn.Module:
    """Train with AdamW and a cosine learning rate that decays to 0."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(given))
    for batch in given:
        step(network, optimizer, batch)
        schedule.step()
    return network.eval()


@torch.no_grad()
def bits(network: nn.Module, data: Windows, size: int) -> float:
    """Return the bits per character over a whole set."""
    total = 0.0
    for start in range(0, len(data), size):
        tokens, targets = data.__getitems__(list(range(start, min(start + size, len(data)))))
        total += float(cross_entropy(network(tokens).flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / data.targets.numel() / math.log(2)


def prepared(network: nn.Module, example: Example, grid: str, mode: str = "fx") -> nn.Module:
    """Return a copy with fake-quantization of a grid."""
    kind, scheme = GRIDS[grid]
    recipe = Recipe(mode, "x86", scheme, kind="qat" if kind == "static" else kind, trained=kind != "static")  # type: ignore[arg-type]
    return prepare(copy.deepcopy(network), example, recipe)


def after_training(network: nn.Module, example: Example, grid: str, given: Sequence[Batch]) -> nn.Module:
    """Return the integer network of a float one, without training."""
    kind, scheme = GRIDS[grid]
    recipe = Recipe("fx", "x86", scheme, kind=kind)  # type: ignore[arg-type]
    if kind != "static":
        return quantize(network, example, recipe)
    ready = prepare(copy.deepcopy(network), example, recipe)
    calibrate(ready, [tokens for tokens, _ in given[:8]])
    return convert(ready, example)


def peer(network: nn.Module) -> nn.Module:
    """Return a copy with torchao's fake-quantization of the same grid."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=GROUPS["weight_group_size"])
    network = copy.deepcopy(network)
    quantize_(network, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return network


class Seed:
    """All measurements with one seed.

    Args:
        data: The text.
        options: The command-line options.
        seed: Seed of the weights and of the order of batches.
    """

    def __init__(self, data: TextFileDataModule, options: argparse.Namespace, seed: int) -> None:
        assert isinstance(data.splits.train, Windows)
        assert isinstance(data.splits.test, Windows)
        self.options, self.seed = options, seed
        self.train_data, self.test_data = data.splits.train, data.splits.test
        self.given = batches(self.train_data, options.tune, options.batch, seed + 1000)
        self.example = Example((self.given[0][0],))
        self.results = Results(options.out / "results.jsonl")

    def float_network(self, name: str, begin: Callable[[], nn.Module], given: Sequence[Batch], lr: float) -> nn.Module:
        """Return a trained float network, stored in a file."""
        file = self.options.out / f"{name}-{self.seed}.pt"
        network = begin()
        if file.exists():
            network.load_state_dict(torch.load(file))
            return network.eval()
        train(network, given, lr)
        torch.save(network.state_dict(), file)
        return network

    def fresh(self) -> nn.Module:
        """Return an untrained network."""
        torch.manual_seed(self.seed)
        return CharTransformer(context=self.options.context)

    def bits(self, grid: str, column: str, network: Callable[[], nn.Module]) -> float:
        """Return the bits per character of a network, which is created only if the folder has no result for it."""
        keys = ("steps", "tune", "batch", "context", "lr", "tune_lr")
        settings = {key: getattr(self.options, key) for key in keys} | {"grid": grid, "is": column, "seed": self.seed}
        measured = self.results.once(settings, lambda: {"bits": bits(network(), self.test_data, self.options.batch)})
        return measured["bits"]

    def run(self) -> dict[str, dict[str, float]]:
        """Return the bits per character of each grid after PTQ and after QAT."""
        options = self.options
        first = batches(self.train_data, options.steps, options.batch, self.seed)
        start = self.float_network("start", self.fresh, first, options.lr)
        tuned = self.float_network("float", lambda: copy.deepcopy(start), self.given, options.tune_lr)
        found = {"float": {"QAT": self.bits("float", "QAT", lambda: tuned)}}
        for grid in options.grids:
            found[grid] = {
                "PTQ": self.bits(grid, "PTQ", lambda grid=grid: after_training(tuned, self.example, grid, self.given)),
                "QAT": self.bits(grid, "QAT", lambda grid=grid: self.trained(start, grid)),
            }
        if PEER in options.grids:
            name = f"{PEER}: torchao's QATConfig"
            found[name] = {
                "QAT": self.bits(name, "QAT", lambda: train(peer(start), self.given, options.tune_lr)),
            }
        return found

    def trained(self, start: nn.Module, grid: str) -> nn.Module:
        """Return the integer network after training with fake-quantization."""
        return convert(train(prepared(start, self.example, grid), self.given, self.options.tune_lr), self.example)

    def seconds(self, rounds: int) -> dict[str, float]:
        """Return the seconds of a step: medians of alternating rounds."""
        networks = {"float": self.fresh()}
        networks |= {grid: prepared(self.fresh(), self.example, grid) for grid in self.options.grids}
        if PEER in self.options.grids:
            networks[f"{PEER}: torchao's QATConfig"] = peer(self.fresh())
        optimizers = {name: torch.optim.AdamW(network.train().parameters()) for name, network in networks.items()}
        taken: dict[str, list[float]] = {name: [] for name in networks}
        for index in range(rounds + 1):
            for name, network in networks.items():
                began = time.perf_counter()
                step(network, optimizers[name], self.given[index % len(self.given)])
                if index:  # the first warms up
                    taken[name].append(time.perf_counter() - began)
        return {name: statistics.median(values) for name, values in taken.items()}


def table(runs: list[dict[str, dict[str, float]]], seconds: dict[str, float]) -> Table:
    """Return means and standard deviations over seeds, and the share of PTQ's loss that QAT recovers."""
    columns = ("grid", "PTQ, bits", "QAT, bits", "PTQ loses", "won back", "a step, times float's")
    made = Table(*columns)

    def values(grid: str, column: str) -> list[float]:
        return [run[grid][column] for run in runs if column in run[grid]]

    def shown(given: list[float]) -> str:
        spread = f" ± {statistics.stdev(given):.3f}" if len(given) > 1 else ""
        return f"{statistics.mean(given):.3f}{spread}" if given else ""

    base = statistics.mean(values("float", "QAT"))
    for grid in runs[0]:
        after, trained = values(grid, "PTQ"), values(grid, "QAT")
        lost = statistics.mean(after) - base if after else 0.0
        back = f"{(statistics.mean(after) - statistics.mean(trained)) / lost:.0%}" if lost > 0 else ""
        cost = f"{seconds[grid] / seconds['float']:.2f}" if grid in seconds else ""
        made.add_row(grid, shown(after), shown(trained), f"{lost:+.3f}" if after else "", back, cost)
    return made


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("language"), help="folder of the figures and float networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of float, before")
    parser.add_argument("--tune", type=int, default=400, help="steps of each grid, and of float, from there")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    parser.add_argument("--rounds", type=int, default=15, help="of timing a step; 0 does not")
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    data = TextFileDataModule(options.text, context=options.context, batch_size=options.batch)
    seeds = [Seed(data, options, seed) for seed in options.seeds]
    runs = [seed.run() for seed in seeds]
    seconds = seeds[0].seconds(options.rounds) if options.rounds else {}
    Console(width=140).print(table(runs, seconds))
    print(f"{len(options.seeds)} seeds, {options.steps} + {options.tune} steps of {options.batch} x {options.context}")
    print(describe())


if __name__ == "__main__":
    main()
