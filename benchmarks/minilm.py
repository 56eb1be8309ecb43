"""Sentence embeddings of a trained encoder in every kind: ``python -m benchmarks.minilm --model FOLDER --text FILE``.

The folder is one that transformers loads (all-MiniLM-L6-v2), the file any text. Lines are drawn with a fixed seed, some
for calibration and others for measuring. Accuracy is the cosine similarity between a line's embedding (normalized mean
over tokens) and the float network's. Results are stored in a file as they are computed, and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.results import Results
from qat_lightning.artifact import artifact_size_mb
from qat_lightning.export import get_format
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from qat_lightning.measure.metrics import latency_interleaved
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.plain import convert, prepare, quantize
from qat_lightning.recipes.reworking import Reworking, reworks
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

LINES, CALIBRATION, LENGTH, BATCH = 500, 64, 32, 20

TOKEN = Scheme(activation_granularity="per_token")
W4 = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32)
W4A8 = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32, activation_granularity="per_token")


@dataclass(frozen=True)
class Row:
    """One int8 network: its recipe, and whether to measure its speed."""

    name: str
    recipe: Recipe
    timed: bool = False


def _rows() -> list[Row]:
    rows = [
        Row("dynamic w8a8", Recipe("eager", "x86", kind="dynamic"), True),
        Row("dynamic w8a8, per token", Recipe("eager", "x86", TOKEN, kind="dynamic"), True),
    ]
    rows += [Row(f"static w8a8, {mode}", Recipe(mode, "x86", kind="static"), True) for mode in ("eager", "fx", "pt2e")]
    rows.append(Row("static w8a8, fx, onednn", Recipe("fx", "onednn", kind="static"), True))
    for name, mode, scheme, kind in (
        ("dynamic w8a8", "eager", Scheme(), "dynamic"),
        ("static w8a8, fx", "fx", Scheme(), "static"),
        ("weight-only w4 in groups of 32", "eager", W4, "weight_only"),
        ("w4 in groups of 32, a8 per token", "eager", W4A8, "dynamic"),
    ):
        if scheme.weight_bits == 4:
            rows.append(Row(name, Recipe(mode, "x86", scheme, kind=kind), True))
        if kind != "weight_only":
            rows.append(Row(f"{name}, SmoothQuant 0.5", Recipe(mode, "x86", scheme, kind=kind, smoothquant=0.5)))
        rows.append(Row(f"{name}, rotation", Recipe(mode, "x86", scheme, kind=kind, rotation=True)))
    return rows


class Encoder(nn.Module):
    """The network without pooling, with tensor inputs and output."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden state: (lines, tokens, width)."""
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


Batch = tuple[Tensor, Tensor]


def batches(folder: str, text: Path) -> tuple[list[Batch], list[Batch]]:
    """Return calibration and test batches: ids and masks of lines, padded to one length."""
    from transformers import AutoTokenizer

    lines = sorted({line.strip() for line in text.read_text().splitlines() if len(line.strip()) >= 20})
    chosen = random.Random(0).sample(lines, CALIBRATION + LINES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(chosen, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    ids, masks = found["input_ids"], found["attention_mask"]
    first = list(zip(ids[:CALIBRATION].split(16), masks[:CALIBRATION].split(16), strict=True))
    both = list(zip(ids[CALIBRATION:].split(BATCH), masks[CALIBRATION:].split(BATCH), strict=True))
    return first, both


def embed(network: Callable[..., Any], measured: Iterable[Batch]) -> Tensor:
    """Return one normalized embedding per line."""
    found = []
    with torch.no_grad():
        for ids, mask in measured:
            hidden = network(ids, mask)
            weights = mask.unsqueeze(-1).float()
            found.append((hidden * weights).sum(1) / weights.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def make(row: Row, network: nn.Module, calibration: list[Batch]) -> Any:
    """Return the int8 network, made from a copy."""
    network, example = copy.deepcopy(network), Example(calibration[0])
    if reworks(row.recipe):
        print(f"{row.name}. {' '.join(Reworking(network, example, row.recipe).notes)}", flush=True)
    if row.recipe.kind != "static":
        return quantize(network, example, row.recipe)
    prepared = prepare(network, example, row.recipe)
    calibrate(prepared, calibration)
    return convert(prepared, example)


class _Session(nn.Module):
    """An ONNX file, called like the network."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *args: Tensor) -> Tensor:
        """Run the file."""
        given = dict(zip(self.names, (arg.numpy() for arg in args), strict=True))
        return torch.from_numpy(self.session.run(None, given)[0])


def float_onnx(network: nn.Module, example: Batch, path: Path) -> None:
    """Write the float network to an ONNX file."""
    shapes = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    program = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(path))


_PEERS = {
    "ONNX Runtime, fp32": "float",
    "ONNX Runtime, its quantize_dynamic": "tensor",
    "ONNX Runtime, its quantize_dynamic per channel": "channel",
}


def _peer(network: nn.Module, example: Batch, folder: Path, which: str) -> Path:
    """Write files for ONNX Runtime without this library: float, or by its own ``quantize_dynamic``."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, ready, path = folder / "float.onnx", folder / "ready.onnx", folder / f"{which}.onnx"
    if not source.exists():
        float_onnx(network, example, source)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    if which != "float":
        quantize_dynamic(str(ready), str(path), weight_type=QuantType.QInt8, per_channel=which == "channel")
    return path


def measure(args: argparse.Namespace, results: Results, folder: Path) -> None:
    """Compute everything that the file of results does not contain."""
    network = Encoder(args.model).eval()
    calibration, measured = batches(args.model, args.text)
    job = _Job(results, network, calibration, measured, embed(network, measured), folder, args.rounds)
    for row in _rows():
        if not args.rows or any(part in row.name for part in args.rows):
            made = functools.cache(functools.partial(make, row, network, calibration))
            results.once({"row": row.name, "what": "accuracy"}, functools.partial(job.accuracy, made))
            if args.latency and row.timed:
                job.latency(row.name, made)
                if not get_format("onnx").refusal(row.recipe):
                    job.file(f"{row.name}, our ONNX file", functools.partial(job.export, row, made))
    if args.sources:
        job.sources(Recipe("fx", "x86", kind="static"))
    if args.peers:
        for name, path in _PEERS.items():
            job.file(name, functools.partial(_peer, network, calibration[0], folder, path))


@dataclass(frozen=True)
class _Job:
    """The data and settings shared by all measurements."""

    results: Results
    network: nn.Module
    calibration: list[Batch]
    measured: list[Batch]
    expected: Tensor
    folder: Path
    rounds: int

    def accuracy(self, made: Callable[[], Any]) -> dict[str, float]:
        """Measure the difference of an int8 network to float, and its size."""
        int8 = made()
        cosines = (embed(int8, self.measured) * self.expected).sum(1)
        floats = sum(not row.quantized for row in int8.coverage)
        return {**_cosines(cosines), "mb": artifact_size_mb(int8), "float_layers": floats}

    def file(self, name: str, write: Callable[[], Path]) -> None:
        """Measure the same for an ONNX file, and its latency."""
        path = functools.cache(write)
        session = functools.cache(lambda: _Session(path()))

        def accuracy() -> dict[str, float]:
            cosines = (embed(session(), self.measured) * self.expected).sum(1)
            return {**_cosines(cosines), "mb": path().stat().st_size / 1e6}

        self.results.once({"row": name, "what": "accuracy"}, accuracy)
        self.latency(name, session)

    def export(self, row: Row, made: Callable[[], Any]) -> Path:
        """Write our ONNX file."""
        path, int8 = self.folder / f"{row.name.replace(' ', '_')}.onnx", made()
        get_format("onnx").write(Source(int8, int8.example), path)
        return path

    def latency(self, name: str, made: Callable[[], Any]) -> None:
        """Time a network alternating with the float one, so that disturbances affect both."""
        for batch in (1, 32):
            ids, mask = (torch.cat([pair[n] for pair in self.measured])[:batch] for n in (0, 1))

            def latency(call: Batch = (ids, mask)) -> dict[str, float]:
                runs = {"fp32": self.network, "other": made()}
                found = latency_interleaved(runs, call, rounds=self.rounds, block_time=0.05)
                ours, spread = found["other"], max(one.spread for one in found.values())
                return {"ms": ours.median_ms, "fp32_ms": found["fp32"].median_ms, "spread": spread}

            settings = {"row": name, "what": "latency", "batch": batch, "threads": torch.get_num_threads()}
            self.results.once(settings, latency)

    def sources(self, recipe: Recipe) -> None:
        """Measure fake-quantization, and the same without the rounding of the outputs of each kind of layer."""
        prepared: Any = prepare(copy.deepcopy(self.network), Example(self.calibration[0]), recipe)
        calibrate(prepared, self.calibration)
        modules = dict(prepared.eval().named_modules())
        kinds: dict[str, list[FakeQuantize]] = {"nothing": []}
        for node in prepared.graph.find_nodes(op="call_module"):
            rounding = modules[str(node.target)]
            if isinstance(rounding, FakeQuantize):
                source = str(getattr(node.args[0].target, "__name__", node.args[0].target))
                kinds.setdefault(re.sub(r"\d+", "*", source), []).append(rounding)
        for kind, roundings in kinds.items():
            for rounding in roundings:
                rounding.enable_fake_quant(False)
            settings = {"row": f"static w8a8, fx, fake-quantized but for the outputs of {kind}", "what": "accuracy"}
            self.results.once(settings, lambda: _cosines((embed(prepared, self.measured) * self.expected).sum(1)))
            for rounding in roundings:
                rounding.enable_fake_quant()


def _cosines(cosines: Tensor) -> dict[str, float]:
    return {"mean": float(cosines.mean()), "least": float(cosines.min())}


def table(results: Results) -> str:
    """Format the results as Markdown; speeds are relative to the float network in the same run."""
    rows: dict[str, dict[str, str]] = {}
    for row in results.rows:
        cells, figures = rows.setdefault(row["settings"]["row"], {}), row["figures"]
        if row["settings"]["what"] == "accuracy":
            cells |= {key: f"{figures[key]:.4f}" for key in ("mean", "least")}
            cells |= {"mb": f"{figures['mb']:.1f}"} if "mb" in figures else {}
        else:
            batch = str(row["settings"]["batch"])
            cells[batch] = f"{figures['fp32_ms'] / figures['ms']:.2f} ({figures['ms']:.0f} ms)"
    columns = {"mean": "cosine, mean", "least": "least", "mb": "file, MB", "1": "batch 1", "32": "batch 32"}
    lines = ["| network | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells.get(key, "") for key in columns) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder that transformers loads")
    parser.add_argument("--text", required=True, type=Path, help="a file of text")
    parser.add_argument("--results", type=Path, default=Path("minilm.jsonl"))
    parser.add_argument("--rows", nargs="*", help="parts of names of rows; all by default")
    parser.add_argument("--latency", action="store_true", help="measure latency as well")
    parser.add_argument("--sources", action="store_true", help="measure which outputs lose most by rounding in fx")
    parser.add_argument("--peers", action="store_true", help="measure ONNX Runtime by itself")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept_results = Results(given.results)
        measure(given, kept_results, Path(kept))
        print(table(kept_results))
