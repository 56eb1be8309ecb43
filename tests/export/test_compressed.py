"""Kinds without calibration in files of other runtimes: results and sizes."""

from __future__ import annotations

import functools
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ExportError
from qat_lightning.export.formats import get_format
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

GROUPS: Any = {"weight_granularity": "per_group", "weight_group_size": 32}
SCHEMES: dict[str, tuple[Any, Any]] = {
    "8 bits": ("weight_only", {}),
    "4 bits in groups": ("weight_only", {"weight_bits": 4, **GROUPS}),
    "4 bits, affine": ("weight_only", {"weight_bits": 4, "weight_symmetric": False}),
    "dynamic": ("dynamic", {"weight_bits": 7}),  # which every runtime multiplies exactly on every x86 CPU
    "8da4w": ("dynamic", {"weight_bits": 4, "activation_granularity": "per_token", **GROUPS}),
}


class Characters(nn.Module):
    """A transformer with one block, whose widths are not all multiples of the group size."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(30, 48), nn.LayerNorm(48)
        self.qkv, self.out, self.head = nn.Linear(48, 144), nn.Linear(48, 48, bias=False), nn.Linear(48, 30)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        y: Tensor = self.head(x)
        return y


@functools.cache
def characters(scheme: str, mode: str = "eager") -> QuantizedNetwork:
    torch.manual_seed(0)
    kind, values = SCHEMES[scheme]
    recipe, example = Recipe(mode, "x86", Scheme(**values), kind=kind), Example((torch.randint(0, 30, (4, 8)),))
    return QuantizedNetwork(quantize(Characters().eval(), example, recipe), recipe, example)


def written(quantized: QuantizedNetwork, name: str, folder: Path) -> Path:
    form = get_format(name)
    form.write(Source(quantized, quantized.example), folder / f"net{form.suffix}")
    return folder / f"net{form.suffix}"


def agreement(quantized: QuantizedNetwork, name: str, path: Path) -> float:
    """The lowest SQNR over two batch sizes."""
    run, least = get_format(name).load(path), float("inf")
    for size in (1, 6):
        ids = torch.randint(0, 30, (size, 8))
        least = min(least, sqnr_db(quantized(ids), run([ids])[0]))
    return least


QUICK = "4 bits in groups"


@pytest.mark.parametrize(
    "scheme", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in SCHEMES]
)
def test_onnx_runtime_computes_what_the_integer_network_does(scheme: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    quantized = characters(scheme)
    path = written(quantized, "onnx", tmp_path)
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops["MatMulInteger" if scheme == "dynamic" else "MatMulNBits"] == 3
    # A value may be put on the neighbouring step of a range that is found in the call, and all behind it moves.
    assert agreement(quantized, "onnx", path) > (40 if quantized.recipe.kind == "dynamic" else 100)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_torchscript_computes_what_the_integer_network_does_from_integers(
    mode: str, scheme: str, tmp_path: Path
) -> None:
    path = written(characters(scheme, mode), "torchscript", tmp_path)
    assert agreement(characters(scheme, mode), "torchscript", path) > 100
    weights = 4 * sum(parameter.numel() for parameter in Characters().parameters())
    with zipfile.ZipFile(path) as file:
        tensors = [entry for entry in file.infolist() if "/constants/" in entry.filename or "/data/" in entry.filename]
    assert sum(entry.file_size for entry in tensors) < 0.5 * weights


class Mixed(nn.Module):
    """Layers that read their weights in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm = nn.ConvTranspose1d(4, 8, 3), nn.LSTM(8, 8, batch_first=True)
        self.attention, self.cell = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRUCell(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.conv(x).transpose(1, 2))[0]
        z: Tensor = self.cell(self.attention(y, y, y)[0].mean(1))
        return z


def mixed(kind: Any) -> QuantizedNetwork:
    recipe, example = Recipe("eager", "x86", kind=kind), Example((torch.randn(4, 4, 6),))
    return QuantizedNetwork(quantize(Mixed().eval(), example, recipe), recipe, example)


def test_torchscript_takes_recurrent_layers_and_attention_with_compressed_weights(tmp_path: Path) -> None:
    quantized, x = mixed("weight_only"), torch.randn(4, 4, 6)
    path = written(quantized, "torchscript", tmp_path)
    assert sqnr_db(quantized(x), get_format("torchscript").load(path)([x])[0]) > 100


@pytest.mark.parametrize("name", ["torchscript", "onnx", "openvino", "exported_program"])
def test_recurrent_layers_of_kind_dynamic_are_refused_by_name(name: str, tmp_path: Path) -> None:
    if name in ("onnx", "openvino"):
        pytest.importorskip(name)
    with pytest.raises(ExportError, match=r"'lstm' is a DynamicRecurrent, .* aten::quantized_lstm, .* exclude="):
        written(mixed("dynamic"), name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_openvino_computes_what_the_integer_network_does(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    quantized = characters(scheme)
    path = written(quantized, "openvino", tmp_path)
    assert agreement(quantized, "openvino", path) > 35  # the attention between the layers runs in bfloat16
    weights = 4 * sum(parameter.numel() for parameter in Characters().parameters())
    assert path.with_suffix(".bin").stat().st_size < 0.45 * weights  # dynamic kinds leave the table float


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "grouped", "least"), [(4, True, 40), (4, False, 100), (8, False, 100)])
def test_executorch_runs_tokens_in_kernels_of_xnnpack(bits: int, grouped: bool, least: float, tmp_path: Path) -> None:
    """XNNPACK stores the scales of groups in bfloat16, and those of channels in float32."""
    pytest.importorskip("executorch")
    from qat_lightning.export.executorch import not_delegated

    torch.manual_seed(0)
    scheme = Scheme(weight_bits=bits, activation_granularity="per_token", **(GROUPS if grouped else {}))
    recipe, example = Recipe("fx", "x86", scheme, kind="dynamic"), Example((torch.randn(4, 5, 72),))
    network = nn.Sequential(nn.Linear(72, 48), nn.ReLU(), nn.Linear(48, 10, bias=False)).eval()
    quantized = QuantizedNetwork(quantize(network, example, recipe), recipe, example)
    path = written(quantized, "executorch", tmp_path)
    run, x = get_format("executorch").load(path), torch.randn(1, 5, 72)
    assert sqnr_db(quantized(x), run([x])[0]) > least
    # Rows of 72 are padded to whole groups in front of their kernel.
    assert {op.partition("::")[2].partition(".")[0] for op in not_delegated(path)} <= {"constant_pad_nd"}


@pytest.mark.parametrize(
    ("scheme", "instead"),
    [
        ({}, "per_token"),
        (GROUPS, "activation_granularity='per_token'"),
        ({"activation_granularity": "per_token", "activation_symmetric": True}, "activation_symmetric=False"),
        ({"activation_granularity": "per_token", **GROUPS}, "weight_bits=4"),
        ({"activation_granularity": "per_token", "weight_bits": 4, **GROUPS, "weight_group_size": 16}, "group_size=32"),
    ],
)
def test_executorch_says_which_grids_xnnpack_has(scheme: Any, instead: str) -> None:
    executorch = get_format("executorch")
    assert instead in executorch.refusal(Recipe("fx", "x86", Scheme(**scheme), kind="dynamic"))
    assert "kind='dynamic'" in executorch.refusal(Recipe("fx", "x86", kind="weight_only"))
    assert not executorch.refusal(Recipe("pt2e", "xnnpack", kind="dynamic"))
    assert not executorch.refusal(Recipe("fx", "x86", Scheme(**SCHEMES["8da4w"][1]), kind="dynamic"))


@pytest.mark.slow
def test_convolutions_and_their_transposes_keep_integers_in_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)).eval()
    example, x = Example((torch.randn(4, 3, 8, 8),)), torch.randn(2, 3, 8, 8)
    for scheme in ("8 bits", "4 bits in groups", "4 bits, affine"):
        kind, values = SCHEMES[scheme]
        recipe = Recipe("fx", "x86", Scheme(**values), kind=kind)
        quantized = QuantizedNetwork(quantize(network, example, recipe), recipe, example)
        folder = tmp_path / scheme
        folder.mkdir()
        path = written(quantized, "onnx", folder)
        assert Counter(node.op_type for node in onnx.load(path).graph.node)["DequantizeLinear"] == 2
        assert sqnr_db(quantized(x), get_format("onnx").load(path)([x])[0]) > 100


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs_of_single_operations_are_refused_with_what_to_use(name: str) -> None:
    form = get_format(name)
    for kind in ("dynamic", "weight_only"):
        assert "mode='fx'" in form.refusal(Recipe("pt2e", "x86", kind=kind))
        assert not form.refusal(Recipe("fx", "x86", kind=kind))
