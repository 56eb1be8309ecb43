"""Accuracy of int8 for each task of train.py, after PTQ and QAT: ``python -m benchmarks.tasks [--tasks …]``.

For each task and seed one float run of ``train.py``; from it static PTQ and QAT, with per-channel and per-tensor
weights, in the mode that ``auto`` chooses; and, as controls, more float training, as long as QAT, and PTQ after it. A
row has the model's own test metric, the file size, the speedup over float in process in PyTorch with one sample, and
the speedup of the fastest file of ``--formats``.

Tasks on your own data need ``--data TASK=PATH``; without ``--tasks`` all tasks with data are run. Finished runs are
stored in the file of results and not repeated; a run interrupted by ``--minutes`` resumes from its last checkpoint. The
exit status is 1 while runs are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.results import Results
from benchmarks.within import run_within
from qat_lightning import load_quantized
from qat_lightning.run.metric import ModelMetric

ROOT = Path(__file__).parents[1]
PATH = "data.datamodule.path="


@dataclass(frozen=True)
class Task:
    """A task of train.py, and the length of its trainings.

    Attributes:
        words: Overrides of train.py.
        epochs: Epochs of the float run, and of QAT from it.
        rates: Learning rates of the two.
        own_data: Whether ``--data`` must give the path of its data.
    """

    words: tuple[str, ...]
    epochs: tuple[int, int]
    rates: tuple[float, float] = (0.002, 0.0005)
    own_data: bool = False


_VOID = ("data.num_classes=11", "data.ignore_index=11")  # CamVid's 11 classes; other pixels are ignored
TASKS = {
    "digits": Task(("data=digits", "model=small_mobilenet"), (20, 10)),
    "digit_masks": Task(("data=digit_masks", "model=unet"), (30, 10)),
    "cifar10": Task(("data=cifar10", "model=resnet20"), (20, 6), own_data=True),
    "text": Task(("data=text_file", "model=char_transformer"), (2, 1), (0.001, 0.0002), own_data=True),
    "camvid_unet": Task(
        (
            *("data=segmentation_folder", "model=unet", *_VOID),
            *("data.datamodule.images='{split}'", "data.datamodule.masks='{split}annot'"),
        ),
        (30, 8),
        own_data=True,
    ),
    "camvid_deeplab": Task(
        (
            *("data=segmentation_folder", "model=deeplab_mobilenet", *_VOID),
            *("data.datamodule.images='{split}'", "data.datamodule.masks='{split}annot'"),
        ),
        (30, 8),
        own_data=True,
    ),
    "detection": Task(("experiment=detection",), (60, 15), own_data=True),
}
METHODS = {
    "float": ("method=float",),
    "float, trained on": ("method=finetune",),
    "ptq, per channel": ("method=ptq",),
    "ptq, per tensor": ("method=ptq", "scheme=per_tensor"),
    "trained on, then ptq, per channel": ("method=ptq", "method.post_training=false"),
    "trained on, then ptq, per tensor": ("method=ptq", "method.post_training=false", "scheme=per_tensor"),
    "qat, per channel": ("method=qat", "quantization.start=0.0"),
    "qat, per tensor": ("method=qat", "quantization.start=0.0", "scheme=per_tensor"),
}


class TimeIsUpError(Exception):
    """The limit of ``--minutes`` was reached."""


class RunFailedError(Exception):
    """A run of train.py ended with an error."""


@dataclass
class Runs:
    """Runs of train.py, stored in a folder.

    Args:
        folder: The folder.
        options: The command-line options.
    """

    folder: Path
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.results = Results(self.folder / "results.jsonl")
        minutes = self.options.minutes
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def figures(self, task: str, method: str, seed: int) -> dict[str, Any]:
        """Return the figures of one run, which is trained now if it is not stored.

        Raises:
            TimeIsUpError: The time limit is reached.
            RunFailedError: The run failed; it is tried again next time.
        """
        words = self.words(task, method, seed)
        settings = {"task": task, "method": method, "seed": seed, "words": words}
        return self.results.once(settings, lambda: self._train(words, "-".join((task, *method.split(", "), str(seed)))))

    def words(self, task: str, method: str, seed: int) -> list[str]:
        """Return the overrides of a run, without those that only give paths."""
        asked = TASKS[task]
        given = asked.words
        if asked.own_data:
            given = (*given, f"{PATH}{self.options.data[task]}")
        float_epochs, epochs = asked.epochs if self.options.epochs is None else self.options.epochs
        words = [
            "trainer=cpu",
            "logger=none",
            "callbacks.rich_progress_bar=null",
            "mode=auto",
            f"seed={seed}",
            "baseline=start",
            *given,
        ]
        words += [f"baseline.float.trainer.max_epochs={float_epochs}", f"trainer.max_epochs={epochs}"]
        words += [f"baseline.float.model.module.lr={asked.rates[0]}", f"model.module.lr={asked.rates[1]}"]
        words += METHODS[method]
        if not method.startswith("float") and self.options.formats:
            words.append(f"export=[{','.join(self.options.formats)}]")
        return [*words, *self.options.override]

    def _train(self, words: Sequence[str], name: str) -> dict[str, Any]:
        out = (self.folder / name.replace(" ", "_")).absolute()
        kept = [f"baseline.folder={(self.folder / 'baselines').absolute()}", f"hydra.run.dir={out}", "resume=true"]
        left = None if self.end is None else self.end - time.monotonic()
        if left is not None and left <= 0:
            raise TimeIsUpError
        paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(ROOT / "train.py"), *words, *kept]
        try:
            done = run_within(command, left, {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"})
        except subprocess.TimeoutExpired:
            raise TimeIsUpError from None
        out.mkdir(parents=True, exist_ok=True)
        (out / "printed.log").write_text(done.stdout + done.stderr)  # including warnings, such as of an inexact file
        result = json.loads((out / "result.json").read_text()) if (out / "result.json").is_file() else {}
        if result.get("status") != "completed":
            said = result.get("error") or {"message": " ".join(done.stderr.split())[-300:]}
            raise RunFailedError(f"{name}: {said['message']}")
        return self._summary(result["metrics"], out)

    def _summary(self, metrics: Mapping[str, float], out: Path) -> dict[str, Any]:
        """Return the figures of a run for the table."""
        config = OmegaConf.load(out / ".hydra" / "config.yaml")
        stated = ModelMetric.of(config)  # type: ignore[arg-type]
        assert stated is not None, "every model of train.py states its metric"
        variant = "int8" if f"int8/{stated.logged('test')}" in metrics else "float"
        found: dict[str, Any] = {
            "metric": stated.name,
            "goal": stated.mode,
            "score": metrics[f"{variant}/{stated.logged('test')}"],
            "size_mb": metrics.get(f"{variant}/size_mb"),
            "latency_ms": metrics.get(f"{variant}/latency_ms"),
            "speedup": metrics.get("speedup"),
            "spread": metrics.get("latency_spread"),
            "files": {
                name: {
                    "score": metrics.get(f"{name}/{stated.logged('test')}"),
                    **{key: metrics.get(f"{name}/{key}") for key in ("latency_ms", "size_mb", "speedup")},
                }
                for name in self.options.formats
                if variant == "int8"
            },
        }
        model = out / "model.int8"
        if variant == "int8" and model.is_file():
            found["mode"] = load_quantized(model).recipe.mode
        return found


def summarize(task: str, by_method: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per method of a task: means of the metric and medians of times over seeds.

    Args:
        task: Name of the task.
        by_method: Results of `Runs.figures`, one mapping per seed; all methods have the same seeds.

    Returns:
        The rows. ``won_back`` is the recovered share of the loss of PTQ with the same granularity; None if that loss is
        below 0.1 % of the float network's score, which is noise.
    """
    rows = []
    means = {method: statistics.fmean(run["score"] for run in runs) for method, runs in by_method.items()}
    for method, runs in by_method.items():
        sign = 1 if runs[0]["goal"] == "max" else -1
        row: dict[str, Any] = {"task": task, "method": method, "metric": runs[0]["metric"], "score": means[method]}
        row["modes"] = sorted({run["mode"] for run in runs if "mode" in run})
        row["size_mb"] = _median(run["size_mb"] for run in runs)
        row["speedup"] = _median(run["speedup"] for run in runs)
        if method != "float" and "float" in means:
            row["drop"] = sign * (means["float"] - means[method])
        ptq = method.replace("qat", "ptq")
        if method.startswith("qat") and {"float", ptq} <= means.keys():
            lost = sign * (means["float"] - means[ptq])
            worth = lost > 0.001 * abs(means["float"])
            row["won_back"] = 1 - row["drop"] / lost if worth else None
        row |= _fastest_file(runs)
        rows.append(row)
    return rows


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _fastest_file(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the format with the largest median speedup over the float network."""
    speeds = {
        name: speed
        for name in runs[0]["files"]
        if (speed := _median(run["files"].get(name, {}).get("speedup") for run in runs)) is not None
    }
    if not speeds:
        return {"file": None, "file_speedup": None}
    fastest = max(speeds, key=lambda name: speeds[name])
    return {"file": fastest, "file_speedup": speeds[fastest]}


def make_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one line per row."""
    table = Table(title="tasks of train.py", caption=describe())
    words = ("task", "network", "mode", "seeds")
    for column in (*words, "metric", "minus float", "won back", "file", "in process", "fastest file"):
        table.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        # ``drop`` is positive for a worse metric, whatever its direction
        table.add_row(
            row["task"],
            row["method"],
            ", ".join(row["modes"]),
            ", ".join(map(str, row["seeds"])),
            f"{row['metric']} {row['score']:.4f}",
            _shown(-row["drop"] if "drop" in row else None, "{:+.4f}"),
            _shown(row.get("won_back"), "{:.0%}"),
            _shown(row["size_mb"], "{:.3f} MB"),
            _shown(row["speedup"], "{:.2f} x"),
            f"{row['file']} {row['file_speedup']:.2f} x" if row["file"] else "",
        )
    return table


def _shown(value: float | None, layout: str) -> str:
    return "" if value is None else layout.format(value)


def of_common_seeds(
    found: Mapping[str, Mapping[int, dict[str, Any]]],
) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """Return the figures of each method for the seeds that every method with figures has, and those seeds.

    Example:
        >>> of_common_seeds({"float": {0: {"score": 1.0}, 1: {"score": 0.5}}, "ptq, per tensor": {1: {"score": 0.25}}})
        ({'float': [{'score': 0.5}], 'ptq, per tensor': [{'score': 0.25}]}, [1])
    """
    having = {method: by_seed for method, by_seed in found.items() if by_seed}
    seeds = [seed for seed in next(iter(having.values()), {}) if all(seed in own for own in having.values())]
    return {method: [own[seed] for seed in seeds] for method, own in having.items() if seeds}, seeds


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: A task has no data.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), help="some only")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--data", nargs="+", default=[], metavar="TASK=PATH", help="where the data of a task is")
    add("--formats", nargs="*", default=["onnx", "openvino"], help="files to test and time")
    add("--epochs", type=int, nargs=2, metavar=("FLOAT", "QAT"), help="instead of those of each task")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides of train.py, of every run")
    add("--minutes", type=float, help="stop after this time; the same command goes on")
    add("--out", type=Path, default=Path("outputs/tasks"), help="folder of runs and results")
    add("--json", action="store_true", help="print rows as JSON instead of a table")
    options = parser.parse_args(words)
    options.data = dict(word.partition("=")[::2] for word in options.data)
    if unknown := [name for name in options.data if name not in TASKS]:
        parser.error(f"--data {unknown[0]}=…: there is no such task; there are {', '.join(TASKS)}")
    without = [name for name, task in TASKS.items() if task.own_data and name not in options.data]
    if lacking := [name for name in options.tasks or [] if name in without]:
        parser.error(f"{lacking[0]} needs its data: --data {lacking[0]}=PATH")
    options.tasks = options.tasks or [name for name in TASKS if name not in without]
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Compute missing runs, and print the table of all stored ones.

    Returns:
        The exit status: 1 if runs are missing.
    """
    options = parse(words)
    runs = Runs(options.out, options)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for task in options.tasks:
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for method in options.methods:
            for seed in options.seeds:
                try:
                    found.setdefault(method, {})[seed] = runs.figures(task, method, seed)
                except TimeIsUpError:
                    missing.append(f"{task}, {method}, seed {seed}: the time was up")
                except RunFailedError as error:
                    missing.append(str(error))
        figures, seeds = of_common_seeds(found)
        rows += [row | {"seeds": seeds} for row in summarize(task, figures)]
    if options.json:
        print(json.dumps({"machine": describe(), "seeds": options.seeds, "rows": rows, "missing": missing}))
    else:
        Console(width=150).print(make_table(rows))
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
