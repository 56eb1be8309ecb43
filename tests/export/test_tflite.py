"""LiteRT's files: the converted graph, and its results where the runtime is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning import export_quantized
from qat_lightning.errors import CombinationError, ExportError, MissingExtraError
from qat_lightning.export import get_format
from qat_lightning.export.formats import check_formats
from qat_lightning.export.grids import ops
from qat_lightning.export.protocol import Port, Source
from qat_lightning.export.pt2 import flat_graph
from qat_lightning.export.result import ExportResult, export_table
from qat_lightning.export.tflite import _translate
from qat_lightning.export.tflite_graph import for_litert
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.artifact.making import quantize
from tests.export.files import Odd, quantized_case

FULL = (-128, 127, torch.int8)
A, B, C = (0.04, 5, *FULL), (0.03, -20, *FULL), (0.02, -3, *FULL)


def on(x: Tensor, grid: tuple[Any, ...]) -> Tensor:
    rounded: Tensor = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)
    return rounded


# Without LiteRT


@pytest.mark.parametrize("name", ["tflite", "tflite_int8"])
@pytest.mark.parametrize(
    ("recipe", "instead"),
    [
        (Recipe("fx", "x86", kind="dynamic"), "kind='static'"),
        (Recipe("eager", "x86", kind="weight_only"), "kind='static'"),
        (Recipe("fx", "x86", Scheme(weight_symmetric=False)), "weight_symmetric=True"),
    ],
)
def test_what_has_no_int8_kernel_is_refused_with_what_to_type(name: str, recipe: Recipe, instead: str) -> None:
    with pytest.raises(CombinationError, match=instead):
        check_formats([name], recipe)


@pytest.mark.parametrize("name", ["tflite", "tflite_int8"])
def test_a_missing_package_is_one_line_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"litert_torch.*pip install 'qat-lightning\[litert\]'"):
        check_formats([name], Recipe("pt2e", "xnnpack"))


@pytest.mark.parametrize(("mode", "backend"), [("fx", "x86"), ("eager", "fbgemm"), ("pt2e", "x86")])
def test_uint8_grids_become_int8_grids_of_the_same_values(mode: str, backend: str) -> None:
    quantized, batch = quantized_case("residual", mode, backend)
    graph_module, _, _ = flat_graph(Source(quantized, quantized.example))
    args, _ = batch(5)
    expected = graph_module(*args)
    for_litert(graph_module)
    assert all(torch.equal(*pair) for pair in zip(expected, graph_module(*args), strict=True))
    quantizing = graph_module.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default)
    assert quantizing
    assert {node.args[-1] for node in quantizing} == {torch.int8}
    weights = graph_module.graph.find_nodes(op="call_function", target=ops.quantize_per_channel.default)
    assert len(weights) == 4
    assert all(node.args[-3:] == (-127, 127, torch.int8) for node in weights)


def test_grids_of_fewer_bits_are_refused_by_name() -> None:
    graph_module = fx.symbolic_trace(lambda x: on(x, (0.1, 0, 0, 127, torch.uint8)))
    with pytest.raises(ExportError, match=r"'quantize_per_tensor.*' is torch.uint8 from 0 to 127"):
        for_litert(graph_module)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: on(on(x, A), B),
        lambda x, y: on(on(x, A) * 1.0, B),
        lambda x, y: on(torch.cat([on(x, A), on(y, A)]), B),
        lambda x, y: on(F.avg_pool2d(on(x, A), 2), B),
    ],
)
def test_what_holds_grids_apart_changes_no_value(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = torch.randn(2, 2, 3, 4, 4)
    program = torch.export.export(_Module(function), (x, y))
    graph_module = program.module(check_guards=False)
    for_litert(graph_module)
    assert torch.equal(graph_module(x, y), function(x, y))
    assert len(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default)) == 1


def test_the_grids_of_integer_inputs_and_outputs_are_reported() -> None:
    port = Port("input", 0, "int8", 0.0203922, -50)
    result = ExportResult("tflite_int8", "LiteRT", [Path("model.int8.tflite")], ports=(port,))
    assert "tflite_int8: input 0: int8, scale 0.0203922, zero point -50" in str(export_table([result]).caption)
    assert json.loads(json.dumps(result.to_dict()))["ports"] == [vars(port)]


# With LiteRT


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


class TwoOfEach(nn.Module):
    """Two inputs, two outputs, and a mean whose grid differs from that of the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.table, self.scores, self.map = nn.Linear(5, 8), nn.Linear(8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, table: Tensor) -> dict[str, Tensor]:
        y = self.conv(x) + self.table(table)[:, :, None, None]
        return {"scores": self.scores(y.mean((2, 3))), "map": self.map(y)}


class Tokens(nn.Module):
    """Looks up rows by integers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.body(self.words(ids))).mean(1))
        return y


class Pooled(nn.Module):
    """Channels last, depthwise, and both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.AvgPool2d(2),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return y


class Upwards(nn.Module):
    """Transposed convolutions, hard swish, and a sigmoid with a trained grid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def _images(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(count, 3, 16, 16),), {}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "two of each": (TwoOfEach, lambda count: ((torch.randn(count, 3, 8, 8), torch.randn(count, 5)), {})),
    "tokens": (Tokens, lambda count: ((torch.randint(0, 50, (count, 6)),), {})),
    "pooled": (Pooled, _images),
    "upwards": (Upwards, _images),
}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "backend"), [("pt2e", "xnnpack"), ("fx", "x86")])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_computes_what_the_int8_network_does(network: str, mode: str, backend: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    make, batch = NETWORKS[network]
    quantized, form = quantize(mode, backend, make(), batch), get_format("tflite")
    form.write(Source(quantized, quantized.example), tmp_path / "model.tflite")
    run = form.load(tmp_path / "model.tflite")
    args, _ = batch(8)
    found, wanted = [], []
    for place in range(8):
        one = tree_map(lambda tensor, place=place: tensor[place : place + 1], args)
        wanted.append(tree_leaves(quantized(*one)))
        found.append(run(list(one)))
    for one, other in zip(zip(*wanted, strict=True), zip(*found, strict=True), strict=True):
        assert sqnr_db(torch.cat(one), torch.cat(other)) > 30
    kernels = form.kernels(tmp_path / "model.tflite")
    assert kernels is not None
    assert kernels.int8 == kernels.layers >= 2
    assert not form.ports(tmp_path / "model.tflite")


@pytest.mark.slow
def test_inputs_and_outputs_are_int8_on_grids_that_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    call = Example((torch.randn(4, 3, 8, 8), torch.randn(4, 5)))
    network = get_mode("pt2e").prepare(TwoOfEach(), call, Recipe("pt2e", "xnnpack")).train()
    network(*call.args)
    (result,) = export_quantized(network, tmp_path, ["tflite_int8"], example=call)
    assert not result.error
    assert result.path == tmp_path / "model.int8.tflite"
    assert [(port.kind, port.place, port.dtype) for port in result.ports] == [
        ("input", 0, "int8"), ("input", 1, "int8"), ("output", 0, "int8"), ("output", 1, "int8")
    ]  # fmt: skip
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(result.path))
    assert {detail["dtype"].__name__ for detail in interpreter.get_input_details()} == {"int8"}
    grids = sorted(detail["quantization"] for detail in interpreter.get_input_details())
    assert grids == sorted((port.scale, port.zero_point) for port in result.ports if port.kind == "input")
    assert result.float_latency_ms is not None, "the float network has float inputs in a file of this format too"


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: on(on(x, A), B),
        lambda x, y: on(torch.cat([on(x, A), on(y, A)], 1), B),
        lambda x, y: on(torch.cat([on(x, A), on(y, C)], 1), B),
        lambda x, y: on(F.avg_pool2d(on(x, A), 2), B),
        lambda x, y: on(F.interpolate(on(x, A), scale_factor=2, mode="bilinear"), B),
        lambda x, y: on(torch.sigmoid(on(x, A)), B),
        lambda x, y: on(torch.softmax(on(x, A), -1), (0.002, -128, *FULL)),
        lambda x, y: on(on(x, A).mean((2, 3)), B),
        lambda x, y: on(on(x, A) + on(y, C), B),
    ],
    ids=["twice", "cat", "cat of two grids", "average", "bilinear", "sigmoid", "softmax", "mean", "sum"],
)
def test_ops_are_right_to_a_step_where_grids_differ(
    function: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    graph_module = torch.export.export(_Module(function), (x, y)).module(check_guards=False)
    for_litert(graph_module)
    torch.export.save(torch.export.export(graph_module, (x, y)), str(tmp_path / "program.pt2"))
    _translate(tmp_path / "program.pt2", tmp_path / "model.tflite", "quantized")
    (found,) = get_format("tflite").load(tmp_path / "model.tflite")([x, y])
    assert (found - function(x, y)).abs().max() < 1.01 * B[0]


@pytest.mark.slow
def test_what_litert_does_not_take_is_said_with_its_own_words(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")

    quantized = quantize("fx", "x86", Odd())
    with pytest.raises(ExportError, match=r"LiteRT cannot convert the network \(.*i0.*choose another format"):
        get_format("tflite").write(Source(quantized, quantized.example), tmp_path / "model.tflite")
    assert not any(tmp_path.iterdir())
