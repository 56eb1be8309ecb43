"""Every kind without calibration × mode × backend on every network, in one table."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_lightning import Scheme, load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import BACKENDS, pairs
from qat_lightning.settings.kinds import DIRECT, supported, table
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import needs_onednn
from tests.support.sequence_networks import CASES, SequenceCase

LEAST_DB = {"dynamic": 30.0, "weight_only": 38.0}
"""Of the whole network against the float one; what a kind costs, and far from what a wrong weight would."""

TABLE = [
    pytest.param(kind, mode, backend, case, id=f"{kind}-{mode}-{backend}-{case.name}")
    for kind in DIRECT
    for mode, backend in supported(kind)
    for case in CASES
    # float kernels run weights alone, whatever the backend: one of each mode will do
    if case.layers(kind, mode) and (kind == "dynamic" or backend == "x86")
]


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def _quantize(
    kind: str, mode: str, backend: str, case: SequenceCase, scheme: Scheme | None = None
) -> tuple[nn.Module, Converted, Recipe, Example]:
    network = case.network().eval()
    recipe = Recipe(mode, backend, scheme or Scheme(), kind=kind)
    example = Example((case.batch(4),))
    return network, quantize(network, example, recipe), recipe, example


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode", "backend", "case"), TABLE)
def test_network_is_integer_close_to_float_and_travels(
    kind: str, mode: str, backend: str, case: SequenceCase, tmp_path: Path
) -> None:
    network, converted, recipe, example = _quantize(kind, mode, backend, case)
    before = copy.deepcopy(network.state_dict())
    assert {row.name for row in converted.coverage if row.quantized} == case.layers(kind, mode)
    assert all(row.reason for row in converted.coverage if not row.quantized)
    assert {check.name for check in converted.checks} == case.layers(kind, mode)
    assert all(check.sqnr_db >= 60 for check in converted.checks), converted.checks

    quantized = QuantizedNetwork(converted, recipe, example)
    inputs = case.batch(9)
    actual = quantized(inputs)
    assert sqnr_db(network(inputs).detach(), actual) > LEAST_DB[kind]
    assert quantized(inputs[:1]).shape == (1, 5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    assert torch.equal(copy.deepcopy(quantized)(inputs), actual)
    quantized.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=case.network() if mode == "eager" else None)
    assert torch.equal(loaded(inputs), actual)
    assert loaded.recipe == recipe
    if case.name != "branches" and case.network.__name__ != "<lambda>":
        assert torch.equal(pickle.loads(pickle.dumps(quantized))(inputs), actual)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[6]], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16),
        Scheme(weight_bits=4, weight_symmetric=False),
        Scheme(weight_granularity="per_tensor"),
        Scheme(weight_bits=3, weight_observer="min_max"),
    ],
    ids=["4-bit groups", "4-bit affine", "per tensor", "3-bit"],
)
def test_weights_of_any_scheme(mode: str, case: SequenceCase, scheme: Scheme, tmp_path: Path) -> None:
    network, converted, recipe, example = _quantize("weight_only", mode, "x86", case, scheme)
    quantized, inputs = QuantizedNetwork(converted, recipe, example), case.batch(3)
    actual = quantized(inputs)
    assert sqnr_db(network(inputs).detach(), actual) > {3: 6.0, 4: 10.0, 8: 30.0}[scheme.weight_bits]
    quantized.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=case.network() if mode == "eager" else None)
    assert torch.equal(loaded(inputs), actual)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_four_bits_take_half_of_the_room(mode: str) -> None:
    from qat_lightning.artifact import artifact_size_mb

    network, example = (
        nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)),
        Example((torch.randn(4, 512),)),
    )
    sizes = []
    for bits in (8, 4):
        recipe = Recipe(mode, "x86", Scheme(weight_bits=bits, weight_observer="min_max"), kind="weight_only")
        sizes.append(artifact_size_mb(QuantizedNetwork(quantize(network, example, recipe), recipe, example)))
    floats = 2 * 512 * 513 * 4 / 1e6
    assert 3.7 < floats / sizes[0] < 4.05
    assert 7.0 < floats / sizes[1] < 8.1


@pytest.mark.parametrize(("key", "reason"), table().items())
def test_what_is_not_there_is_an_error_that_says_what_to_type(key: tuple[str, str, str], reason: str) -> None:
    kind, mode, backend = key
    if (mode, backend) in supported(kind):
        assert not reason
        return
    assert "use " in reason
    with pytest.raises(ConfigurationError, match="use "):
        quantize(nn.Linear(2, 2), Example((torch.randn(2, 2),)), Recipe(mode, backend, kind=kind))


def test_every_pair_but_those_of_other_runtimes_has_a_kind_without_calibration() -> None:
    without = {("pt2e", name) for name, backend in BACKENDS.items() if backend.own_grids or name == "tensorrt"}
    assert {pair for kind in DIRECT for pair in supported(kind)} == set(pairs()) - without
    assert len(without) == 7


def test_graph_modes_refuse_control_flow() -> None:
    case = CASES[-1]
    for mode in ("fx", "pt2e"):
        with pytest.raises(TraceError, match="mode='eager'"):
            _quantize("dynamic", mode, "x86", case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
@needs_onednn
def test_pt2e_compiles(kind: str, case: SequenceCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    _, converted, recipe, example = _quantize(kind, "pt2e", "x86", case)
    quantized, inputs = QuantizedNetwork(converted, recipe, example), case.batch(9)
    actual = quantized(inputs)
    assert converted.network.runs == "aotinductor", converted.network.why_decomposed
    assert sqnr_db(converted.network.decomposed(inputs)[0], actual) > 45
    assert quantized(inputs[:2]).shape == (2, 5)


class ActivationsAndAdditions(nn.Module):
    """Linear layers with activations whose outputs are added, which torchao's own fusion does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)) + x
        x = torch.nn.functional.gelu(self.second(x)) + torch.tanh(self.first(x))
        return x + self.second(x)


@pytest.mark.slow
@needs_onednn
def test_pt2e_compiles_activations_that_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    x = torch.randn(4, 16)
    converted = quantize(ActivationsAndAdditions(), Example((x,)), Recipe("pt2e", "x86", kind="dynamic"))
    actual = converted.network(x)
    assert converted.network.runs == "aotinductor", converted.network.why_decomposed
    assert sqnr_db(converted.network.decomposed(x)[0], actual) > 45
