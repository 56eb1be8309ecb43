"""Int8 weights run the fastest kernel that computes the same integers on this CPU."""

from __future__ import annotations

import copy
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, Scheme, calibrate, convert, load_quantized, prepare
from qat_lightning.layers.kernels import Grouping, choose_kernels, engine_of
from qat_lightning.settings import engines
from tests.support.exactness import SEVEN_BITS

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="FBGEMM and oneDNN are the engines of x86"
)

CHANNELS = 96
IMAGES = torch.rand(1, CHANNELS, 57, 57, generator=torch.Generator().manual_seed(0))


class TensorFlowPadding(nn.Module):
    """A depthwise convolution after a pad of its own, as in networks ported from TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, groups=CHANNELS)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.depthwise(self.pad(x)))
        return result


def weight(largest: int, *, zero_point: int = 0) -> Tensor:
    return torch.quantize_per_tensor(torch.tensor([[largest / 10, 0.0]]), 0.1, zero_point, torch.qint8)


def grouping(**other: Any) -> Grouping:
    depthwise: dict[str, Any] = dict.fromkeys(("stride", "padding", "dilation"), (1, 1))
    depthwise |= {"channels": (1, 1), "groups": 16, "kernel": (3, 3)}
    return Grouping(**depthwise | other)


@pytest.mark.parametrize(
    "other",
    [
        {"padding": (0, 0)},
        {"groups": 58},
        {"kernel": (1, 3), "padding": (0, 1)},
        {"dilation": (2, 2)},
        {"channels": (24, 24)},
        {"channels": (8, 8), "kernel": (5, 5), "padding": (2, 2)},
    ],
    ids=str,
)
def test_groups_without_a_kernel_of_fbgemm_run_onednn_if_that_is_exact(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine_of(weight(64), "fbgemm", grouping(**other)) == "onednn"
    assert engine_of(weight(64, zero_point=1), "fbgemm", grouping(**other)) == "fbgemm", "oneDNN needs zero points of 0"
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: False)
    assert engine_of(weight(64), "fbgemm", grouping(**other)) == "onednn"
    assert engine_of(weight(65), "fbgemm", grouping(**other)) == "fbgemm", "it would overflow"


@pytest.mark.parametrize(
    "other",
    [{}, {"stride": (2, 2)}, {"kernel": (7, 7), "padding": (3, 3)}, {"channels": (8, 8)}, {"channels": (2, 4)}],
    ids=str,
)
def test_other_layers_of_fbgemm_keep_its_kernels(other: dict[str, Any]) -> None:
    assert engine_of(weight(64), "fbgemm", grouping(**other)) == "fbgemm"
    assert engine_of(weight(64), "fbgemm") == "fbgemm"


def test_qnnpack_stands_in_only_for_weights_that_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: False)
    assert [engine_of(weight(largest), "onednn") for largest in (64, 65)] == ["onednn", "qnnpack"]
    assert engine_of(weight(64), "onednn", grouping(channels=(2, 2))) == "qnnpack", "oneDNN is slow there"
    assert engine_of(weight(64), "qnnpack") == "qnnpack", "a backend that the user chose"
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: True)
    assert [engine_of(weight(largest), "onednn") for largest in (64, 65)] == ["onednn", "onednn"]


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_depthwise_convolution_after_a_pad_is_fast_with_fbgemm(mode: str, tmp_path: Path) -> None:
    made = quantized(TensorFlowPadding(), IMAGES, Recipe(mode, "fbgemm", kind="static"))
    assert [row.quantized for row in made.coverage if row.what == "layer"] == [True]
    made.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=TensorFlowPadding())
    slow = copy.deepcopy(made.network)
    with engines.packing_engine("fbgemm"):  # a plain copy packs for the engine of the backend
        slow = copy.deepcopy(slow)
    expected, step = seconds(slow), slow(IMAGES).unique().diff().min()
    for network in (made, loaded, copy.deepcopy(made)):
        off = (network(IMAGES) - slow(IMAGES)).abs()
        assert off.max() <= 1.01 * step, "oneDNN and FBGEMM multiply by scales in another order, so ties may differ"
        assert off.count_nonzero() <= 1e-4 * off.numel()
        assert seconds(network) < expected / 4


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_weights_of_7_bits_run_onednn_on_every_cpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: False)
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    images = torch.rand(4, 8, 8, 8)
    seven = quantized(network, images, Recipe(mode, "x86", SEVEN_BITS, kind="static"))
    assert set(choose_kernels(seven.network, "onednn").values()) == {"onednn"}
    assert len(choose_kernels(seven.network, "onednn")) == 2
    mixed = Scheme(overrides={"0": {"weight_bits": 4}})
    eight = quantized(network, images, Recipe(mode, "x86", mixed, kind="static"))
    assert len(choose_kernels(eight.network, "onednn")) == 1, "the other has 8 bits"
    assert not seven.recipe.detour
    assert "QNNPACK" in eight.recipe.detour


def quantized(network: nn.Module, images: Tensor, recipe: Recipe) -> Any:
    torch.manual_seed(0)
    prepared = prepare(copy.deepcopy(network).eval(), Example((images,)), recipe)
    calibrate(prepared, [images])
    return convert(prepared, Example((images,)))


def seconds(network: nn.Module) -> float:
    """The fastest of several calls, in CPU time."""
    found = []
    with torch.inference_mode():
        for _ in range(8):
            began = time.process_time()
            network(IMAGES)
            found.append(time.process_time() - began)
    return min(found)
