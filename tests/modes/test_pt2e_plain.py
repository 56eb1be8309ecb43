"""Mode pt2e without a compiler: oneDNN's int8 kernels for plain tensors replace decomposed layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, Scheme, calibrate, convert, prepare
from qat_lightning.artifact.frozen import CALLS_BEFORE
from qat_lightning.modes.decomposed import int8
from qat_lightning.modes.decomposed.lowering import on_plain_kernels
from qat_lightning.modes.decomposed.plain import PlainLayer, in_order
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import get_backend
from tests.support.exactness import SEVEN_BITS


class Residual(nn.Module):
    """A sum whose first operand is not quantized, pooling, and a linear layer on three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.relu(x + self.second(x))
        result: Tensor = self.head(x.flatten(2).transpose(1, 2))
        return result


class Viewed(nn.Module):
    """Code that relies on the memory format of a convolution's output."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1), nn.Linear(36, 4)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        result: Tensor = self.head(self.look(x))
        return result


def _view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


def _strided(x: Tensor) -> Tensor:
    return x.as_strided((x.size(0), 36), (36, 1))


def _complex_of_channels(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.cat([x, x], 3)[..., :2]).abs().flatten(1)[:, :12].repeat(1, 3)


def _as_integers(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], 3).view(torch.int16).float().flatten(1)[:, :36] / 2**15


def _permuted(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().view(x.size(0), -1)


LOOKS = (_view, _strided, _complex_of_channels, _as_integers, _permuted)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "residual": (Residual, (3, 8, 8), 3),
    "strides and dilations": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 1), (2, 1), (1, 0)), nn.Conv2d(4, 4, 3, dilation=2), nn.ReLU()),
        (3, 12, 12),
        2,
    ),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)), (8, 8, 8), 2),
    "without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, bias=False)),
        (3, 8, 8),
        2,
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), (3, 12), 2),
    "perceptron": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)), (8,), 2),
    "sums": (lambda: Sums(), (3, 8, 8), 5),
    "ReLU6": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)), (3, 8, 8), 2),
}


def made(case: str, scheme: Scheme | None = None) -> tuple[Any, Tensor]:
    """Weights have 7 bits, which oneDNN multiplies exactly on every CPU."""
    torch.manual_seed(0)
    build, shape, _ = CASES[case]
    x = torch.randn(6, *shape)
    prepared = prepare(build(), Example((x,)), Recipe("pt2e", "x86", scheme or SEVEN_BITS, kind="static"))
    calibrate(prepared, [x])
    return convert(prepared, Example((x,))), x


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("case", list(CASES))
def test_layers_compute_what_the_decomposed_graph_computes(case: str, granularity: Any) -> None:
    network, x = made(case, replace(SEVEN_BITS, weight_granularity=granularity))
    decomposed = network.network.decomposed
    kernels = on_plain_kernels(decomposed, [x], get_backend("x86", "pt2e"))
    layers = [module for module in kernels.modules() if isinstance(module, PlainLayer)]
    assert len(layers) == CASES[case][2]
    for rows in (1, 5):
        other = torch.randn(rows, *x.shape[1:])
        assert sqnr_db(decomposed(other)[0], kernels(other)[0]) > 50


@pytest.mark.parametrize("look", LOOKS)
def test_code_finds_the_memory_format_that_it_was_captured_with(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "viewed", (lambda: Viewed(look), (3, 8, 8), 3))
    network, x = made("viewed")
    decomposed = network.network.decomposed
    kernels = on_plain_kernels(decomposed, [x], get_backend("x86", "pt2e"))
    assert sum(isinstance(module, PlainLayer) for module in kernels.modules()) >= 2
    for rows in (1, 5):
        other = torch.randn(rows, *x.shape[1:])
        assert sqnr_db(decomposed(other)[0], kernels(other)[0]) > 50


def test_only_layers_whose_strides_are_read_change_their_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for look in (_view, lambda x: x.flatten(1)):
        monkeypatch.setitem(CASES, "viewed", (lambda look=look: Viewed(look), (3, 8, 8), 3))
        network, x = made("viewed")
        kernels = on_plain_kernels(network.network.decomposed, [x], get_backend("x86", "pt2e"))
        found.append(len(kernels.graph.find_nodes(op="call_function", target=in_order)))
    assert found == [1, 0]


def test_no_tensor_has_a_dtype_that_torch_deprecates() -> None:
    network, x = made("residual")
    kernels = on_plain_kernels(network.network.decomposed, [x], get_backend("x86", "pt2e"))
    dtypes = set()

    class Dtypes(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            dtypes.update(leaf.dtype for leaf in (value,) if isinstance(leaf, Tensor))
            return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dtypes(kernels).run(x)
    assert torch.uint8 in dtypes
    assert not dtypes & {torch.quint8, torch.qint8, torch.qint32}


def test_a_layer_that_computes_something_else_stays_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made("perceptron")
    decomposed = network.network.decomposed
    right = PlainLayer.forward

    def wrong(self: PlainLayer, input: Tensor) -> Tensor:
        return right(self, input) + (7 if len(self.scales) == 16 else 0)

    monkeypatch.setattr(PlainLayer, "forward", wrong)
    kernels = on_plain_kernels(decomposed, [x], get_backend("x86", "pt2e"))
    assert sum(isinstance(module, PlainLayer) for module in kernels.modules()) == 1
    assert sqnr_db(decomposed(x)[0], kernels(x)[0]) > 50


def test_what_an_op_gets_wrong_behind_a_layer_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made("perceptron")
    decomposed = network.network.decomposed
    right = PlainLayer.forward

    def wrong(self: PlainLayer, input: Tensor) -> Tensor:
        return right(self, input) + (7 if self.output is not None else 0)

    monkeypatch.setattr(PlainLayer, "forward", wrong)
    kernels = on_plain_kernels(decomposed, [x], get_backend("x86", "pt2e"))
    behind = [module.behind for module in kernels.modules() if isinstance(module, PlainLayer)]
    assert [(one.activation, one.output) for one in behind] == [("relu", None), ("none", None)]
    assert sqnr_db(decomposed(x)[0], kernels(x)[0]) > 50


class Sums(nn.Module):
    """A tensor that the first sum adds is read again later, and that of the second is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.three, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(x + self.one(x))
        y = F.relu(self.three(F.relu(self.two(y))) + y)
        result: Tensor = self.last(torch.cat([x, y], 1))
        return result


def test_sums_are_part_of_convolutions_and_write_over_nothing_that_is_read() -> None:
    network, x = made("sums")
    kernels = on_plain_kernels(network.network.decomposed, [x], get_backend("x86", "pt2e"))
    behind = [module.behind for module in kernels.modules() if isinstance(module, PlainLayer)]
    assert [(one.activation, one.added is not None) for one in behind] == [
        ("relu", False),
        ("relu", True),
        ("relu", False),
        ("relu", True),
        ("none", False),
    ]
    assert [one.copies for one in behind if one.added is not None] == [True, False]
    first = kernels(x)[0]
    assert torch.equal(kernels(x)[0], first)
    assert sqnr_db(network.network.decomposed(x)[0], first) > 50


def test_an_activation_of_two_limits_is_part_of_its_layer() -> None:
    network, x = made("ReLU6")
    kernels = on_plain_kernels(network.network.decomposed, [x], get_backend("x86", "pt2e"))
    layers = [module for module in kernels.modules() if isinstance(module, PlainLayer)]
    assert [(layer.behind.activation, layer.output is None) for layer in layers] == [
        ("hardtanh", False),
        ("none", True),
    ]
    assert not kernels.graph.find_nodes(op="call_function", target=torch.ops.aten.hardtanh.default)


def test_without_a_compiler_they_run_and_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made("residual")
    expected = network(x)
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")

    def fails(*given: Any) -> Any:
        raise RuntimeError("no g++")

    monkeypatch.setattr(int8, "compile_library", fails)
    with pytest.warns(UserWarning, match=r"not compiled\. It runs one int8 kernel at a time, because .*no g\+\+"):
        first = network(x)
    assert network.network.runs == "onednn"
    assert sqnr_db(expected, first) > 50
    for _ in range(CALLS_BEFORE + 3):
        assert torch.equal(network(x), first)
    assert [found is not None for found in network._frozen._made.values()] == [True]
