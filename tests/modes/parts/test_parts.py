"""Mode parts on plain modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, calibrate, convert, load_quantized, prepare
from qat_lightning.errors import ArtifactError, CombinationError, NetworkError, VerificationError
from qat_lightning.export.formats import check_formats
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.parts import check
from qat_lightning.modes.parts.mode import PartsMode
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import cpu_copy, prepared_parts
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.auto import decide
from qat_lightning.rehearsal.rehearse import rehearse
from tests.modes.parts.networks import Decoder, Detector

CALL = Example((torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),))
STEPS = Example((torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),))
RECIPE = Recipe("parts", "x86")


def _prepared(network: nn.Module, call: Example, recipe: Recipe = RECIPE) -> nn.Module:
    prepared = prepare(network, call, recipe)
    calibrate(prepared, [call])
    return prepared


def test_the_network_stays_the_users_own_with_a_graph_under_each_name_of_a_part() -> None:
    network = Detector()
    keys, order = set(network.state_dict()), [name for name, _ in network.named_parameters()]
    prepared = prepare(network, CALL, RECIPE)
    assert prepared is network
    assert prepared.same is prepared.head
    assert list(prepared_parts(prepared)) == ["body", "head"]
    assert keys <= set(prepared.state_dict())
    assert [name for name, _ in prepared.named_parameters()] == order
    assert [key for key in prepared.state_dict() if "_quantization." in key] == ["_quantization._extra_state"]
    assert [place.layer for place in find_places(prepared) if place.what == "weight"] == ["body.0", "head.0", "head.2"]


def test_a_part_counts_as_often_as_it_is_called_and_the_code_around_it_too() -> None:
    class Products(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            steps = super().forward(x)
            return steps @ steps.transpose(1, 2)

    torch.manual_seed(0)
    found = rehearse(Products(), STEPS, RECIPE)
    macs = {row.name: (row.quantized, row.macs) for row in found.coverage if row.macs}
    assert macs == {
        "encoder.0": (True, 96),
        "encoder.2": (True, 128),
        "cell.0": (True, 3 * 256),
        "cell.2": (True, 3 * 128),
        "": (False, 72),
    }
    assert (found.parts, found.unsaved) == (("encoder", "cell"), "")


def test_layers_outside_of_the_parts_say_why_they_are_float() -> None:
    class Weighted(Detector):
        def forward(self, images: Tensor, wanted: Tensor | None = None) -> Tensor | list[Tensor]:
            self.spare(images[:, 0, 0, :4] * float(self.spare.weight.mean()))
            return super().forward(images, wanted)

    found = rehearse(Weighted(), CALL, Recipe("parts", "x86", exclude=("body*",)))
    reasons = {row.name: row.reason for row in found.coverage if row.what == "layer" and not row.quantized}
    assert reasons["body.0"] == "excluded"
    assert reasons["spare"].startswith("outside of the parts 'head': code outside of it also uses attributes")


def test_a_file_needs_the_network_that_was_quantized(tmp_path: Path) -> None:
    class Other(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.head[0] = nn.Conv2d(8, 8, 1)

    int8 = convert(_prepared(Detector(), CALL), CALL)
    int8.save(tmp_path / "a.int8")
    loaded = load_quantized(tmp_path / "a.int8", Detector())
    x = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(one, other) for one, other in zip(int8(x), loaded(x), strict=True))
    assert [row.name for row in loaded.coverage if row.quantized] == ["body.0", "head.0", "head.2"]
    for network, match in (
        (None, "a Detector as its code makes it"),
        (nn.Linear(2, 2), "other tensors"),
        (Other(), "of another shape"),
    ):
        with pytest.raises(ArtifactError, match=match):
            load_quantized(tmp_path / "a.int8", network)


def test_what_is_left_float_is_named_as_in_the_whole_and_comes_back_with_a_checkpoint() -> None:
    prepared = _prepared(Detector(), CALL)
    assert {"body.0", "head.0", "head.2"} <= set(PartsMode().parts(prepared))
    before = copy.deepcopy(prepared)
    assert leave_float(prepared, {"head.0": "a test", "nothing": "a test"}, CALL) == ["head.0"]
    int8 = convert(prepared, CALL)
    assert next((row.name, row.reason) for row in int8.coverage if not row.quantized) == ("head.0", "a test")
    before.load_state_dict(prepared.state_dict())
    assert {row.name for row in convert(before, CALL).coverage if row.quantized} == {"body.0", "head.2"}


def test_a_part_that_training_never_ran_stays_float_and_the_rest_is_int8() -> None:
    class Late(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x) if self.training else super().forward(x)

    torch.manual_seed(0)
    prepared = prepare(Late(), STEPS, RECIPE).train()
    prepared(*STEPS.args)
    int8 = convert(prepared, STEPS)
    assert {row.name: row.quantized for row in int8.coverage} == {
        "encoder.0": True,
        "encoder.2": True,
        "cell.0": False,
        "cell.2": False,
    }
    assert sqnr_db(cpu_copy(prepared)(*STEPS.args), int8(*STEPS.args)) > 20


def test_an_int8_network_that_is_wrong_as_a_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = _prepared(Decoder(), STEPS)
    plain = check.run

    def run(network: nn.Module, *args: object) -> object:
        result = plain(network, *args)
        return result if prepared_parts(network) else result + torch.randn_like(result)

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(VerificationError, match="as a whole does not compute"):
        PartsMode().convert(cpu_copy(prepared), STEPS)


def test_single_layers_are_left_to_mode_eager() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) if float(y.sum()) > -1e9 else y

    with pytest.raises(NetworkError, match=r"only single layers can \('a', 'b'\).*use mode='eager'"):
        prepare(Branches(), STEPS, RECIPE)
    assert decide("auto", Branches(), STEPS, lambda mode: Recipe(mode, "x86")).mode == "eager"


def test_auto_does_not_try_parts_where_the_whole_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PartsMode, "prepare", prepare)
    found = decide("auto", nn.Sequential(nn.Linear(6, 8)), STEPS, lambda mode: Recipe(mode, "x86"))
    assert found.mode == "fx"
    assert "parts" not in found.why


def test_formats_are_refused_in_words() -> None:
    with pytest.raises(CombinationError, match="keeps Python code between its graphs"):
        check_formats(["onnx"], RECIPE)
