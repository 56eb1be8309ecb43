"""What a rehearsal finds before training: that everything works, or which layers stay float and why."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic.quantized as nniq
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from qat_lightning import calibrate
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConversionError, NetworkError, QuantizationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.compile_switch import without_compiling
from qat_lightning.modes.decomposed import int8
from qat_lightning.modes.eager.mode import EagerMode
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal import auto
from qat_lightning.rehearsal.auto import Decision, decide
from qat_lightning.rehearsal.faults import convert_what_can_be, first_that
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import Residual

MODES = ("eager", "fx", "pt2e")
CALL = Example((torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))


@functools.cache
def _prepared_once(mode: str) -> nn.Module:
    prepared = get_mode(mode).prepare(_network(), CALL, Recipe(mode, "x86"))
    calibrate(prepared, [CALL])
    return prepared


def _prepared(mode: str) -> nn.Module:
    return copy.deepcopy(_prepared_once(mode))


@pytest.fixture
def saturating_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the layer with 7 outputs halves its outputs."""
    plain = nniq.LinearReLU.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        y = plain(self, x)
        if self.out_features != 7:
            return y
        return torch.quantize_per_tensor(y.dequantize() / 2, y.q_scale(), y.q_zero_point(), y.dtype)

    monkeypatch.setattr(nniq.LinearReLU, "forward", forward)


def _refuse(monkeypatch: pytest.MonkeyPatch, mode: str, *names: str) -> None:
    """Make conversion fail without naming a layer, unless these layers are left float."""
    flow = type(get_mode(mode))
    plain = flow.convert

    def convert(self: Any, prepared: nn.Module, example: Example) -> Any:
        if not set(names) <= set(prepared_state(prepared).left_float):
            raise KeyError("somewhere upstream")
        return plain(self, prepared, example)

    monkeypatch.setattr(flow, "convert", convert)


@pytest.mark.parametrize("mode", MODES)
def test_a_network_without_faults_is_int8_as_a_whole_and_stays_as_it_was(mode: str) -> None:
    network = _network()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    found = rehearse(network, CALL, Recipe(mode, "x86"))
    assert (found.left_float, found.int8_macs, found.unsaved) == ({}, 1.0, "")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_every_kind_can_be_rehearsed(kind: str) -> None:
    assert rehearse(_network(), CALL, Recipe("fx", "x86", kind=kind)).int8_macs == 1.0


@pytest.mark.usefixtures("saturating_kernel")
@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_layer_whose_kernel_is_wrong_stays_float_alone(mode: str) -> None:
    found = rehearse(_network(), CALL, Recipe(mode, "x86"), prefix="net")
    assert list(found.left_float) == ["2"]
    rows = {row.name: row for row in found.coverage if row.what == "layer"}
    assert [name for name, row in rows.items() if not row.quantized] == ["2"]
    assert "differs from fake-quant" in rows["2"].reason


@pytest.mark.usefixtures("saturating_kernel")
def test_a_fault_is_refused_where_that_is_asked_for_with_remedies_that_work_when_typed() -> None:
    with pytest.raises(ConversionError) as caught:
        rehearse(_network(), CALL, Recipe("fx", "x86"), prefix="net", on_fault="error")
    assert "net.2" in str(caught.value)
    assert "exclude=['net.2']" in str(caught.value)
    again = rehearse(_network(), CALL, Recipe("fx", "x86", exclude=("net.2",)), prefix="net", on_fault="error")
    assert again.left_float == {}


@pytest.mark.usefixtures("saturating_kernel")
def test_a_network_with_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(NetworkError, match="No layer of Sequential can be int8"):
        rehearse(nn.Sequential(nn.Linear(6, 7), nn.ReLU()), CALL, Recipe("fx", "x86"))


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_that_no_error_names_is_found_by_bisection(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(monkeypatch, mode, "2")
    prepared = _prepared(mode)
    found = convert_what_can_be(prepared, CALL)
    assert list(found.left_float) == ["2"]
    assert "somewhere upstream" in found.left_float["2"]
    assert [row.name for row in found.converted.coverage if not row.quantized] == ["2"]


def test_two_faults_are_both_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(monkeypatch, "fx", "0", "4")
    assert set(convert_what_can_be(_prepared("fx"), CALL).left_float) == {"0", "4"}


def test_what_fails_whatever_is_float_raises_its_own_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(monkeypatch, "fx", "a layer that is not there")
    prepared = _prepared("fx")
    with pytest.raises(KeyError, match="somewhere upstream"):
        convert_what_can_be(prepared, CALL)
    assert prepared_state(prepared).left_float == {}


@pytest.mark.parametrize("names", [["0"], ["2"], ["2", "4"]])
@pytest.mark.parametrize("mode", MODES)
def test_int8_equals_fake_quant_around_what_is_left_float(mode: str, names: list[str]) -> None:
    prepared = _prepared(mode)
    assert leave_float(prepared, dict.fromkeys(names, "a test"), CALL) == names
    converted = get_mode(mode).convert(cpu_copy(prepared), CALL)
    with torch.no_grad(), without_compiling():
        assert sqnr_db(cpu_copy(prepared)(*CALL.args), converted.network(*CALL.args)) > 60
    assert {row.name for row in converted.coverage if not row.quantized} == set(names)
    assert {row.reason for row in converted.coverage if not row.quantized} == {"a test"}
    assert {row.name for row in get_mode(mode).coverage(cpu_copy(prepared), CALL) if not row.quantized} == set(names)


def test_an_op_can_be_left_float_by_itself() -> None:
    call = Example((torch.randn(4, 3, 16, 16),))
    prepared = get_mode("fx").prepare(Residual(), call, Recipe("fx", "x86"))
    calibrate(prepared, [call])
    (op,) = [name for name in get_mode("fx").parts(prepared) if name.startswith("add")][:1]
    leave_float(prepared, {op: "a test"}, call)
    converted = get_mode("fx").convert(cpu_copy(prepared), call)
    assert [row.reason for row in converted.operations if row.name == op] == ["a test"]
    with torch.no_grad():
        assert sqnr_db(cpu_copy(prepared)(*call.args), converted.network(*call.args)) > 60


@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_float_is_in_the_state_and_comes_back_with_it(mode: str) -> None:
    prepared = _prepared(mode)
    leave_float(prepared, {"2": "a test"}, CALL)
    other = _prepared(mode)
    other.load_state_dict(prepared.state_dict())
    assert prepared_state(other).left_float == {"2": "a test"}
    with torch.no_grad():
        assert torch.equal(cpu_copy(other)(*CALL.args), cpu_copy(prepared)(*CALL.args))
    found = convert_what_can_be(other, CALL)
    assert [row.name for row in found.converted.coverage if not row.quantized] == ["2"]


def test_inspection_sees_the_int8_network_and_what_it_has_to_compute() -> None:
    seen: list[tuple[QuantizedNetwork, nn.Module]] = []
    rehearse(_network(), CALL, Recipe("fx", "x86"), inspect=lambda int8, wanted: seen.append((int8, wanted)))
    ((int8, wanted),) = seen
    with torch.no_grad():
        assert sqnr_db(cpu_copy(wanted)(*CALL.args), int8(*CALL.args)) > 60


@pytest.mark.parametrize(("wanted", "compiler", "runs"), [("1", False, "onednn"), ("1", True, ""), ("0", False, "")])
def test_a_rehearsal_runs_what_will_run(
    wanted: str, compiler: bool, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", wanted)
    monkeypatch.setattr(int8, "has_cpp_compiler", lambda: compiler)
    monkeypatch.setattr(int8, "overflowing_layer", lambda decomposed: "")
    ran: list[Any] = []
    rehearse(_network(), CALL, Recipe("pt2e", "x86"), inspect=lambda quantized, _: ran.append(quantized.network))
    assert ran[0].runs == (runs or "not compiled yet")


def test_auto_takes_the_first_mode_where_everything_is_int8() -> None:
    found = decide("auto", _network(), CALL, lambda mode: Recipe(mode, "x86"))
    assert found.mode == "fx"
    assert len(found.why.splitlines()) == 1


def test_auto_takes_the_mode_with_more_multiply_accumulates_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(monkeypatch, "fx", "2")
    found = decide("auto", _network(), CALL, lambda mode: Recipe(mode, "x86"))
    assert (found.mode, found.left_float) == ("eager", {})
    assert len(found.why.splitlines()) == 2
    assert "fx: 62.4 % of the multiply-accumulates" in found.why


def test_a_mode_that_fails_names_one_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) > -1e9 else x

    with pytest.raises(QuantizationError, match="Tried on this network: mode='eager' works"):
        decide("fx", Branches(), CALL, lambda mode: Recipe(mode, "x86"))
    assert decide("eager", Branches(), CALL, lambda mode: Recipe(mode, "x86")) == Decision(
        "eager", "", {}, rehearse(Branches(), CALL, Recipe("eager", "x86"))
    )


def test_bisection_takes_as_many_trials_as_it_has_to() -> None:
    trials: list[int] = []

    def holds(count: int) -> bool:
        trials.append(count)
        return count >= 700

    assert first_that(holds, 1000) == 700
    assert len(trials) == 10


def test_auto_rehearses_each_mode_once_and_shows_the_chosen_networks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(monkeypatch, "fx", "2")
    prepared, plain = [], EagerMode.prepare

    def prepare(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        prepared.append(args)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(EagerMode, "prepare", prepare)
    seen: list[QuantizedNetwork] = []
    found = decide(
        "auto", _network(), CALL, lambda mode: Recipe(mode, "x86"), inspect=lambda int8, _: seen.append(int8)
    )
    assert (found.mode, len(prepared)) == ("eager", 1)
    assert [network.recipe.mode for network in seen] == ["eager"]


def test_auto_inspects_nothing_where_no_kernel_runs_the_scheme() -> None:
    seen: list[QuantizedNetwork] = []
    simulated = Scheme(activation_bits=4)
    found = decide(
        "auto", _network(), CALL, lambda mode: Recipe(mode, "x86", simulated), inspect=lambda int8, _: seen.append(int8)
    )
    assert found.mode == "fx"
    assert seen == []


def test_auto_shows_networks_of_a_mode_that_another_one_surpassed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that is close to the best comes first in the order, also if the best was tried after it."""
    shares = {"fx": 0.900, "eager": 0.905, "pt2e": 0.912}
    plain = auto.rehearse

    def rehearse(network: nn.Module, example: Any, recipe: Recipe, **settings: Any) -> Any:
        found = plain(network, example, replace(recipe, mode="eager"), **settings)
        return replace(found, int8_macs=shares[recipe.mode])

    monkeypatch.setattr(auto, "rehearse", rehearse)
    seen: list[QuantizedNetwork] = []
    found = decide(
        "auto", _network(), CALL, lambda mode: Recipe(mode, "x86"), inspect=lambda int8, _: seen.append(int8)
    )
    assert found.mode == "eager"
    assert len(seen) == 1


def test_a_mode_that_makes_nothing_int8_is_not_what_an_error_suggests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    network = nn.Sequential(weight_norm(nn.Conv1d(4, 8, 3)), nn.LeakyReLU(), weight_norm(nn.Conv1d(8, 4, 3)))
    said = r"mode='fx' works, with nothing in int8; mode='pt2e' works \(100 % of"
    with pytest.raises(QuantizationError, match=said):
        decide("eager", network, Example((torch.randn(4, 4, 12),)), lambda mode: Recipe(mode, "x86"))
