"""Timing saved int8 networks and their float networks again, alternately."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from torch import Tensor, nn, randn

from qat_lightning.artifact import save_quantized
from qat_lightning.compare import Run, compare
from qat_lightning.compare.remeasure import _inputs, float_network, remeasure
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from tests.artifact.making import quantize
from tests.compare.making import plain, qat
from tests.support.networks import Plain

MODEL = {"model": {"module": {"_target_": "tests.support.networks.Plain"}}}


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


class Repeated(Plain):
    """A network that does something several times, which its `repr` does not show."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x.sin()
        return super().forward(x)


def saved(folder: Path, mode: str, side: int = 8, **config: object) -> Run:
    path = folder / f"{mode}-{side}.int8"
    save_quantized(quantize(mode, "x86", Plain(), lambda count: ((randn(count, 3, side, side),), {})), path)
    run = qat(mode, latency=500.0)
    return replace(run, config=run.config | MODEL | config, model_file=str(path))


def test_every_int8_file_and_float_get_new_latencies(tmp_path: Path) -> None:
    floating = plain()
    floating = replace(floating, config=floating.config | MODEL)
    runs = [saved(tmp_path, "fx"), saved(tmp_path, "eager"), floating, qat("pt2e")]
    said: list[str] = []
    fx, eager, float_run, without = remeasure(runs, said.append, rounds=3)
    for run in (fx, eager):
        assert 0 < run.metrics["int8/latency_ms"] < 100
        assert run.metrics["speedup"] == pytest.approx(run.metrics["float/latency_ms"] / run.metrics["int8/latency_ms"])
        assert run.metrics["int8/test/acc"] == 0.97
        assert "latency_spread" in run.metrics
    assert fx.metrics["float/latency_ms"] == eager.metrics["float/latency_ms"] == float_run.metrics["float/latency_ms"]
    assert not [key for key in without.metrics if "latency" in key], "it has no file, so what it has is of another time"
    assert {c.label for c in compare([fx, eager, float_run]).configurations} == {"qat fx", "qat eager", "float"}


def test_without_a_float_network_int8_is_timed_alone(tmp_path: Path) -> None:
    run = saved(tmp_path, "fx")
    broken = replace(run, config={"model": {"_target_": "tests.support.networks.Nothing"}})
    said: list[str] = []
    (found,) = remeasure([broken], said.append, rounds=3)
    assert "int8/latency_ms" in found.metrics
    assert "speedup" not in found.metrics
    assert any("float network cannot be made" in text for text in said)
    assert float_network(replace(run, config={"lr": 0.1})) is None


def test_a_file_that_cannot_be_loaded_is_said_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.int8").write_bytes(b"x")
    said: list[str] = []
    with pytest.raises(ConfigurationError, match="found no int8 file"):
        remeasure([replace(qat("fx"), model_file=str(tmp_path / "bad.int8"))], said.append)
    assert any("not an int8 network" in text for text in said)


def test_a_float_run_has_the_latency_of_the_network_with_its_own_input_size(tmp_path: Path) -> None:
    sizes = [{"data": {"image_size": side}} for side in (8, 64)]
    small, large = (saved(tmp_path, "fx", **size, side=size["data"]["image_size"]) for size in sizes)
    floats = [replace(plain(), config=plain().config | MODEL | size) for size in sizes]
    *int8, small_float, large_float = remeasure([small, large, *floats], print, rounds=3)
    found = [run.metrics["float/latency_ms"] for run in (small_float, large_float)]
    assert found == [run.metrics["float/latency_ms"] for run in int8]
    assert found[0] < found[1]


def test_networks_with_other_settings_are_timed_apart_although_they_look_alike(tmp_path: Path) -> None:
    target = "tests.compare.test_remeasure.Repeated"
    models = [{"model": {"module": {"_target_": target, "times": times}}} for times in (1, 500)]
    once, often = remeasure([saved(tmp_path, "fx", **model) for model in models], print, rounds=3)
    assert 2 * once.metrics["float/latency_ms"] < often.metrics["float/latency_ms"]


def test_inputs_without_a_batch_of_other_lengths_are_not_the_same_inputs() -> None:
    assert _inputs(Example((randn(4, 3),))) == _inputs(Example((randn(8, 3),))), "samples of the same shape"
    assert _inputs(Example((randn(4, 3), randn(5)))) != _inputs(Example((randn(4, 3), randn(6))))


class OfFour(Plain):
    """A network that takes four samples only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(4, x.shape[0] // 4, -1)


def test_a_network_that_cannot_run_one_sample_costs_no_other_its_timing(tmp_path: Path) -> None:
    path = tmp_path / "four.int8"
    save_quantized(quantize("fx", "x86", OfFour(), lambda _: ((randn(4, 3, 8, 8),), {})), path)
    four = replace(qat("fx"), config=MODEL, model_file=str(path))
    float_of_four = {"model": {"module": {"_target_": f"{__name__}.OfFour"}}}
    said: list[str] = []
    runs = [four, saved(tmp_path, "fx"), replace(saved(tmp_path, "fx"), config=float_of_four)]
    first, second, third = remeasure(runs, said.append, rounds=3)
    assert "int8/latency_ms" not in first.metrics
    assert {"int8/latency_ms", "float/latency_ms"} <= second.metrics.keys()
    assert "int8/latency_ms" in third.metrics
    assert "float/latency_ms" not in third.metrics
    faults = [text for text in said if "machine is busy" not in text]
    assert len(faults) == 2
    assert "four.int8 is not timed: it cannot run one sample (" in faults[0]
    assert "the float network is not timed: it cannot run one sample (RuntimeError" in faults[1]


class Parts(LightningModule):
    """Part of its network is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Plain(), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize("where", ["callbacks.qat", "quantization", "logged"])
def test_the_float_network_is_the_part_that_was_quantized(where: str) -> None:
    target = {"_target_": "qat_lightning.QuantizationAwareTraining", "module": "net.0"}
    sections = {"callbacks.qat": {"callbacks": {"qat": target}}, "quantization": {"quantization": target}}
    config = sections.get(where, {"quantization/method": "QuantizationAwareTraining", "quantization/module": "net.0"})
    run = Run("a", "a", config=config | {"model": {"_target_": f"{__name__}.Parts"}})
    assert isinstance(float_network(run), Plain)
