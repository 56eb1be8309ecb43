"""Every mode × backend pair on every network, in one table, so that a new row is tested automatically."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, float_keys, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import BACKENDS, pairs
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import X86_LEAST_DB
from tests.support.networks import CASES, Case, train
from tests.support.targets import skipped_without

LEAST_DB = dict.fromkeys(BACKENDS, 60.0) | dict.fromkeys(("x86", "onednn"), X86_LEAST_DB)
LEAST_DB |= {"fbgemm": 50.0, "qnnpack": 50.0}
"""What each layer must reach on fake-quant's own input, by backend."""


def in_every_run(mode: str, backend: str) -> tuple[str, ...]:
    """The networks of a pair that run in the default test suite."""
    if (mode, backend) == ("pt2e", "x86"):
        return ("plain",)  # each of them is compiled
    return tuple(case.name for case in CASES) if backend == "x86" else ("plain", "depthwise", "attention")


TABLE = [
    pytest.param(
        mode,
        backend,
        case,
        id=f"{mode}-{backend}-{case.name}",
        marks=(
            *skipped_without(backend),
            *((pytest.mark.slow,) if case.name not in in_every_run(mode, backend) else ()),
        ),
    )
    for mode, backend in pairs()
    for case in CASES
    if mode in case.modes
]


PAIRS = [pytest.param(mode, backend, marks=skipped_without(backend)) for mode, backend in pairs()]


def layers_of(case: Case, backend: str) -> int:
    """Number of int8 layers of a network: Vulkan's quantizer supports linear layers only."""
    if backend != "vulkan":
        return case.layers
    return sum(isinstance(layer, nn.Linear) for layer in case.network().modules())


@pytest.fixture(scope="module")
def fitted() -> dict[tuple[str, str, str], tuple[nn.Module, nn.Module, Converted]]:
    """Float network, prepared network and conversion of each row, created once."""
    return {}


def _fit(cache: dict, mode: str, backend: str, case: Case) -> tuple[nn.Module, nn.Module, Converted]:
    key = (mode, backend, case.name)
    if key not in cache:
        torch.manual_seed(0)
        flow = get_mode(mode)
        network = case.network()
        before = copy.deepcopy(network)
        args, kwargs, _ = case.batch(8)
        prepared = flow.prepare(network, Example(args, kwargs), Recipe(mode, backend))
        set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
        train(prepared, case, steps=15)
        set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
        train(prepared, case, steps=15)
        args, kwargs, _ = case.batch(64)
        converted = flow.convert(cpu_copy(prepared), Example(args, kwargs))
        cache[key] = before, prepared, converted
    return cache[key]


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_int8_agrees_with_fake_quant(fitted: dict, mode: str, backend: str, case: Case) -> None:
    """Top-1 on 512 samples, of which a network that learned the task is certain."""
    _, prepared, converted = _fit(fitted, mode, backend, case)
    torch.manual_seed(1)
    args, kwargs, labels = case.batch(512)
    with torch.no_grad():
        expected = case.logits(cpu_copy(prepared)(*args, **kwargs))
        actual = case.logits(converted.network(*args, **kwargs))
    assert (expected.argmax(1) == actual.argmax(1)).float().mean() >= 0.995
    assert (actual.argmax(1) == labels).float().mean() > 0.8, "the int8 network did not learn the task"
    if (mode, backend) == ("pt2e", "x86") and onednn_is_exact():
        assert converted.network.runs == "aotinductor", converted.network.why_decomposed


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_each_layer_reproduces_fake_quant_on_its_own_input(fitted: dict, mode: str, backend: str, case: Case) -> None:
    _, _, converted = _fit(fitted, mode, backend, case)
    assert len(converted.checks) >= layers_of(case, backend)
    below = [check for check in converted.checks if check.sqnr_db < LEAST_DB[backend]]
    assert not below, below


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_layers_are_int8(fitted: dict, mode: str, backend: str, case: Case) -> None:
    _, _, converted = _fit(fitted, mode, backend, case)
    assert sum(row.quantized for row in converted.coverage) >= layers_of(case, backend)
    if backend == "vulkan":
        return  # convolutions stay float
    floats = sum(p.numel() for p in converted.network.parameters()) + sum(
        buffer.numel() for buffer in converted.network.buffers() if buffer.is_floating_point()
    )
    assert floats < 0.5 * sum(p.numel() for p in _fit(fitted, mode, backend, case)[0].parameters())


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_prepared_network_takes_float_weights_and_computes_as_float(
    fitted: dict, mode: str, backend: str, case: Case
) -> None:
    before, prepared, _ = _fit(fitted, mode, backend, case)
    prepared = copy.deepcopy(prepared)
    missing, unexpected = prepared.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected
    assert float_keys(prepared).isdisjoint(missing)
    set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
    torch.manual_seed(2)
    args, kwargs, _ = case.batch(16)
    for training in (False, True):
        before.train(training)
        prepared.train(training)
        torch.manual_seed(3)
        expected = case.logits(copy.deepcopy(before)(*args, **kwargs))
        torch.manual_seed(3)
        actual = case.logits(prepared(*args, **kwargs))
        assert sqnr_db(expected.detach(), actual.detach()) > 90, f"training={training}"


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_int8_takes_any_batch_size_and_is_copied_equal(fitted: dict, mode: str, backend: str, case: Case) -> None:
    _, _, converted = _fit(fitted, mode, backend, case)
    engine = BACKENDS[backend].engine
    before = torch.backends.quantized.engine
    for size in (1, 3):
        args, kwargs, _ = case.batch(size)
        assert case.logits(converted.network(*args, **kwargs)).shape[0] == size
    assert torch.backends.quantized.engine == before, f"{engine} was left as the engine of the process"


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_zero_batchnorm_weight_learns(fitted: dict, mode: str, backend: str) -> None:
    """Upstream divides by it, and the residual branch stays dead or becomes NaN."""
    case = next(case for case in CASES if case.name == "residual")
    before, prepared, _ = _fit(fitted, mode, backend, case)
    assert not before.get_parameter("bn2.weight").any()
    gamma = prepared.get_parameter("bn2.weight")
    assert torch.isfinite(gamma).all()
    assert gamma.abs().min() > 0


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_prepared_state_reloads_strictly(fitted: dict, mode: str, backend: str) -> None:
    case = next(case for case in CASES if case.name == "residual")
    _, prepared, _ = _fit(fitted, mode, backend, case)
    args, kwargs, _ = case.batch(8)
    fresh = get_mode(mode).prepare(case.network(), Example(args, kwargs), Recipe(mode, backend))
    fresh.load_state_dict(prepared.state_dict())
    prepared = copy.deepcopy(prepared)
    for network in (fresh, prepared):
        network.eval()
        set_phase(network, fake_quant=True, observers=False, batchnorm_frozen=False)
    with torch.no_grad():
        assert torch.equal(fresh(*args, **kwargs), prepared(*args, **kwargs))


LEAVING_FLOAT = [
    pytest.param(*row.values, id=row.id, marks=row.marks if row.values[1] == "x86" else (*row.marks, pytest.mark.slow))
    for row in TABLE
    if row.values[1] == "x86" or (row.values[2].name == "depthwise" and row.values[1] != "vulkan")
]


@pytest.mark.parametrize(("mode", "backend", "case"), LEAVING_FLOAT)
def test_any_layer_alone_may_stay_float(mode: str, backend: str, case: Case) -> None:
    """Whatever follows it, the rest is int8, and conversion compares each layer with fake-quant as usual."""
    flow = get_mode(mode)
    args, kwargs, _ = case.batch(8)
    example = Example(args, kwargs)
    layers = [name for name, layer in case.network().named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for name in layers if mode != "pt2e" else layers[:2]:
        prepared = flow.prepare(case.network(), example, Recipe(mode, backend, exclude=(name,)))
        set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
        train(prepared, case, steps=2)
        rows = {row.name: row for row in flow.convert(cpu_copy(prepared), example).coverage}
        assert not rows[name].quantized
        assert "exclude" in rows[name].reason
        assert any(row.quantized for row in rows.values())


def test_sqnr_of_equal_layers_is_infinite() -> None:
    """The reference of the table above is not a constant."""
    x = torch.randn(10)
    assert math.isinf(sqnr_db(x, x))
    assert sqnr_db(x, x + 0.1) < 30
