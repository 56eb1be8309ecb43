"""Bits within limits: converted networks keep the limits, and the printed choice reproduces them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose
from hydra.utils import instantiate
from torch import Tensor, nn

from qat_lightning import Scheme, sensitivity
from qat_lightning.artifact import artifact_size_mb
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.plain import convert, prepare
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.sensitivity import BitChoice, BitLimits, Sensitivity
from qat_lightning.sensitivity.__main__ import main
from qat_lightning.sensitivity.bit_choice import Measured
from qat_lightning.sensitivity.bits import bits_within, bytes_in_file
from qat_lightning.sensitivity.draw import draw_bits
from tests.configs.conftest import composed  # noqa: F401 (a fixture)
from tests.sensitivity.test_command import FEW, run  # noqa: F401 (a fixture)
from tests.sensitivity.test_measured import data

pytest.importorskip("scipy")


class Perceptron(nn.Module):
    """Four layers; in the second, one weight is much larger than the rest of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 64)
        self.third, self.head = nn.Linear(64, 64), nn.Linear(64, 8)
        with torch.no_grad():
            self.second.weight[:, 0] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron()


def found(mode: str = "fx", **settings: Any) -> Sensitivity:
    return sensitivity(network(), data(), mode=mode, scheme=Scheme(weight_observer="min_max"), **settings)


def made_by_hand(result: Sensitivity, choice: BitChoice) -> tuple[float, float]:
    """The metric and size of a network prepared with the choice's overrides."""
    recipe = replace(result.recipe, scheme=replace(result.recipe.scheme, overrides=choice.overrides))
    prepared = prepare(network(), Example((data()[0],)), recipe)
    if recipe.kind == "static":
        calibrate(prepared, data())
    return result.measure(prepared), artifact_size_mb(convert(prepared, Example((data()[0],))))


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_size_is_kept_by_the_file_and_loses_less_than_the_same_bits_everywhere(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    result = found(mode)
    four, eight = bits_within(result, [4, 8], BitLimits(max_size_mb=1.0)).uniform
    limit = (four.size_mb + eight.size_mb) / 2
    choice = bits_within(result, [4, 8, "float"], BitLimits(max_size_mb=limit))
    assert choice.reached
    assert choice.measured.size_mb <= limit
    assert choice.bits["second"] != 4
    assert 4 in choice.bits.values()
    assert four.metric < choice.measured.metric
    metric, size = made_by_hand(result, choice)
    assert metric == pytest.approx(choice.measured.metric, abs=1e-3)
    assert size == pytest.approx(choice.measured.size_mb, rel=0.01)


class Around(nn.Module):
    """A product with an own weight, and a linear layer inside of the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(64, 16)), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(nn.functional.linear(x, self.weight)))


class Nested(nn.Module):
    """A layer that contains another one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.around, self.head = Around(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.around(x)))


LAYERS = ("first", "second", "third", "head")


@pytest.mark.parametrize(
    "overrides",
    [
        {**{f"net.{name}": {"weight_bits": 8} for name in LAYERS}, "net.*": {"weight_bits": 4}},
        {"net.*": {"weight_bits": 4, "weight_granularity": "per_tensor"}},
        {"net.third": {"weight_observer": "mse"}, "net.*d": {"weight_bits": 6, "weight_granularity": "per_tensor"}},
    ],
)
def test_each_layer_has_the_bits_of_the_choice_and_the_other_fields_of_its_override(overrides: dict[str, Any]) -> None:
    scheme = Scheme(weight_observer="min_max", overrides=overrides)
    result = sensitivity(network(), data(), mode="fx", scheme=scheme, prefix="net")
    four, eight = bits_within(result, [4, 8], BitLimits(max_size_mb=1.0)).uniform
    assert four.size_mb < eight.size_mb
    assert four.metric < eight.metric
    choice = bits_within(result, [4, 8], BitLimits(max_size_mb=(four.size_mb + eight.size_mb) / 2))
    assert choice.reached
    assert set(choice.bits.values()) == {4, 8}
    after = replace(scheme, overrides=choice.overrides)
    for name, bits in choice.bits.items():
        assert after.of(f"net.{name}") == replace(scheme.of(f"net.{name}"), weight_bits=bits)
    yaml.safe_dump(choice.overrides)


def test_a_layer_inside_of_another_has_its_own_bits() -> None:
    result = sensitivity(Nested(), data(), mode="fx", scheme=Scheme(weight_observer="min_max"))
    assert {"around", "around.fc"} <= {row.name for row in result.rows}
    choice = bits_within(result, [4, 8], BitLimits(max_size_mb=0.0066))
    assert choice.bits["around"] != choice.bits["around.fc"]
    after = replace(result.recipe.scheme, overrides=choice.overrides)
    assert {name: after.of(name).weight_bits for name in choice.bits} == choice.bits


def test_a_drop_is_kept_by_the_smallest_file() -> None:
    result = found()
    choice = bits_within(result, [2, 4, 8, "float"], BitLimits(max_drop=276.0))
    assert choice.reached
    assert choice.measured.metric >= 24.0
    assert choice.measured.size_mb < choice.uniform[-1].size_mb  # that of 8 bits
    assert {layer.name for layer in choice.layers} == set(choice.bits) == {"first", "second", "third", "head"}


def test_the_other_kinds_have_bits_by_budget() -> None:
    result = found("eager", kind="weight_only")
    choice = bits_within(result, [4, 8, "float"], BitLimits(max_drop=265.0))
    assert choice.reached
    assert made_by_hand(result, choice)[0] == pytest.approx(choice.measured.metric, abs=1e-3)


def test_a_latency_chooses_between_int8_and_float(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_lightning.sensitivity import bits

    times = {"first": 3.0, "second": 5.0, "third": -1.0, "head": 1.0}
    monkeypatch.setattr(bits, "float_times", lambda prepared, reference, names, example: times)
    monkeypatch.setattr(bits, "latency_ms", lambda *args: type("Latency", (), {"median_ms": 10.0}))
    choice = bits_within(found(), [8, "float"], BitLimits(max_latency_ms=10.0))
    assert choice.bits["second"] == 8
    assert choice.bits["third"] == "float"
    assert sum(times[name] for name, bits in choice.bits.items() if bits == "float") <= 0


@pytest.mark.slow
def test_times_of_layers_are_differences_of_networks_that_run() -> None:
    choice = bits_within(found(), [8, "float"], BitLimits(max_latency_ms=1000.0))
    assert choice.reached
    assert set(choice.bits.values()) == {"float"}  # loses nothing, and there is time enough
    times = [layer.time["float"] for layer in choice.layers]
    assert any(times)
    assert all(abs(time) < 100 for time in times)


def test_what_no_choice_keeps_is_said_with_the_nearest() -> None:
    choice = bits_within(found(), [4, 8], BitLimits(max_size_mb=0.001))
    assert not choice.reached
    assert set(choice.bits.values()) == {4}
    assert "MB too large" in choice.summary()


@pytest.mark.parametrize(
    ("candidates", "limits", "says"),
    [
        ([8], {"max_drop": 1.0}, "give two or more"),
        ([4, 16], {"max_drop": 1.0}, "give two or more"),
        (["float"], {"max_drop": 1.0}, "give two or more"),
        ([4, 8], {}, "There is no limit"),
        ([4, 8], {"max_size_mb": -1.0}, "max_size_mb=-1.0 is not valid"),
    ],
)
def test_what_is_no_choice_is_refused(candidates: Any, limits: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        bits_within(found(), candidates, BitLimits(**limits))


def test_bytes_are_those_of_the_file() -> None:
    sizes = [artifact_size_mb(_of_bits(bits)) for bits in (4, 8)]
    layers = list(network().children())
    expected = sum(bytes_in_file(layer, 8) - bytes_in_file(layer, 4) for layer in layers)
    assert (sizes[1] - sizes[0]) * 1e6 == pytest.approx(expected, rel=0.02)


def _of_bits(bits: int) -> nn.Module:
    result = found()
    recipe = replace(result.recipe, scheme=Scheme(weight_bits=bits))
    prepared = prepare(network(), Example((data()[0],)), recipe)
    calibrate(prepared, data())
    return convert(prepared, Example((data()[0],)))


def test_the_excess_is_in_the_unit_of_each_limit() -> None:
    limits = BitLimits(max_drop=0.01, max_size_mb=1.0, max_latency_ms=5.0)
    measured = Measured("chosen", 0.97, 1.5, 4.0)
    assert limits.excess(0.99, measured) == {"drop": pytest.approx(0.01), "size": 0.5}


def test_a_run_gets_bits_a_picture_and_an_override_that_makes_them(
    run: Path,  # noqa: F811
    composed: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    few = [word for word in FEW if word != "--no-plot"]
    words = ["--metric", "sqnr", "--bits", "4", "8", "float", "--max-size-mb", "0.026", *few]
    assert main([str(run), *words]) == 0
    out = capsys.readouterr().out
    with (run / "sensitivity" / "bits.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = {f"net.{row['layer']}": row["chosen"] for row in rows}
    assert "4" in chosen.values()
    assert (run / "sensitivity" / "bits.png").stat().st_size > 10_000
    override = next(line for line in out.splitlines() if line.startswith("python train.py '"))[17:-1]
    scheme = instantiate(composed("method=ptq", override).quantization).scheme
    assert {name: str(scheme.of(name).weight_bits) for name in chosen if chosen[name] != "float"} == {
        name: bits for name, bits in chosen.items() if bits != "float"
    }
    written = yaml.safe_load((run / "sensitivity" / "mixed_bits.yaml").read_text())
    assert written["quantization"]["scheme"]["overrides"] == scheme.overrides
    assert compose("config", ["method=ptq", override])


def test_options_that_do_not_go_together_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for words, says in (
        (["--max-size-mb", "1"], "is for --bits"),
        (["--bits", "4", "8"], "There is no limit"),
        (["--bits", "4", "8", "--min-size-ratio", "3"], "give --max-size-mb"),
    ):
        assert main([str(run), *words, *FEW]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_the_picture_has_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for limits in (BitLimits(max_drop=270.0), BitLimits(max_size_mb=0.001)):
        draw_bits(bits_within(found(), [4, 8], limits), tmp_path / "bits.png")
        assert (tmp_path / "bits.png").stat().st_size > 10_000
