"""File sizes of a language model with kinds that need no calibration: ``python -m benchmarks.compressed_files``.

An untrained `CharTransformer` with a million parameters in ``mode="fx"``. Each file is written and loaded again, and
its SQNR relative to the integer network is measured on one sequence. Prints the table of ``docs/export.md``.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.demos.networks.char_transformer import CharTransformer
from qat_lightning.export import get_format, save_torchao
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

GROUPS: Any = {"weight_bits": 4, "weight_granularity": "per_group", "weight_group_size": 32}
SCHEMES: dict[str, tuple[Any, Any]] = {
    "`weight_only`, 8 bits": ("weight_only", {}),
    "`weight_only`, 4 bits in groups of 32": ("weight_only", GROUPS),
    "`dynamic` by tensor and channel": ("dynamic", {}),
    "`dynamic`, `8da4w`": ("dynamic", {"activation_granularity": "per_token", **GROUPS}),
}
FORMATS = ("onnx", "openvino", "executorch")


def size_mb(folder: Path) -> float:
    """Return the size of all files in a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def cell(quantized: QuantizedNetwork, name: str) -> str:
    """Return size and SQNR of one format; a dash if it does not support the network."""
    form = get_format(name)
    if form.refusal(quantized.recipe):
        return "–"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{form.suffix}"
        form.write(Source(quantized, quantized.example), path)
        one = quantized.example.args[0][:1]
        found = sqnr_db(quantized(one), form.load(path)([one])[0])
        return f"{size_mb(Path(folder)):.2f} MB, {found:.0f} dB"


def safetensors(quantized: QuantizedNetwork) -> str:
    """Return the file size in torchao's layout."""
    if quantized.recipe.kind == "dynamic" and quantized.recipe.scheme.activation_granularity != "per_token":
        return "–"
    with tempfile.TemporaryDirectory() as folder:
        return f"{size_mb(save_torchao(quantized, folder)):.2f} MB"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    network, example = CharTransformer(context=64).eval(), Example((torch.randint(0, 256, (4, 64)),))
    weights = sum(parameter.numel() for parameter in network.parameters()) * 4 / 1e6
    print(f"| float: {weights:.2f} MB |" + "".join(f" `{name}` |" for name in FORMATS) + " safetensors |")
    print("|---" * (2 + len(FORMATS)) + "|")
    for words, (kind, values) in SCHEMES.items():
        recipe = Recipe("fx", "x86", Scheme(**values), kind=kind)
        quantized = QuantizedNetwork(quantize(network, example, recipe), recipe, example)
        cells = [cell(quantized, name) for name in FORMATS] + [safetensors(quantized)]
        print(f"| {words} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
