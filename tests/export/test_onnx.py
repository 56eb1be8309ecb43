"""ONNX files: contents, int8 kernels in ONNX Runtime, and results."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Recipe, calibrate, export_quantized, prepare
from qat_lightning.errors import ExportError
from qat_lightning.export.onnx import Onnx
from qat_lightning.export.onnx_graph import OPSET
from qat_lightning.export.protocol import Kernels, Source
from qat_lightning.graph.example import Example
from tests.artifact.making import batch_of, case_named, images, quantize
from tests.export.files import Odd, assert_same_outputs, quantized_case
from tests.support.exactness import SEVEN_BITS
from tests.support.nightly import nightly_except

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def _write(network: nn.Module, example: Example, path: Path) -> Any:
    Onnx().write(Source(network, example), path)
    return onnx.load(path)


def _fused(path: Path, tmp_path: Path) -> Counter[str]:
    """The ops that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [("residual", "eager"), ("residual", "fx"), ("functional", "fx"), ("attention", "eager"), ("attention", "pt2e")],
)
def test_file_computes_what_the_int8_network_does(name: str, mode: str, tmp_path: Path) -> None:
    quantized, batch = quantized_case(name, mode)
    path = tmp_path / "model.onnx"
    _write(quantized, quantized.example, path)
    assert_same_outputs(quantized, Onnx().load(path), batch)


def test_every_layer_is_one_int8_kernel_in_onnx_runtime(tmp_path: Path) -> None:
    quantized, _ = quantized_case("residual", "fx")
    _write(quantized, quantized.example, tmp_path / "model.onnx")
    ops = _fused(tmp_path / "model.onnx", tmp_path)
    assert ops["QLinearConv"] == 3
    assert ops["QLinearAdd"] == 1
    assert ops["QGemm"] == 1
    assert ops["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Relu"} & ops.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "int8"), nightly_except([("fx", 3), ("pt2e", 2)], ("fx", 3)))
def test_it_tells_which_layers_onnx_runtime_runs_in_float(mode: str, int8: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 64, 4))
    prepared = prepare(network, Example((torch.randn(4, 3, 12, 12),)), Recipe(mode, "x86"))
    calibrate(prepared, [torch.randn(4, 3, 12, 12)])
    (result,) = export_quantized(
        prepared, tmp_path, ["onnx"], example=Example((torch.randn(4, 3, 12, 12),)), min_agreement=0
    )
    assert result.kernels == Kernels(3, int8)
    assert ("runs 1 of 3 layers in float" in result.remark) == (mode == "pt2e")
    assert json.loads((tmp_path / "export.json").read_text())["results"][0]["kernels"] == {"layers": 3, "int8": int8}


def test_depthwise_network_is_int8_throughout(tmp_path: Path) -> None:
    quantized, _ = quantized_case("depthwise", "fx")
    _write(quantized, quantized.example, tmp_path / "model.onnx")
    ops = _fused(tmp_path / "model.onnx", tmp_path)
    assert ops["QLinearConv"] == 3
    assert ops["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "FusedConv", "Clip"} & ops.keys()


class Padded(nn.Module):
    """Zero padding on two sides, as in networks of TensorFlow, and around an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=(0, 1), groups=8)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.pad(x, (0, 1, 0, 1))))
        return F.pad(self.second(self.pad(x)), (1, 0, 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_zeros_around_an_image_are_the_padding_of_its_convolution(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantize(mode, "x86", Padded(), scheme=SEVEN_BITS)
    model = _write(quantized, quantized.example, tmp_path / "model.onnx")
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["Pad"] == 1, "those around the output"
    pads = [list(one.ints) for node in model.graph.node for one in node.attribute if one.name == "pads"]
    assert pads == [[0, 0, 1, 1], [0, 1, 1, 2]]
    assert_same_outputs(quantized, Onnx().load(tmp_path / "model.onnx"), images)
    assert _fused(tmp_path / "model.onnx", tmp_path)["QLinearConv"] == (1 if mode == "pt2e" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_linear_layers_of_tokens_are_int8_kernels_with_their_bias(mode: str, tmp_path: Path) -> None:
    quantized, _ = quantized_case("attention", mode)
    _write(quantized, quantized.example, tmp_path / "model.onnx")
    ops = _fused(tmp_path / "model.onnx", tmp_path)
    assert ops["QGemm"] == 5
    assert ops["MatMul"] + ops["FusedMatMul"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_nothing_is_between_quantize_dequantize_and_the_op(mode: str, tmp_path: Path) -> None:
    quantized, _ = quantized_case("residual", mode)
    model = _write(quantized, quantized.example, tmp_path / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ops = Counter(node.op_type for node in model.graph.node)
    assert not {"Cast", "Constant", "Identity", "CastLike"} & ops.keys()
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert {*node.input[1:]} <= constants.keys(), "scales and zero points are initializers"
        if node.op_type in ("Conv", "Gemm"):
            # A bias of zeros is left out.
            x, weight, *biases = (producers[name] for name in node.input)
            assert {source.op_type for source in (x, weight, *biases)} == {"DequantizeLinear"}
            assert constants[x.input[2]].data_type == onnx.TensorProto.UINT8
            assert constants[weight.input[0]].data_type == onnx.TensorProto.INT8
            x_scale, w_scale = (onnx.numpy_helper.to_array(constants[source.input[1]]) for source in (x, weight))
            assert list(w_scale.shape) == constants[weight.input[0]].dims[:1]
            for bias in biases:
                assert constants[bias.input[0]].data_type == onnx.TensorProto.INT32
                scale = onnx.numpy_helper.to_array(constants[bias.input[1]])
                assert scale == pytest.approx(x_scale * w_scale)


def test_signature_is_the_networks_own(tmp_path: Path) -> None:
    quantized, batch = quantized_case("several_inputs", "fx")
    model = _write(quantized, quantized.example, tmp_path / "model.onnx")
    assert [given.name for given in model.graph.input] == ["x", "table"]
    assert [made.name for made in model.graph.output] == ["logits", "side"]
    assert model.opset_import[0].version == OPSET
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert all(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])
    assert_same_outputs(quantized, Onnx().load(tmp_path / "model.onnx"), batch)


class Scaled(nn.Module):
    """A scalar parameter, and a scalar besides the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 8), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x) * self.gain
        return y, y.sum()


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_scalar_parameters_and_outputs_stay_scalars(mode: str, tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    quantized = quantize(mode, "x86", Scaled(), lambda size: ((torch.randn(size, 4),), {}), scheme=SEVEN_BITS)
    _write(quantized, quantized.example, tmp_path / "model.onnx")
    for wanted, got in zip(quantized(x), Onnx().load(tmp_path / "model.onnx")([x]), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_float_network_goes_the_same_way(tmp_path: Path) -> None:
    case = case_named("several_inputs")
    network, (args, kwargs) = case.network().eval(), batch_of(case)(4)
    _write(network, Example(args, kwargs), tmp_path / "float.onnx")
    assert_same_outputs(network, Onnx().load(tmp_path / "float.onnx"), batch_of(case), least=100)


def test_int8_file_is_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    _write(Wide().eval(), Example(*images(4)), tmp_path / "float.onnx")
    quantized = quantize("fx", "x86", Wide())
    _write(quantized, quantized.example, tmp_path / "int8.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "int8")]
    assert sizes[0] / sizes[1] > 3.8


def test_no_output_and_no_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantized, _ = quantized_case("plain", "fx")
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _write(quantized, quantized.example, tmp_path / "model.onnx")
    assert not [str(warning.message) for warning in caught]
    assert capfd.readouterr() == ("", "")


def test_op_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no translation of .*i0: rewrite"):
        _write(Odd().eval(), Example(*images(4)), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_tensorrt_gets_int8_with_zero_point_0_and_float_biases(tmp_path: Path) -> None:
    """The form that TensorRT's parser supports: symmetric activations and weights, no dequantized int32."""
    quantized, batch = quantized_case("attention", "pt2e", "tensorrt")
    model = _write(quantized, quantized.example, tmp_path / "model.onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zero_points = [
        constants[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert len(zero_points) > 10
    assert all(zero.dtype == "int8" and not zero.any() for zero in zero_points)
    assert not any(array.dtype == "int32" for array in constants.values())
    assert_same_outputs(quantized, Onnx().load(tmp_path / "model.onnx"), batch)


class _Blocks(nn.Module):
    """Large enough that convolutions dominate the time of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for conv in self.convs:
            x = (conv(x) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_file_is_as_fast_as_onnx_runtimes_own_static_quantization(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.rows = iter([{"x": torch.randn(2, 3, 64, 64).numpy()} for _ in range(2)])

        def get_next(self) -> Any:
            return next(self.rows, None)

    def batch(size: int) -> Any:
        return (torch.randn(size, 3, 64, 64),), {}

    torch.manual_seed(0)
    network = _Blocks().eval()
    _write(network, Example(*batch(4)), tmp_path / "float.onnx")
    quantized = quantize("fx", "x86", network, batch)
    _write(quantized, quantized.example, tmp_path / "ours.onnx")
    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(tmp_path / "float.onnx", tmp_path / "theirs.onnx", Reader(), per_channel=True, **kinds)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        for name in ("float", "ours", "theirs")
    }
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    feed = {"x": torch.randn(1, 3, 64, 64).numpy()}
    for _ in range(30):
        for name, session in sessions.items():
            before = time.thread_time()  # in turn, and of this thread's own: other work on the machine does not count
            session.run(None, feed)
            seconds[name].append(time.thread_time() - before)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    assert medians["ours"] < 1.1 * medians["theirs"]
    assert medians["ours"] < medians["float"]
