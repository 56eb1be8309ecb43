"""Bits chosen per layer compared with uniform bits: ``python -m benchmarks.mixed_bits``.

At an average of 5 stored bits per weight (a quarter of the way from the 4-bit to the 8-bit file size), compares the
choice of the integer program of `qat_lightning.sensitivity`, a greedy choice from the same measurements, and 5 bits
everywhere, which the file stores in 8. After calibration and, with ``--methods qat``, after equal training. Layers are
measured by the SQNR of the outputs on a few batches, without labels. Results are appended to a file; an interrupted
benchmark continues.

Data and networks are those of `benchmarks.efficientnet_lite` and `benchmarks.cifar10`, with the limitations stated
there.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import cifar10, efficientnet_lite
from benchmarks.machine import describe
from benchmarks.photos import PhotosDataModule, efficientnet_lite0, read_photos
from benchmarks.results import Results
from benchmarks.training import silent
from qat_lightning import Example, Recipe, Scheme, calibrate, convert, prepare, sensitivity
from qat_lightning.artifact import artifact_size_mb
from qat_lightning.sensitivity import BitChoice, BitLimits, bits_within

SHARE = 0.25
"""Fraction of the way from the 4-bit to the 8-bit file size: 5 bits per weight on average."""

UNIFORM = (8, 5, 4)
CHOSEN = ("milp", "greedy")
ROWS = (*(f"{bits} bits" for bits in UNIFORM), *CHOSEN)


@dataclass(frozen=True)
class Case:
    """A network with its data.

    Attributes:
        network: The float network.
        batches: Inputs for measuring layers, and for calibration when the file size is measured.
        accuracy: Returns the accuracy of a method with a scheme.
    """

    network: nn.Module
    batches: list[Tensor]
    accuracy: Callable[[str, Scheme], dict[str, float]]


def photos_case(options: argparse.Namespace) -> Case:
    """Return EfficientNet-Lite0 with one split of the photos."""
    photos, split = read_photos(options.data), options.seed
    data = PhotosDataModule(*photos, split, batch_size=16, crop=0)
    rows = efficientnet_lite.ROWS
    of_qat = rows["QAT, 4-bit weights, per channel"]

    def accuracy(method: str, scheme: Scheme) -> dict[str, float]:
        row = efficientnet_lite.Row("float") if method == "float" else efficientnet_lite.Row("ptq", scheme)
        row = replace(of_qat, scheme=scheme) if method == "qat" else row
        return efficientnet_lite.accuracy(row, split, photos)

    images = [data.train[index][0] for index in range(16 * options.batches)]
    return Case(efficientnet_lite0(), list(torch.stack(images).split(16)), accuracy)


def cifar_case(options: argparse.Namespace) -> Case:
    """Return ResNet-20, trained as in `benchmarks.cifar10` and stored in the same folder."""
    benchmark = cifar10.Benchmark(options)
    network = benchmark.float_network("resnet20", options.seed, branch=True).eval()
    benchmark.data.setup("fit")
    loader = iter(benchmark.data.train_dataloader())
    batches = [next(loader)[0] for _ in range(options.batches)]

    def accuracy(method: str, scheme: Scheme) -> dict[str, float]:
        if method == "qat":
            return benchmark._qat("resnet20", options.seed, scheme)
        if method == "ptq":
            return benchmark._ptq("resnet20", options.seed, scheme)
        return benchmark._test(network)

    return Case(network, batches, accuracy)


CASES = {"efficientnet_lite0": photos_case, "resnet20": cifar_case}


def choices(case: Case) -> dict[str, Any]:
    """Return the overrides of the integer program and of a greedy choice, for at most the same file size."""
    found = sensitivity(case.network, case.batches, prefix="net")
    eight, four = (size_mb(case, Scheme(weight_bits=bits)) for bits in (8, 4))
    limit = four + SHARE * (eight - four)
    chosen = bits_within(found, [4, 8], BitLimits(max_size_mb=limit))
    return {"milp": chosen.overrides, "greedy": greedy(chosen, eight, limit), "limit_mb": limit}


def greedy(chosen: BitChoice, whole: float, limit: float) -> dict[str, Any]:
    """From 8 bits, set the layer with the lowest loss per saved byte to 4 bits until the file is small enough."""
    size, overrides = whole, {}
    saves = {layer.name: layer.size[8] - layer.size[4] for layer in chosen.layers}
    for layer in sorted(chosen.layers, key=lambda row: (row.loss[4] - row.loss[8]) / max(saves[row.name], 1)):
        if size <= limit:
            break
        size -= saves[layer.name] / 1e6
        overrides[f"net.{layer.name}"] = {"weight_bits": 4}
    return overrides


def size_mb(case: Case, scheme: Scheme) -> float:
    """Return the file size of the calibrated network."""
    inner = {glob.removeprefix("net."): fields for glob, fields in (scheme.overrides or {}).items()}
    recipe = Recipe("fx", "x86", replace(scheme, overrides=inner), kind="static")
    prepared = prepare(copy.deepcopy(case.network), Example((case.batches[0],)), recipe)
    calibrate(prepared, case.batches)
    return artifact_size_mb(convert(prepared, Example((case.batches[0],))))


def measure(case: Case, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the accuracy of each method, and the file size, for each choice."""
    results = Results(options.results)
    told = {"network": options.network, "seed": options.seed, "batches": options.batches}
    found: Mapping[str, Any] = results.once({**told, "choice": "bits", "share": SHARE}, lambda: choices(case))
    schemes = {f"{bits} bits": Scheme(weight_bits=bits) for bits in UNIFORM}
    schemes |= {name: Scheme(overrides=found[name]) for name in CHOSEN}
    schemes = {name: scheme for name, scheme in schemes.items() if name in options.rows}
    fp32 = results.once({**told, "method": "float"}, lambda: case.accuracy("float", Scheme()))
    figures = {"fp32": {"float": fp32["accuracy"]}}
    for name, scheme in schemes.items():
        settings = {**told, "scheme": scheme.to_dict()}
        size = results.once({**settings, "method": "size"}, lambda scheme=scheme: {"mb": size_mb(case, scheme)})
        figures[name] = {"mb": size["mb"]}
        for method in options.methods:
            measured = results.once(
                {**settings, "method": method},
                lambda method=method, scheme=scheme: case.accuracy(method, scheme),
            )
            figures[name][method] = measured["accuracy"]
    return figures


def make_table(figures: Mapping[str, Mapping[str, float]], options: argparse.Namespace) -> Table:
    """Return one row per choice: file size, and accuracy after each method."""
    fp32 = figures["fp32"]["float"]
    table = Table(title=f"{options.network}, seed {options.seed}: fp32 {100 * fp32:.2f} %", caption=describe())
    for column in ("weights", "file in MB", *(f"{method}, minus fp32" for method in options.methods)):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, row in figures.items():
        if name != "fp32":
            after = [f"{100 * row[m]:.2f} ({100 * (row[m] - fp32):+.2f})" for m in options.methods]
            table.add_row(name, f"{row['mb']:.3f}", *after)
    return table


def main() -> None:
    """Compute missing results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(CASES), required=True)
    parser.add_argument("--data", type=Path, required=True, help="photos, or CIFAR-10 for resnet20")
    parser.add_argument("--results", type=Path, default=Path("mixed_bits.jsonl"))
    parser.add_argument("--methods", nargs="+", default=["ptq"], choices=["ptq", "qat"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seed", type=int, default=0, help="of the training; of the photos the split")
    parser.add_argument("--batches", type=int, default=2, help="on which layers are measured")
    parser.add_argument("--work", default="cifar10_runs", help="folder for the float networks of resnet20")
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of each branch of resnet20")
    parser.add_argument("--base-lr", type=float, default=4e-3)
    parser.add_argument("--base-precision", default="32-true")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--calibration-batches", type=int, default=8)
    options = parser.parse_args()
    silent()
    Console(width=110).print(make_table(measure(CASES[options.network](options), options), options))


if __name__ == "__main__":
    main()
