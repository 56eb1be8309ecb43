"""Every mode × backend pair with other schemes than the default: int8 equals fake-quant, on the scheme's grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qat_lightning.errors import ConversionError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.backends import BACKENDS
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.modes.test_every_pair import LEAST_DB, PAIRS, layers_of
from tests.support.networks import CASES, train
from tests.support.targets import skipped_without

SCHEMES = {
    "w4": Scheme(weight_bits=4),
    "w2": Scheme(weight_bits=2),
    "per_tensor": Scheme(weight_granularity="per_tensor"),
    "symmetric": Scheme(activation_symmetric=True),
    "lsq": Scheme(weight_bits=4, learned_step="lsq"),
}
SIMULATED = {
    "a4": Scheme(activation_bits=4),
    "a16": Scheme(activation_bits=16),
    "w4a16 lsq+": Scheme(weight_bits=4, activation_bits=16, learned_step="lsq+"),
    "w4a4 lsq+": Scheme(weight_bits=4, activation_bits=4, learned_step="lsq+"),
    "affine weights": Scheme(weight_symmetric=False),
    "affine weights per tensor": Scheme(weight_symmetric=False, weight_granularity="per_tensor", weight_bits=6),
}
DEPTHWISE = next(case for case in CASES if case.name == "depthwise")


def fit(mode: str, backend: str, scheme: Scheme) -> Any:
    torch.manual_seed(0)
    args, kwargs, _ = DEPTHWISE.batch(8)
    prepared = get_mode(mode).prepare(DEPTHWISE.network(), Example(args, kwargs), Recipe(mode, backend, scheme))
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    train(prepared, DEPTHWISE, steps=8)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    train(prepared, DEPTHWISE, steps=8)
    return prepared


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_int8_is_what_fake_quant_was(mode: str, backend: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")  # the graph is what is looked at; others test it compiled
    prepared = fit(mode, backend, scheme)
    args, kwargs, _ = DEPTHWISE.batch(64)
    converted = get_mode(mode).convert(cpu_copy(prepared), Example(args, kwargs))
    assert sum(row.quantized for row in converted.coverage) == layers_of(DEPTHWISE, backend)
    # On a coarse grid a single rounding costs more decibels.
    below = [check for check in converted.checks if check.sqnr_db < LEAST_DB[backend] and not check.max_steps <= 1.01]
    assert not below, below
    with torch.no_grad():
        expected, actual = cpu_copy(prepared)(*args, **kwargs), converted.network(*args, **kwargs)
    assert (expected.argmax(1) == actual.argmax(1)).float().mean() >= 0.98
    largest = Recipe(mode, backend, scheme).weight_quant_max
    for weight in _integers(converted.network):
        assert weight.abs().max() <= largest
        assert weight.unique().numel() <= 2 * largest + 1


WITH_16_BITS = [
    pytest.param(backend.name, marks=skipped_without(backend.name))
    for backend in BACKENDS.values()
    if 16 in backend.activation_bits
]


@pytest.mark.parametrize("backend", WITH_16_BITS)
def test_targets_that_have_them_take_16_bit_activations(backend: str) -> None:
    prepared = fit("pt2e", backend, Scheme(activation_bits=16))
    grids = {str(fq.dtype) for _, fq in fake_quantizers(prepared)}
    assert grids == {"torch.int16", "torch.int8"}
    args, kwargs, _ = DEPTHWISE.batch(64)
    converted = get_mode("pt2e").convert(cpu_copy(prepared), Example(args, kwargs))
    assert all(row.quantized for row in converted.coverage)
    assert min(check.sqnr_db for check in converted.checks) >= LEAST_DB[backend]


def _integers(network: Any) -> list[torch.Tensor]:
    packed = [
        layer.weight().int_repr().int()
        for module in network.modules()
        for layer in (module, getattr(module, "op", None))
        if callable(getattr(layer, "weight", None))
    ]
    plain = [buffer.int() for buffer in network.buffers() if buffer.dtype == torch.int8 and buffer.dim() > 1]
    assert packed or plain
    return packed or plain


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SIMULATED.values(), ids=SIMULATED.keys())
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_what_no_kernel_runs_trains_on_its_grid_and_is_not_converted(mode: str, scheme: Scheme) -> None:
    prepared = fit(mode, "x86", scheme)
    args, kwargs, labels = DEPTHWISE.batch(64)
    copied = cpu_copy(prepared)
    accuracy = (copied(*args, **kwargs).argmax(1) == labels).float().mean()
    assert accuracy > (0.3 if scheme.activation_bits < 8 else 0.6)
    for _, fq in fake_quantizers(prepared):
        bits = scheme.weight_bits if fq.source == "present" else scheme.activation_bits
        assert fq.quant_max - fq.quant_min + 1 <= 2**bits
    with pytest.raises(ConversionError, match="simulated in training and has no int8 network"):
        get_mode(mode).convert(copied, Example(args, kwargs))
