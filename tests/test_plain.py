"""The functions for plain networks, without Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, Scheme, calibrate, convert, export_quantized, prepare, quantize
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.export.program import int8_network
from qat_lightning.modes.eager.mode import EagerMode
from qat_lightning.modes.prepared import prepared_state


class Difference(nn.Module):
    """Reads two inputs, as attention and siamese networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x) - self.second(y)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_tensor_given_for_two_inputs_is_two_inputs(mode: str) -> None:
    torch.manual_seed(0)
    x, y, network = torch.randn(8, 4), torch.randn(8, 4), Difference()
    expected = network(x, y)
    prepared = prepare(network, Example((x, x)), Recipe(mode, "x86", kind="static"))
    calibrate(prepared, [Example((x, y))])
    torch.testing.assert_close(prepared(x, y), expected, atol=0.1, rtol=0)
    torch.testing.assert_close(convert(prepared, Example((x, x)))(x, y), expected, atol=0.1, rtol=0)


class Frozen(nn.Module):
    """Its backbone stays in evaluation, with a dropout in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Dropping(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_part_in_evaluation_stays_there(mode: str) -> None:
    network = Frozen().train()
    network.backbone.eval()
    x = torch.randn(8, 4)
    prepared = prepare(network, Example((x,)), Recipe(mode, "x86"))
    assert prepared.training
    assert not prepared.get_submodule("backbone").training
    assert torch.equal(prepared(x), prepared(x)), "nothing is dropped"


def test_an_export_leaves_float_what_a_conversion_leaves_float(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 4)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prepared = prepare(network, Example((x,)), Recipe("eager", "x86", kind="static"))
    calibrate(prepared, [x])
    plain = EagerMode.convert

    def refuses(self: EagerMode, prepared: nn.Module, example: Example) -> object:
        if "2" not in prepared_state(prepared).left_float:
            raise ConversionError("Layer '2' has no kernel on this day")
        return plain(self, prepared, example)

    monkeypatch.setattr(EagerMode, "convert", refuses)
    int8 = int8_network(prepared, Example((x,)))
    assert [row.quantized for row in int8.coverage] == [True, False]
    assert "2" not in prepared_state(prepared).left_float, "the prepared network is not changed"


@pytest.mark.parametrize("form", [torch.Tensor, tuple, list, dict, Example], ids=lambda form: form.__name__)
def test_a_call_is_given_in_any_form(form: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    call = {torch.Tensor: x, tuple: (x,), list: [x], dict: {"input": x}, Example: Example((x,))}[form]
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prepared = prepare(network, call, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [call])
    int8 = convert(prepared, call)
    assert int8.coverage[0].quantized
    (result,) = export_quantized(int8, tmp_path, ["torchscript"], example=call, batches=[call], min_agreement=0)
    assert not result.error
    assert quantize(network, call, Recipe("eager", "x86", kind="dynamic")).coverage[0].quantized


class WithFunction(nn.Module):
    """A linear function between layers, which training does not round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.head = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.first(x).relu(), self.weight))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_what_was_prepared_for_a_kind_without_calibration_is_what_becomes_integer(kind: Any, trained: bool) -> None:
    torch.manual_seed(0)
    call = Example((torch.randn(8, 8),))
    prepared = prepare(WithFunction(), call, Recipe("fx", "x86", kind=kind, trained=trained))
    converted = convert(prepared, call)
    assert {row.name: row.quantized for row in converted.coverage} == {"first": True, "head": True, "": False}
    assert converted.recipe.trained
    torch.testing.assert_close(converted(*call.args), prepared(*call.args), atol=1e-4, rtol=0)


@pytest.mark.parametrize("function", [prepare, quantize])
@pytest.mark.parametrize(
    ("swap", "says"),
    [
        (
            lambda network, example, recipe: (network, example, "weight_only"),
            "The recipe is 'weight_only': give a Recipe as",
        ),
        (
            lambda network, example, recipe: (network, recipe, example),
            "The recipe is a Tensor: give a Recipe as the third",
        ),
        (lambda network, example, recipe: (network, example, Scheme()), "The recipe is a Scheme"),
        (
            lambda network, example, recipe: (example, network, recipe),
            "The network is a Tensor: give an nn.Module as the",
        ),
        (lambda network, example, recipe: (type(network), example, recipe), "The network is a type"),
    ],
)
def test_swapped_arguments_are_named(function: Any, swap: Any, says: str) -> None:
    arguments = nn.Linear(4, 2), torch.randn(4, 4), Recipe("eager", "x86", kind="dynamic")
    with pytest.raises(ConfigurationError, match=says):
        function(*swap(*arguments))


def test_what_was_not_prepared_is_not_converted() -> None:
    with pytest.raises(ConfigurationError, match="Linear was not prepared"):
        convert(nn.Linear(4, 2), torch.randn(4, 4))


def test_static_quantization_without_ranges_names_the_steps_that_give_them() -> None:
    network, x, recipe = nn.Linear(4, 2), torch.randn(4, 4), Recipe("fx", "x86", kind="static")
    with pytest.raises(
        ConfigurationError, match=r"prepare\(.*calibrate\(prepared, batches\).*convert\(prepared, example\)"
    ):
        quantize(network, x, recipe)
    prepared = prepare(network, x, recipe)
    calibrate(prepared, [x])
    assert all(row.quantized for row in convert(prepared, x).coverage)


@pytest.mark.parametrize("network", ["old.int8", Path("old.int8")])
def test_an_export_of_a_path_names_the_function_that_loads_it(network: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'old\.int8' is neither an int8 network .*load_quantized\(path\)"):
        export_quantized(network, tmp_path, ["torchscript"])
