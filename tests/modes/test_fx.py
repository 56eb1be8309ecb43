"""Mode fx beyond the common table: errors, and detection of wrong kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat_lightning.modes.fx.upstream as fx_upstream
from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConversionError, NetworkError, TraceError, VerificationError
from qat_lightning.export.program import int8_program
from qat_lightning.export.protocol import Source
from qat_lightning.export.torchscript import TorchScript
from qat_lightning.graph.example import Example
from qat_lightning.layers.padding import pad
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.shared_range import SharedRange
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import ControlFlow, Depthwise, Functional, Plain, Residual

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X86 = Recipe("fx", "x86")


def prepare(network: nn.Module, recipe: Recipe = X86, *args: Tensor) -> nn.Module:
    """Prepared, with ranges of a few batches."""
    torch.manual_seed(0)
    prepared = FxMode().prepare(network, Example(args or (IMAGES,)), recipe)
    for _ in range(3):
        prepared(*(args or (torch.randn(8, 3, 8, 8),)))
    return prepared


def test_control_flow_is_refused_with_the_line_and_what_to_do() -> None:
    with pytest.raises(TraceError) as caught:
        prepare(ControlFlow())
    message = str(caught.value)
    assert "networks.py:" in message
    assert "if float(x.detach().mean()) > 0" in message
    for remedy in ("module=", "mode='eager'", "mode='auto'"):
        assert remedy in message


class OtherWayInEval(nn.Module):
    """An auxiliary layer in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.aux = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            x = x + self.aux(x)
        return x


def test_another_way_in_evaluation_is_refused() -> None:
    with pytest.raises(TraceError, match=r"self\.training"):
        prepare(OtherWayInEval())


def test_a_network_without_anything_to_quantize_is_refused() -> None:
    with pytest.raises(NetworkError, match="nothing to quantize"):
        prepare(nn.Sequential(nn.LayerNorm(8), nn.Softmax(-1)))


def test_a_reserved_name_is_refused() -> None:
    network = Plain()
    network.meta = nn.Linear(2, 2)
    with pytest.raises(TraceError, match="meta"):
        prepare(network)


def test_converting_without_ranges_is_refused() -> None:
    prepared = FxMode().prepare(Plain(), Example((IMAGES,)), X86)
    with pytest.raises(ConversionError, match="No finite range was ever observed in Plain"):
        FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))


def test_a_kernel_that_computes_something_else_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the int8 network is packed with a wrong value, as by a saturating kernel."""
    upstream = fx_upstream.convert_fx

    def convert_wrong(*args: object, **kwargs: object) -> nn.Module:
        int8 = upstream(*args, **kwargs)
        conv = int8.get_submodule("conv2")
        weight = torch.quantize_per_tensor(torch.randn(conv.weight().shape), 0.1, 0, torch.qint8)
        conv.set_weight_bias(weight, conv.bias())
        return int8

    prepared = prepare(Residual())
    nn.init.ones_(prepared.get_parameter("bn2.weight"))
    monkeypatch.setattr(fx_upstream, "convert_fx", convert_wrong)
    with pytest.raises(VerificationError, match=r"'conv2'.*dB.*exclude=\['conv2'\]"):
        FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_relu6_is_folded_into_the_range_and_no_clamp_runs(backend: str) -> None:
    prepared = prepare(Depthwise(), Recipe("fx", backend))
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    kinds = {type(module) for module in converted.network.modules()}
    assert nn.ReLU6 not in kinds
    assert all(check.sqnr_db > 50 or check.max_steps <= 1 for check in converted.checks)
    conv = converted.network.get_submodule("expand.0")
    assert conv.zero_point == 0
    assert 255 * conv.scale <= 6.001


def test_relu6_on_a_symmetric_grid_is_not_dropped_and_right_on_qnnpack() -> None:
    """A symmetric grid includes negative values, so it does not clamp at 0 itself."""
    prepared = prepare(Depthwise(), Recipe("fx", "qnnpack", Scheme(activation_symmetric=True)))
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    with torch.no_grad():
        expected = cpu_copy(prepared)(IMAGES)
        assert F.cosine_similarity(expected, converted.network(IMAGES)).min() > 0.999


def test_each_range_is_observed_at_one_place() -> None:
    prepared = prepare(Functional())
    modules = dict(prepared.named_modules())
    called = [node.target for node in prepared.graph.nodes if node.op == "call_module"]
    observing = [modules[name] for name in called if isinstance(modules[name], FakeQuantize)]
    assert len(observing) == len(set(observing))
    assert any(isinstance(modules[name], SharedRange) for name in called)


def test_a_concatenation_has_the_range_of_all_its_inputs() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.small(x), self.large(x) * 1.0], 1)

    network = Join()
    network.large.weight.data *= 100
    prepared = prepare(network)
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    with torch.no_grad():
        plain, int8 = prepared._quantization.float_network(IMAGES), converted.network(IMAGES)
    assert sqnr_db(plain, int8) > 20, "the large branch was clipped to the range of the small one"


def test_default_arguments_that_the_example_leaves_out_are_fixed() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            x = self.conv(x)
            if mask is not None:
                x = x * mask
            return x * 2 if double else x

    prepared = prepare(Optional())
    assert prepared(IMAGES).shape == (8, 4, 8, 8)
    with pytest.raises(NetworkError, match="is called with x, double=True; the trace fixes the value of double"):
        prepared(IMAGES, double=True)


def test_functional_dropout_follows_train_and_eval() -> None:
    prepared = prepare(Functional())
    prepared.eval()
    assert torch.equal(prepared(IMAGES), prepared(IMAGES))
    prepared.train()
    assert not torch.equal(prepared(IMAGES), prepared(IMAGES))


def test_an_unused_parameter_beside_used_layers_keeps_them_quantized() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    prepared = prepare(nn.Sequential(Block()))
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    assert "0.unused" in prepared.state_dict()
    assert all(row.quantized for row in converted.coverage)


def test_attributes_and_methods_of_the_float_network_stay_reachable() -> None:
    class Named(Plain):
        classes = ("a", "b")

        def first(self) -> str:
            return self.classes[0]

    prepared = prepare(Named())
    copied = copy.deepcopy(prepared)
    for network in (prepared, copied):
        assert network.first() == "a"
    with pytest.raises(AttributeError, match="nothing_like_it"):
        prepared.nothing_like_it  # noqa: B018


def test_a_part_that_was_merged_says_so_when_called() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)

    prepared = prepare(Parts())
    with pytest.raises(NetworkError, match=r"mode='eager'"):
        prepared.features(IMAGES)


def test_a_copy_of_the_prepared_network_is_independent() -> None:
    prepared = prepare(Residual())
    copied = copy.deepcopy(prepared)
    copied.train()
    before = {key: value.clone() for key, value in prepared.state_dict().items() if isinstance(value, Tensor)}
    copied(IMAGES * 10)
    assert all(torch.equal(before[key], prepared.state_dict()[key]) for key in before)
    prepared.eval()
    copied.eval()
    copied.load_state_dict(prepared.state_dict())
    assert torch.equal(copied(IMAGES), prepared(IMAGES))


def test_modes_are_found_by_their_names() -> None:
    assert isinstance(get_mode("fx"), FxMode)


class Padded(nn.Module):
    """One-sided zero padding, as in networks ported from TensorFlow, by a module and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pad(x))
        return self.head(self.body(F.pad(x, [0, 1, 0, 1])))


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
def test_zeros_around_an_image_are_put_around_its_integers(backend: str) -> None:
    prepared = prepare(Padded(), Recipe("fx", backend))
    prepared.train()
    for _ in range(20):
        prepared(torch.randn(8, 3, 8, 8) + 0.5)
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    padded = [node for node in converted.network.graph.nodes if node.target is pad]
    dequantized = [node for node in converted.network.graph.nodes if node.target == "dequantize"]
    assert len(padded) == 2
    assert len(dequantized) == 1, "only the output is float"
    rows = {row.kind: row.quantized for row in converted.operations if row.kind == "pad"}
    assert rows == {"pad": True}
    assert all(check.sqnr_db > 45 for check in converted.checks)
    assert sqnr_db(cpu_copy(prepared)(IMAGES), converted.network(IMAGES)) > 45


def test_padded_integers_go_into_files(tmp_path) -> None:
    prepared = prepare(Padded())
    example = Example((IMAGES,))
    quantized = QuantizedNetwork(FxMode().convert(cpu_copy(prepared), example), X86, example)
    expected = quantized(IMAGES)
    quantized.save(tmp_path / "model.int8")
    assert torch.equal(load_quantized(tmp_path / "model.int8")(IMAGES), expected)
    program = int8_program(quantized, example)
    assert sqnr_db(expected, program.module()(IMAGES)) > 45
    TorchScript().write(Source(quantized, example), tmp_path / "model.pt")
    (scripted,) = TorchScript().load(tmp_path / "model.pt")([IMAGES[:3]])
    assert torch.equal(scripted, expected[:3])


@pytest.mark.parametrize("amounts", [(0, 1, 0, 1), (2, 3, 1, 0), (1, 1), (0, 0, 0, 0, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padding_integers_is_padding_what_they_stand_for(amounts, dtype, layout) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    integers = torch.quantize_per_tensor(x, 0.1, 7, dtype)
    padded = pad(integers, amounts)
    assert torch.equal(padded.dequantize(), F.pad(integers.dequantize(), list(amounts)))
    assert padded.is_contiguous(memory_format=layout)
    assert padded.q_scale() == integers.q_scale()


@pytest.mark.parametrize(
    "padding",
    [
        lambda x: F.pad(x, [0, 1, 0, 1], value=1.0),
        lambda x: F.pad(x, [0, 1, 0, 1], mode="reflect"),
        lambda x: F.pad(x, [0, x.shape[2] % 7, 0, 1]),
    ],
    ids=["one", "reflect", "worked out"],
)
def test_padding_with_anything_else_stays_float(padding) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(padding(x))

    prepared = prepare(Other())
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    assert sqnr_db(cpu_copy(prepared)(IMAGES), converted.network(IMAGES)) > 45
    assert [row.quantized for row in converted.operations if row.kind == "pad"] == [False]


class Mixed(nn.Module):
    """Also returns values that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> list[object]:
        y = self.conv(x)
        return [y, None, 3.0, {"mean": (y.mean(), "name")}]


def test_numbers_and_words_among_the_outputs(tmp_path: Path) -> None:
    prepared = prepare(Mixed())
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    QuantizedNetwork(converted, X86, Example((IMAGES,))).save(tmp_path / "mixed.int8")
    for network in (prepared, converted.network, load_quantized(tmp_path / "mixed.int8")):
        y, nothing, number, rest = network(IMAGES)
        assert isinstance(y, Tensor)
        assert (nothing, number, rest["mean"][1]) == (None, 3.0, "name")


@dataclass
class Scores:
    """The output of a network."""

    scores: Tensor
    features: Tensor


class InADataclass(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Scores:
        y = F.relu(self.conv(x))
        return Scores(y.mean((2, 3)), y)


def test_a_dataclass_of_tensors_is_returned() -> None:
    prepared = prepare(InADataclass())
    converted = FxMode().convert(cpu_copy(prepared), Example((IMAGES,)))
    assert isinstance(converted.network(IMAGES), Scores)
