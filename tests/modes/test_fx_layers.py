"""Mode fx on single layers that upstream's lowering handles wrongly: int8, or float with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.fx.mode import FxMode
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe


def convert(
    network: nn.Module, example: tuple[Tensor, ...], backend: str = "x86", **recipe: tuple[str, ...]
) -> Converted:
    """Prepare, calibrate on a few batches, convert, and compare outputs."""
    torch.manual_seed(0)
    prepared = FxMode().prepare(network, Example(example), Recipe("fx", backend, **recipe))
    for _ in range(3):
        prepared(*example)
    converted = FxMode().convert(cpu_copy(prepared), Example(example))
    with torch.no_grad():
        expected, actual = cpu_copy(prepared)(*example), converted.network(*example)
    assert sqnr_db(expected, actual) > 35
    return converted


class FunctionalWeights(nn.Module):
    """Weights that are parameters of the network, not of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        return F.linear(x.mean((2, 3)), self.matrix)


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, 8), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.layer(F.relu(self.before(x)))
        return self.after(hidden[:, -1])


class SelfAttention(nn.Module):
    """nn.MultiheadAttention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention, self.after = (
            nn.Linear(6, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x, _ = self.attention(x, x, x)
        return self.after(x.mean(1))


class SizeByDefault(nn.Module):
    """A tuple as a default argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, size: tuple[int, int] = (4, 4)) -> Tensor:
        return F.interpolate(self.conv(x), size=size)


IMAGES = (torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
SERIES = (torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(0)),)


def test_functional_weights_are_packed() -> None:
    converted = convert(FunctionalWeights(), IMAGES)
    ops = {check.op for check in converted.checks}
    assert {"quantized.conv2d_relu", "quantized.linear"} <= ops
    assert not list(converted.network.parameters())


@pytest.mark.parametrize(
    ("layer", "width"), [(nn.LSTM(8, 7, batch_first=True), 7), (nn.GRU(8, 7, batch_first=True, dropout=0.0), 7)]
)
def test_recurrent_layers_stay_float_with_the_reason(layer: nn.Module, width: int) -> None:
    rows = {row.name: row for row in convert(Recurrent(layer, width), SERIES).coverage}
    assert rows["before"].quantized
    assert rows["after"].quantized
    assert type(layer).__name__ in rows["layer"].reason


def test_attention_is_int8_in_all_its_linear_maps() -> None:
    rows = {row.name: row for row in convert(SelfAttention(), SERIES).coverage}
    assert rows["before"].quantized
    assert rows["attention"].quantized
    assert rows["attention.out_proj"].quantized


@pytest.mark.parametrize("activation", [nn.PReLU(), nn.LeakyReLU(), nn.Hardswish(), nn.ELU(), nn.GELU(), nn.SiLU()])
def test_activations(activation: nn.Module) -> None:
    assert convert(nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 4, 3)), IMAGES).coverage[0].quantized


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_int8(padding: str) -> None:
    assert convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, dilation=2)), IMAGES).coverage[0].quantized


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 4, padding="same"), "even kernel"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "circular"),
    ],
)
def test_layers_without_a_kernel_stay_float_with_the_reason(layer: nn.Module, reason: str) -> None:
    network = nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    rows = {row.name: row for row in convert(network, IMAGES).coverage}
    assert not rows["0"].quantized
    assert reason in rows["0"].reason
    assert rows["3"].quantized


def test_conv3d_stays_float_on_qnnpack() -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8, 3))
    rows = {row.name: row for row in convert(network, (torch.randn(8, 2, 4, 4, 4),), "qnnpack").coverage}
    assert "QNNPACK" in rows["0"].reason
    assert rows["3"].quantized


def test_a_tuple_for_a_default_argument_is_traced() -> None:
    assert convert(SizeByDefault(), IMAGES).coverage[0].quantized


@pytest.mark.parametrize("backend", ["x86", "qnnpack", "fbgemm"])
def test_a_branch_that_is_zero_throughout(backend: str) -> None:
    class ZeroBranch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            nn.init.zeros_(self.bn.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.bn(self.side(x))

    assert all(row.quantized for row in convert(ZeroBranch(), IMAGES, backend).coverage)


@pytest.mark.parametrize("exclude", [("0",), ("1",), ("0", "1")])
def test_excluding_a_convolution_or_its_batchnorm_leaves_float_keys_and_values(exclude: tuple[str, ...]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    keys = set(network.state_dict())
    converted = convert(copy.deepcopy(network), IMAGES, exclude=exclude)
    assert keys <= set(FxMode().prepare(network, Example(IMAGES), Recipe("fx", "x86", exclude=exclude)).state_dict())
    assert {row.name: row.quantized for row in converted.coverage}["3"]


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_a_part_that_is_called_twice(activation: type[nn.Module], backend: str) -> None:
    """Its BatchNorm is not folded and stays float; the following activation becomes the clamp of quantization."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation())
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head((self.part(x) - self.part(y)).mean((2, 3)))

    converted = convert(Siamese(), (*IMAGES, -2 * IMAGES[0]), backend)
    assert all(row.quantized for row in converted.coverage)
    assert any(check.op.endswith("BatchNorm2d") and check.sqnr_db > 60 for check in converted.checks)


@pytest.mark.parametrize("between", [nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.1)], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 1.0)], ids=str)
def test_an_activation_behind_an_op_that_keeps_its_grid(between: nn.Module, activation: nn.Module) -> None:
    """Such an op cannot clamp, so the activation is not absorbed by the following grid."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), between, activation, nn.Conv2d(8, 4, 3))
    converted = convert(network, (torch.randn(8, 3, 12, 12),))
    if isinstance(between, nn.Identity):
        assert [check.name for check in converted.checks] == ["0", "3"], "it is one kernel with the convolution"


@pytest.mark.parametrize(
    "others",
    [
        (nn.ReLU6(), nn.ReLU6()),
        (nn.ReLU6(), nn.Identity()),
        (nn.ReLU6(), nn.ReLU()),
        (nn.Identity(), nn.ReLU()),
        (nn.Hardtanh(), nn.ReLU6()),
    ],
    ids=str,
)
def test_relu6_in_front_of_a_concatenation(others: tuple[nn.Module, ...]) -> None:
    """If all inputs end at 6 like the grid, the convolutions clamp; otherwise a kernel clamps on the shared grid."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            activations = (nn.ReLU6(), *others)
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation) for activation in activations
            )
            self.head = nn.Conv2d(4 * len(activations), 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([branch(x) for branch in self.branches], 1))

    converted = convert(Branches(), (4 * torch.randn(8, 3, 8, 8),))
    assert all(row.quantized for row in converted.coverage)
    assert all(check.sqnr_db > 60 for check in converted.checks)


def test_a_buffer_of_an_inner_module_that_forward_does_not_read_is_kept() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("unread", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    network = nn.Sequential(Inner(), nn.ReLU())
    keys = list(network.state_dict())
    prepared = FxMode().prepare(network, Example((torch.randn(2, 4),)), Recipe("fx", "x86"))
    assert [key for key in prepared.state_dict() if key in keys] == keys


@pytest.mark.parametrize("module", [False, True])
def test_a_pad_of_minus_infinity_in_front_of_a_max_pool_leaves_the_layer_behind_int8(module: bool) -> None:
    class PadsForPooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.pad = nn.ConstantPad2d((0, 1, 0, 1), float("-inf"))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            x = self.pad(x) if module else F.pad(x, (0, 1, 0, 1), value=float("-inf"))
            return self.last(F.max_pool2d(x, 3, 2))

    converted = convert(PadsForPooling(), (torch.randn(2, 3, 8, 8),))
    assert all(row.quantized for row in converted.coverage)
