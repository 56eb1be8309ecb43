"""Learned rounding is never worse than rounding to nearest, stays on the grid, and survives conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.adaround import AdaRound, adaround
from qat_lightning.recipes.layers import rounded_layers
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.recipes.test_bias_correction import MODES, prepare
from tests.support.networks import CASES

CASE = {case.name: case for case in CASES}


@settings(max_examples=12, deadline=None)
@given(
    bits=st.integers(2, 8),
    per_channel=st.booleans(),
    symmetric=st.booleans(),
    observer=st.sampled_from(["min_max", "mse"]),
    seed=st.integers(0, 99),
)
def test_a_layer_is_never_worse_and_its_grid_stays(
    bits: int, per_channel: bool, symmetric: bool, observer: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(12, 6))
    x = torch.randn(64, 4) @ torch.randn(4, 12)  # correlated, so that errors can cancel
    with torch.no_grad():
        network[0].weight[2] = 0  # a dead channel
    scheme = Scheme(
        weight_bits=bits,
        weight_granularity="per_channel" if per_channel else "per_tensor",
        weight_symmetric=symmetric,
        weight_observer=observer,
    )
    prepared = get_mode("eager").prepare(network, Example((x,)), Recipe("eager", "x86", scheme, kind="static"))
    (layer,) = rounded_layers(prepared)
    reference = layer.folded()
    nearest = layer.rounded()
    scale, zero_point = (value.clone() for value in layer.fq.calculate_qparams())
    result = adaround(prepared, [x], AdaRound(iterations=150))["0"]
    rounded = layer.rounded()
    again = layer.fq.calculate_qparams()
    torch.testing.assert_close(again[0], scale, rtol=1e-5, atol=0)
    assert torch.equal(again[1], zero_point)
    # Up or down, and no further.
    step = scale.reshape(-1, 1) if per_channel else scale
    assert ((rounded - nearest).abs() <= 1.001 * step).all()

    def error(weight: Tensor) -> float:
        return float(((weight - reference) @ x.T).square().mean())

    assert error(rounded) <= error(nearest) * 1.0001
    assert result.learned <= result.nearest
    assert (result.flipped == 0) == torch.equal(rounded, nearest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "depthwise", "functional", "attention"])
@pytest.mark.parametrize("mode", MODES)
def test_networks_of_every_mode_come_nearer_and_convert(mode: str, name: str) -> None:
    prepared, batches = prepare(mode, CASE[name], bits=3)
    seen: list[str] = []
    results = adaround(prepared, batches, AdaRound(200), progress=lambda n, of, name, result: seen.append(name))
    assert set(results) == {layer.name for layer in rounded_layers(prepared)} == set(seen)
    assert all(result.learned <= result.nearest for result in results.values())
    assert any(result.learned < 0.9 * result.nearest for result in results.values())
    for layer in rounded_layers(prepared):
        # The stored weight is on the grid, but for the ends, which decide it.
        off = (layer.folded() - layer.rounded()).abs()
        scale, _ = layer.fq.calculate_qparams()
        assert float((off > 0.01 * scale.max()).float().mean()) < 0.5
    with torch.no_grad():
        for batch in batches:
            assert torch.isfinite(prepared(*batch.args)).all()
    before = {layer.name: layer.rounded() for layer in rounded_layers(prepared)}
    converted = get_mode(mode).convert(cpu_copy(prepared), batches[0])
    with torch.no_grad():
        expected, got = prepared(*batches[0].args), converted.network(*batches[0].args)
    assert float((expected - got).norm() / expected.norm()) < 0.1
    assert all(torch.equal(layer.rounded(), before[layer.name]) for layer in rounded_layers(prepared))


def test_without_data_and_malformed_settings() -> None:
    prepared, _ = prepare("eager", CASE["plain"])
    with pytest.raises(ConversionError, match="at least one batch"):
        adaround(prepared, [])
    for values in (
        {"iterations": 0},
        {"batch_size": 1.5},
        {"learning_rate": 0},
        {"regularization": -1},
        {"warm_up": 1},
    ):
        with pytest.raises(ConfigurationError, match=rf"adaround\.{next(iter(values))}="):
            AdaRound(**values)  # type: ignore[arg-type]
