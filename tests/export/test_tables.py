"""Embeddings in exported files: integer tables whose rows are dequantized on lookup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import quantize
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export.formats import get_format
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import SEVEN_BITS


class Tables(nn.Module):
    """A table and a bag of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 4)
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(50, 16, mode=mode, padding_idx=padding)
            for mode, padding in (("mean", 0), ("max", 1), ("sum", None), ("sum", 2))
        )

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.words(ids).mean(1) + sum(bag(ids) for bag in self.bags)))
        return y


def quantized_tables(mode: str, kind: str = "static") -> QuantizedNetwork:
    torch.manual_seed(0)
    if kind == "dynamic":
        return quantize(
            Tables(), Example((torch.randint(0, 4, (4, 6)),)), Recipe(mode, "x86", SEVEN_BITS, kind="dynamic")
        )
    recipe, example = Recipe(mode, "x86", SEVEN_BITS), Example((torch.randint(0, 4, (4, 6)),))
    prepared = get_mode(mode).prepare(Tables(), example, recipe)
    prepared.train()(torch.randint(0, 50, (32, 6)))
    return QuantizedNetwork(get_mode(mode).convert(cpu_copy(prepared), example), recipe, example)


@pytest.mark.parametrize(
    ("mode", "name", "needs"),
    [
        ("fx", "torchscript", "torch"),
        ("eager", "torchscript", "torch"),
        pytest.param("fx", "onnx", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("eager", "onnx", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("fx", "openvino", "openvino", marks=pytest.mark.slow),
        pytest.param("eager", "openvino", "openvino", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_files_look_up_what_the_int8_network_does(mode: str, name: str, needs: str, kind: str, tmp_path: Path) -> None:
    """Also with a batch whose padding differs, is absent, or is everything."""
    pytest.importorskip(needs)
    quantized, form = quantized_tables(mode, kind), get_format(name)
    path = tmp_path / f"model{form.suffix}"
    form.write(Source(quantized, quantized.example), path)
    run: Any = form.load(path)
    ids = torch.randint(3, 50, (3, 6))
    for padding in (0, 1, 2, None):
        if padding is not None:
            ids[0], ids[1, 2] = padding, padding
        expected, (got,) = quantized(ids), run([ids])
        # OpenVINO computes in bfloat16 on CPUs that have it, and values may end a step or two away.
        assert (expected - got).abs().max() <= (0.06 if name == "openvino" else 0.02) * expected.abs().max()
