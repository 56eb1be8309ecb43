"""Sentence embeddings of a trained encoder in every kind: ``python -m benchmarks.minilm --model FOLDER --text FILE``.

The folder is one that transformers loads (all-MiniLM-L6-v2), the file any text. Lines of it are drawn with a fixed
seed: some to calibrate with, others to measure on. A figure of accuracy is the cosine of a line's embedding (mean of
the tokens, normalized) to the float network's. Results are kept in a file as they come; what it has is not measured
again.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
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
    """One int8 network: the recipe, and whether its speed is measured too."""

    name: str
    recipe: Recipe
    timed: bool = False


def _rows() -> list[Row]:
    rows = [
        Row("dynamic w8a8", Recipe("eager", "x86", kind="dynamic"), True),
        Row("dynamic w8a8, per token", Recipe("eager", "x86", TOKEN, kind="dynamic"), True),
    ]
    rows += [Row(f"static w8a8, {mode}", Recipe(mode, "x86", kind="static"), True) for mode in ("eager", "fx", "pt2e")]
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
    """The network without its pooling, from tensors to a tensor."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden state: (lines, tokens, width)."""
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


Batch = tuple[Tensor, Tensor]


def batches(folder: str, text: Path) -> tuple[list[Batch], list[Batch]]:
    """To calibrate with, and to measure on: ids and masks of lines, padded to one length."""
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
    """One normalized embedding a line."""
    found = []
    with torch.no_grad():
        for ids, mask in measured:
            hidden = network(ids, mask)
            weights = mask.unsqueeze(-1).float()
            found.append((hidden * weights).sum(1) / weights.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def make(row: Row, network: nn.Module, calibration: list[Batch]) -> Any:
    """The int8 network, from a copy."""
    network, example = copy.deepcopy(network), Example(calibration[0])
    if reworks(row.recipe):
        print(f"{row.name}. {' '.join(Reworking(network, example, row.recipe).notes)}", flush=True)
    if row.recipe.kind != "static":
        return quantize(network, example, row.recipe)
    prepared = prepare(network, example, row.recipe)
    calibrate(prepared, calibration)
    return convert(prepared, example)


def _accuracy(int8: Any, expected: Tensor, measured: list[Batch]) -> dict[str, float]:
    cosines = (embed(int8, measured) * expected).sum(1)
    return {
        "mean": float(cosines.mean()),
        "least": float(cosines.min()),
        "mb": artifact_size_mb(int8),
        "float_layers": sum(not row.quantized for row in int8.coverage),
    }


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
        """Tensors in, a tensor out."""
        given = dict(zip(self.names, (arg.numpy() for arg in args), strict=True))
        return torch.from_numpy(self.session.run(None, given)[0])


def float_onnx(network: nn.Module, example: Batch, folder: Path) -> Path:
    """The float network as a file of ONNX."""
    path = folder / "float.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    program = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(path))
    return path


def _peers(network: nn.Module, example: Batch, folder: Path) -> dict[str, Path]:
    """ONNX Runtime by itself: the float file, and what its own ``quantize_dynamic`` makes of it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = float_onnx(network, example, folder)
    found = {"fp32, ONNX Runtime": source}
    quant_pre_process(str(source), str(folder / "ready.onnx"), skip_symbolic_shape=True)
    for per_channel in (False, True):
        path = folder / f"peer{int(per_channel)}.onnx"
        quantize_dynamic(str(folder / "ready.onnx"), str(path), weight_type=QuantType.QInt8, per_channel=per_channel)
        found[f"ONNX Runtime's quantize_dynamic{', per channel' if per_channel else ''}"] = path
    return found


def _exported(row: Row, int8: Any, folder: Path) -> Path | str:
    """Our file of ONNX; the reason in words if there is none."""
    path = folder / f"{row.name.replace(' ', '_')}.onnx"
    chosen = get_format("onnx")
    why = chosen.refusal(row.recipe)
    if why:
        return why
    chosen.write(Source(int8, int8.example), path)
    return path


def measure(args: argparse.Namespace, folder: Path) -> None:
    """All that the file of results does not have yet."""
    results, network = Results(args.results), Encoder(args.model).eval()
    calibration, measured = batches(args.model, args.text)
    expected = embed(network, measured)
    for row in _rows():
        if not args.rows or any(part in row.name for part in args.rows):

            def accuracy(row: Row = row) -> dict[str, float]:
                return _accuracy(make(row, network, calibration), expected, measured)

            results.once({"row": row.name, "what": "accuracy"}, accuracy)
    if args.latency:
        _latency(results, network, calibration, measured, expected, folder, args.rounds)


def _latency(
    results: Results,
    network: nn.Module,
    calibration: list[Batch],
    measured: list[Batch],
    expected: Tensor,
    folder: Path,
    rounds: int,
) -> None:
    """All networks in turn, in this process, so that what slows the machine slows them all."""
    runs: dict[str, nn.Module] = {"fp32, torch": network}
    for row in [row for row in _rows() if row.timed]:
        runs[row.name] = int8 = make(row, network, calibration)
        path = _exported(row, int8, folder)
        print(f"{row.name} as ONNX: {path}", flush=True)
        if isinstance(path, Path):
            runs[f"{row.name}, our ONNX file"] = _Session(path)
            _file(results, f"{row.name}, our ONNX file", path, expected, measured, runs)
    for name, path in _peers(network, calibration[0], folder).items():
        runs[name] = _Session(path)
        _file(results, name, path, expected, measured, runs)
    for batch in (1, 32):
        ids, mask = (torch.cat([pair[n] for pair in measured])[:batch] for n in (0, 1))

        def latency(call: Batch = (ids, mask)) -> dict[str, float]:
            found = latency_interleaved(runs, call, rounds=rounds, block_time=0.05)
            return {name: one.median_ms for name, one in found.items()}

        results.once({"what": "latency", "batch": batch, "threads": torch.get_num_threads()}, latency)


def _file(
    results: Results, name: str, path: Path, expected: Tensor, measured: list[Batch], runs: dict[str, nn.Module]
) -> None:
    def accuracy() -> dict[str, float]:
        cosines = (embed(runs[name], measured) * expected).sum(1)
        return {"mean": float(cosines.mean()), "least": float(cosines.min()), "mb": path.stat().st_size / 1e6}

    results.once({"row": name, "what": "accuracy"}, accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder that transformers loads")
    parser.add_argument("--text", required=True, type=Path, help="a file of text")
    parser.add_argument("--results", type=Path, default=Path("minilm.jsonl"))
    parser.add_argument("--rows", nargs="*", help="parts of names of rows; all by default")
    parser.add_argument("--latency", action="store_true", help="measure latency as well")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(given, Path(kept))
