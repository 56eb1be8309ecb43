"""Effect of distillation from the float network on a language model, and its memory cost.

``python -m benchmarks.distillation bits TEXT``: a `CharTransformer` is trained on a text in float as in
`benchmarks.language`. It is then fine-tuned with fake-quantization for each grid, for a few steps on a few batches, as
with little data: from labels alone, and with each form of distillation. The teacher is the trained float network.
Reports the integer network's bits per character on the last 5 % of the text. Results are stored in a folder as they are
computed; an interrupted run continues where it stopped.

``python -m benchmarks.distillation memory``: the peak resident memory in a training step of a Llama with two blocks and
a large vocabulary, relative to before the step. Each row runs in its own process, with an allocator that returns freed
memory immediately. ``before`` is the loss in single operations on whole tensors.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.language import GRIDS, Seed, after_training, batches, prepared
from benchmarks.machine import describe
from benchmarks.memory import resident
from qat_lightning import Scheme, convert, prepare
from qat_lightning.demos import TextFileDataModule
from qat_lightning.graph.example import Example
from qat_lightning.recipes import distillation
from qat_lightning.recipes.blocks import repeated_blocks
from qat_lightning.recipes.distillation import DistillationSettings, Distiller, make_teacher
from qat_lightning.settings.recipe import Recipe

NOT = "no training"
WAYS: dict[str, dict[str, float]] = {
    NOT: {},
    "labels": {},
    "outputs": {"weight": 1.0, "task": 0.0},
    "outputs and labels": {"weight": 1.0, "task": 1.0},
    "blocks": {"features": 1.0, "task": 0.0},
    "blocks and labels": {"features": 1.0, "task": 1.0},
    "blocks x 10 and labels": {"features": 10.0, "task": 1.0},
    "blocks and outputs": {"features": 1.0, "weight": 1.0, "task": 0.0},
    "blocks x 10 and outputs": {"features": 10.0, "weight": 1.0, "task": 0.0},
    "blocks, outputs and labels": {"features": 1.0, "weight": 1.0, "task": 1.0},
}


def settings_of(way: dict[str, float], network: nn.Module, temperature: float) -> DistillationSettings:
    """Return the distillation settings of a row."""
    return DistillationSettings(
        temperature=temperature,
        weight=way.get("weight", 0.0),
        features=repeated_blocks(network) if "features" in way else (),
        feature_weight=way.get("features", 1.0),
    )


def trained(seed: Seed, start: nn.Module, grid: str, way: dict[str, float]) -> nn.Module:
    """Return the integer network after a few steps with fake-quantization."""
    options = seed.options
    network = prepared(start, seed.example, grid).train()
    teaching = None
    if way:
        settings = settings_of(way, start, options.temperature)
        teaching = Distiller(network, make_teacher(network, start.state_dict()), settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.taught_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.taught)
    for index in range(options.taught):
        tokens, targets = seed.given[index % options.few]
        optimizer.zero_grad()
        loss(network, teaching, tokens, targets, way.get("task", 1.0)).backward()
        optimizer.step()
        schedule.step()
    if teaching is not None:
        teaching.close()
    return convert(network.eval(), seed.example)


def loss(network: nn.Module, teaching: Distiller | None, tokens: Tensor, targets: Tensor, task: float) -> Tensor:
    """Return the loss of one batch."""
    if teaching is None:
        return F.cross_entropy(network(tokens).flatten(0, 1), targets.flatten())
    with teaching.features():
        scores = teaching.run(network.forward, tokens)
    added = teaching.take_loss()
    assert added is not None
    return added + task * F.cross_entropy(scores.flatten(0, 1), targets.flatten()) if task else added


def run_bits(options: argparse.Namespace) -> None:
    """Measure and print bits per character for each grid and form of distillation."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = TextFileDataModule(options.text, context=options.context, batch_size=options.batch)
    table = Table("grid", "learns from", "bits a character", "more than float", caption=describe())
    found: dict[tuple[str, str], list[float]] = {}
    floats = []
    for seed in [Seed(data, options, seed) for seed in options.seeds]:
        network = float_of(seed)
        floats.append(seed.bits("float", "QAT", lambda network=network: network))
        for grid in options.grids:
            for name in options.ways:
                column = f"{name}, {options.taught} steps on {options.few} batches, lr {options.taught_lr}"
                column += f", temperature {options.temperature}" if "weight" in WAYS[name] else ""
                bits = seed.bits(grid, column, _maker(seed, network, grid, name))
                found.setdefault((grid, name), []).append(bits)
    for (grid, name), values in found.items():
        more = [value - base for value, base in zip(values, floats, strict=True)]
        spread = f" ± {statistics.stdev(more):.3f}" if len(more) > 1 else ""
        table.add_row(grid, name, f"{statistics.mean(values):.3f}", f"{statistics.mean(more):+.3f}{spread}")
    Console(width=120).print(f"float: {statistics.mean(floats):.3f} bits", table)


def float_of(seed: Seed) -> nn.Module:
    """Return the trained float network, stored as in `benchmarks.language`."""
    options = seed.options
    start = seed.float_network(
        "start", seed.fresh, batches(seed.train_data, options.steps, options.batch, seed.seed), options.lr
    )
    return seed.float_network("float", lambda: copy.deepcopy(start), seed.given, options.tune_lr)


def _maker(seed: Seed, start: nn.Module, grid: str, name: str) -> Callable[[], nn.Module]:
    if name == NOT:
        return lambda: after_training(start, seed.example, grid, seed.given)
    return lambda: trained(seed, start, grid, WAYS[name])


MEMORY = ("no distillation", "outputs, before", "outputs", "blocks")


def plain_loss(student: Tensor, teacher: Tensor, temperature: float, class_axis: int, **_: Any) -> Tensor:
    """Compute `distillation_loss` with operations on whole tensors."""
    wanted, got = ((scores.float() / temperature).log_softmax(class_axis) for scores in (teacher, student))
    divergence = F.kl_div(got, wanted, reduction="none", log_target=True).sum(class_axis).mean()
    return divergence * temperature**2


def measure(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure a step's peak memory and time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=options.vocabulary, use_cache=False, **sizes))
    start = copy.deepcopy(network.state_dict())
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.length))
    scheme = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32, weight_observer="min_max")
    recipe = Recipe("eager", "x86", scheme, kind="weight_only", trained=True)
    blocks = repeated_blocks(network)
    student = prepare(network, Example((), {"input_ids": tokens[:1]}), recipe).train()
    teaching = None
    if row != "no distillation":
        weight, features = (0.0, blocks) if row == "blocks" else (1.0, ())
        teaching = Distiller(
            student, make_teacher(student, start), DistillationSettings(weight=weight, features=features)
        )
    if row == "outputs, before":
        distillation.distillation_loss = plain_loss  # type: ignore[assignment]

    def step() -> None:
        student.zero_grad(set_to_none=True)
        if teaching is None:
            student(input_ids=tokens, labels=tokens).loss.backward()
            return
        with teaching.features():
            outputs = teaching.run(student.forward, input_ids=tokens, labels=tokens)
        added = teaching.take_loss()
        total = outputs.loss + added
        del outputs
        total.backward()

    step()
    student.zero_grad(set_to_none=True)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.perf_counter()
    step()
    return {"peak": resident("VmHWM") - before, "seconds": time.perf_counter() - began}


def run_memory(options: argparse.Namespace) -> None:
    """Measure each row in its own process, and print the table."""
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    scores = options.batch * options.length * options.vocabulary * 4
    title = (
        f"vocabulary {options.vocabulary}, {options.batch} x {options.length} tokens, {scores / 1e6:.0f} MB of scores"
    )
    table = Table("distillation of", "peak MB", "times the scores", "seconds", title=title, caption=describe())
    for row in MEMORY:
        command = [sys.executable, "-m", "benchmarks.distillation", *sys.argv[1:], "--worker", row]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peak = found["peak"]
        table.add_row(row, f"{peak / 1e6:.0f}", f"{peak / scores:.1f}", f"{found['seconds']:.2f}")
    Console(width=110).print(table)


def main() -> None:
    """Run the requested measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    of_bits = parts.add_parser("bits", help="what it brings")
    of_bits.add_argument("text", type=Path)
    of_bits.add_argument("--out", type=Path, default=Path("distillation"), help="folder of figures and float networks")
    of_bits.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    of_bits.add_argument("--grids", nargs="+", choices=GRIDS, default=["w3", "w2"])
    of_bits.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    of_bits.add_argument("--temperature", type=float, default=2.0)
    for name, value in {"steps": 1000, "tune": 400, "batch": 32, "context": 64, "lr": 2e-3, "tune-lr": 5e-4}.items():
        of_bits.add_argument(f"--{name}", type=type(value), default=value)
    of_bits.add_argument("--taught", type=int, default=100, help="steps with fake-quant")
    of_bits.add_argument("--few", type=int, default=16, help="batches that these steps take in turn")
    of_bits.add_argument("--taught-lr", type=float, default=2e-4)
    of_memory = parts.add_parser("memory", help="what it costs")
    for name, value in {"vocabulary": 50_000, "batch": 8, "length": 128, "threads": 1}.items():
        of_memory.add_argument(f"--{name}", type=int, default=value)
    of_memory.add_argument("--worker", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "bits":
        run_bits(options)
    elif options.worker:
        print(json.dumps(measure(options.worker, options)), flush=True)
    else:
        run_memory(options)


if __name__ == "__main__":
    main()
