"""Sensitive layers are found in networks made to have one; budgets are kept, or reported as not kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Scheme, sensitivity
from qat_lightning.demos import SmallMobileNet
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.sensitivity import Budget, Sensitivity
from qat_lightning.sensitivity.draw import draw
from qat_lightning.sensitivity.switches import Switches
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import Residual

COARSE = Scheme(weight_bits=4, weight_granularity="per_tensor", weight_observer="min_max")


class Perceptron(nn.Module):
    """Three layers; in the second, one weight is much larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.second.weight[0, 0] = 20.0

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x))))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 16, generator=generator) for _ in range(2)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron()


TOKENS = Scheme(weight_bits=4, activation_granularity="per_token")


@pytest.mark.parametrize(("kind", "scheme"), [("dynamic", TOKENS), ("weight_only", COARSE)])
def test_kinds_without_calibration_are_ranked_on_their_own_grids(kind: Any, scheme: Scheme) -> None:
    found = sensitivity(network(), data(), mode="eager", scheme=scheme, kind=kind)
    assert found.recipe.kind == kind
    rows, alone = {row.name: row for row in found.rows}, network()
    assert set(rows) == {"first", "second", "third"}
    made = quantize(alone, Example((data()[0],)), replace(found.recipe, include=("second",)))
    wanted = sqnr_db(*(torch.cat([net(x) for x in data()]) for net in (alone, made.network)))
    assert rows["second"].alone == pytest.approx(wanted, abs=0.1)


class Agreement:
    """The share of samples with a reference's top class, as a metric."""

    def __init__(self, reference: nn.Module) -> None:
        self.batches = data()
        self.calls = 0
        self.wanted = self.choices(reference)

    @torch.no_grad()
    def choices(self, net: nn.Module) -> Tensor:
        return torch.cat([net(x).argmax(1) for x in self.batches])

    def __call__(self, net: nn.Module) -> float:
        self.calls += 1
        return float((self.choices(net) == self.wanted).float().mean())


def found(mode: str, **settings: object) -> tuple[Sensitivity, Agreement]:
    net = network()
    metric = Agreement(net)
    return sensitivity(
        net, data(), mode=mode, scheme=COARSE, metric=metric, metric_name="agreement", **settings
    ), metric


def measured_with(mode: str, metric: Agreement, **selection: tuple[str, ...]) -> float:
    """The metric of a network prepared by hand in this way."""
    recipe = Recipe(mode, "x86", COARSE, kind="static", **selection)
    prepared = get_mode(mode).prepare(network(), Example((data()[0],)), recipe)
    calibrate(prepared, data())
    return metric(prepared)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize("rank_by", ["alone", "without"])
def test_the_layer_that_hurts_is_first(mode: str, rank_by: str) -> None:
    result, _ = found(mode, rank_by=rank_by)
    assert result.float_metric == 1.0
    assert result.rows[0].name == "second"
    assert result.rows[0].alone < 0.9
    layers = [row for row in result.rows if row.parameters]
    assert {row.name for row in layers} == {"first", "second", "third"}
    assert result.rows == sorted(result.rows, key=lambda row: -row.loss)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_budget_is_kept_by_a_network_that_is_really_prepared_so(mode: str) -> None:
    result, metric = found(mode)
    plan = result.within(Budget(max_drop=0.1))
    assert plan.reached
    assert "second" in plan.exclude
    assert plan.metric == measured_with(mode, metric, exclude=plan.exclude) >= 0.9
    assert plan.quantized_metric == measured_with(mode, metric) < 0.9
    assert plan.override() == f"quantization.exclude=[{','.join(plan.exclude)}]"


def test_no_layer_is_excluded_where_none_has_to_be() -> None:
    plan = found("fx")[0].within(Budget(max_drop=1.0))
    assert plan.exclude == ()
    assert plan.reached


def test_a_budget_that_cannot_be_kept_is_said_to_be() -> None:
    plan = found("fx")[0].within(Budget(max_drop=0.0, min_size_ratio=6.0))
    assert not plan.reached
    assert plan.size_ratio >= 6.0
    assert "where at most 0 pp is allowed" in plan.why_not
    assert plan.summary().startswith("No choice of layers keeps the budget")
    impossible = found("fx")[0].within(Budget(min_size_ratio=9.0))
    assert "times smaller, where 9 is the least" in impossible.why_not


def test_what_need_not_be_float_is_quantized_again() -> None:
    """An order by name among insensitive layers has no effect: only the sensitive layer is left float."""
    result, _ = found("eager")
    result.rows.sort(key=lambda row: row.name == "second")
    plan = result.within(Budget(max_drop=0.15))
    assert plan.reached
    assert plan.exclude == ("second",)


def test_the_size_limits_what_stays_float() -> None:
    result, _ = found("fx")
    free = result.within(Budget(max_drop=0.0))
    limited = result.within(Budget(min_size_ratio=1.5))
    assert limited.size_ratio >= 1.5
    assert limited.metric >= limited.quantized_metric
    assert len(limited.exclude) <= len(free.exclude)
    weights = {"first": 512, "second": 1024, "third": 256}
    total = sum(weights.values()) + 32 + 32 + 8
    quantized = sum(size for name, size in weights.items() if name not in limited.exclude)
    assert limited.size_ratio == pytest.approx(32 * total / (32 * (total - quantized) + 4 * quantized))


def test_the_network_is_left_as_it_is_and_prepared_once() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    sensitivity(net, data())
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    result, metric = found("fx")
    assert metric.calls == 2 + 2 * len(result.rows)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_switching_all_off_is_the_float_network(mode: str) -> None:
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(8, 3, 8, 8)
    prepared = get_mode(mode).prepare(copy.deepcopy(net), Example((x,)), Recipe(mode, "x86", kind="static"))
    calibrate(prepared, [x])
    switches = Switches(prepared)
    assert {unit.name for unit in switches.units if unit.parameters} == {"stem", "conv1", "conv2", "head"}
    with torch.no_grad():
        rounded = prepared(x)
        switches.only([])
        torch.testing.assert_close(prepared(x), net(x), rtol=1e-4, atol=1e-5)
        switches.all_but([])
        assert torch.equal(prepared(x), rounded)


def test_the_default_metric_is_the_outputs_noise() -> None:
    result = sensitivity(network(), data(), scheme=COARSE)
    assert result.float_metric == 300.0
    assert result.metric_name == "SQNR of the outputs in dB"
    assert result.rows[0].name == "second"
    assert result.table().row_count == len(result.rows)


def test_steps_that_would_learn_are_calibrated() -> None:
    found = [
        sensitivity(network(), data(), scheme=Scheme(weight_bits=4, learned_step=step)) for step in ("lsq", "none")
    ]
    assert found[0].rows == found[1].rows
    assert found[0].recipe == found[1].recipe
    assert "instead of learned_step='lsq'" in found[0].notes[0]
    assert not found[1].notes


def mobile() -> tuple[nn.Module, list[Tensor]]:
    """Inverted residuals with ReLU6, as if trained, and images."""
    torch.manual_seed(0)
    net = SmallMobileNet(width=8).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 4.0)
    return net, [torch.randn(16, 1, 8, 8) for _ in range(2)]


def convert_without(exclude: Sequence[str]) -> None:
    """Prepare, calibrate and convert in mode fx, and compare the result with fake-quant."""
    net, images = mobile()
    recipe = Recipe("fx", "x86", Scheme(weight_bits=4), exclude=tuple(exclude), kind="static")
    prepared = get_mode("fx").prepare(net, Example((images[0],)), recipe, prefix="net")
    calibrate(prepared, images)
    converted = get_mode("fx").convert(cpu_copy(prepared), Example((images[0],)))
    rows = {f"net.{row.name}": row for row in converted.coverage}
    assert {name for name, row in rows.items() if not row.quantized} == set(exclude) & set(rows)
    with torch.no_grad():
        assert sqnr_db(prepared(images[1]), converted.network(images[1])) > (40 if onednn_is_exact() else 35)


@pytest.fixture(scope="module")
def ranked_mobile() -> Sensitivity:
    net, images = mobile()
    return sensitivity(net, images, mode="fx", scheme=Scheme(weight_bits=4), prefix="net")


@pytest.mark.slow
def test_what_is_chosen_converts(ranked_mobile: Sensitivity) -> None:
    plan = ranked_mobile.within(Budget(min_size_ratio=3.0))
    assert plan.reached
    assert plan.exclude
    convert_without(plan.exclude)


@pytest.mark.slow
def test_every_list_that_could_be_chosen_converts(ranked_mobile: Sensitivity) -> None:
    names = [f"net.{row.name}" for row in ranked_mobile.rows if row.excludable]
    for count in range(1, len(names)):
        convert_without(names[:count])


def test_names_are_relative_to_the_lightning_module(tmp_path: Path) -> None:
    result, _ = found("fx", prefix="net")
    plan = result.within(Budget(max_drop=0.1))
    assert "net.second" in plan.exclude
    plan.write(tmp_path / "mixed.yaml")
    text = (tmp_path / "mixed.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert "    - net.second\n" in text


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(found("fx")[0], tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": torch.randn(4, 16)}, "give a list of calls"),
        ({"rank_by": "size"}, "rank_by='size'"),
        ({"exclude": ["nothing*"]}, "matches no module"),
        ({"mode": "xla"}, "mode='xla' is unknown"),
        ({"metric": lambda net: float("nan")}, "The metric is nan"),
    ],
)
def test_what_is_not_possible_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sensitivity(network(), settings.pop("batches", data()), **settings)


@pytest.mark.parametrize("limits", [{}, {"max_drop": -0.1}, {"min_size_ratio": 0.5}, {"max_drop": "1"}])
def test_budgets_are_checked(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Budget(**limits)


def test_batches_with_labels_are_refused_in_words() -> None:
    with pytest.raises(ConfigurationError, match=r"too many positional arguments.*\[x for x, _ in loader\]"):
        sensitivity(nn.Sequential(nn.Linear(4, 2)), [(torch.randn(8, 4), torch.zeros(8))])


def test_the_best_mode_is_taken_where_it_is_left_open() -> None:
    found = sensitivity(nn.Sequential(nn.Linear(4, 2)), [torch.randn(8, 4)], mode="auto")
    assert found.recipe.mode in ("eager", "fx", "pt2e")
    assert any(found.recipe.mode in note for note in found.notes)
