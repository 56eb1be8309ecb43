"""Effect of activations and GroupNorm on exported files, by mode: ``python -m benchmarks.exported_activations``.

A small convolutional network with each of them is prepared, calibrated on random images, converted, and exported for
ONNX Runtime and OpenVINO. Reports the number of layers that the runtime runs on integers, if it tells, and the median
latency of one image; each file is loaded in its own process.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from qat_lightning import Example, Recipe, calibrate, export_quantized, prepare
from qat_lightning.errors import QuantizationError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
}
TARGETS = (("fx", "x86"), ("eager", "x86"), ("pt2e", "x86"), ("pt2e", "xnnpack"))
FORMATS = ("onnx", "openvino")


def network(activation: str, group_norm: bool) -> nn.Module:
    """Return four convolutions and a linear layer."""
    layers: list[nn.Module] = []
    width = 3
    for stride, wider in ((2, 32), (1, 64), (1, 64), (1, 64)):
        norm = nn.GroupNorm(8, wider) if group_norm else nn.BatchNorm2d(wider)
        layers += [nn.Conv2d(width, wider, 3, stride, 1), norm, ACTIVATIONS[activation]()]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def row(activation: str, group_norm: bool, mode: str, backend: str) -> list[str]:
    """Return the figures of one network from one mode."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64)
    prepared = prepare(network(activation, group_norm), Example((images,)), Recipe(mode, backend))
    calibrate(prepared, [torch.randn_like(images) for _ in range(3)])
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for made in export_quantized(prepared, folder, FORMATS, example=Example((images,)), min_agreement=0):
            if made.error:
                raise QuantizationError(made.error)
            if made.kernels is not None:
                cells.append(f"{made.kernels.int8} of {made.kernels.layers}")
            cells.append(f"{made.latency_ms:.2f}")
    return [("GroupNorm, " if group_norm else "BatchNorm, ") + activation, f"{mode}, {backend}", *cells]


def main() -> None:
    """Print a row for each network, mode and backend."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["QAT_LIGHTNING_COMPILE"] = "0"  # only the files are timed
    torch.set_num_threads(1)
    table = Table("network", "mode, backend", "int8 in ONNX Runtime", "ms", "ms in OpenVINO")
    for group_norm in (False, True):
        for activation in ACTIVATIONS:
            for mode, backend in TARGETS:
                table.add_row(*row(activation, group_norm, mode, backend))
    console = Console()
    console.print(describe())
    console.print(table)


if __name__ == "__main__":
    main()
