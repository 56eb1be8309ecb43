"""Rounding to the range of each call."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from qat_lightning.numerics.dynamic_fake_quantize import (
    DynamicFakeQuantize,
    DynamicGranularity,
    disturbed_roundings,
    round_dynamically,
)


@given(
    rows=st.integers(1, 5),
    values=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 300.0]),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["per_tensor", "per_token"]),
)
def test_no_value_moves_by_more_than_a_step_of_its_grid_and_every_gradient_passes(
    rows: int, values: int, seed: int, scale: float, shift: float, symmetric: bool, granularity: DynamicGranularity
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randn(rows, values, generator=generator) + shift) * scale).requires_grad_()
    rounded = round_dynamically(x, granularity, symmetric=symmetric)
    slope = torch.randn(x.shape, generator=generator)
    rounded.backward(slope)
    assert torch.equal(x.grad, slope)
    assert ((rounded - x).abs() <= 1.001 * _step(x.detach(), granularity, symmetric=symmetric)).all()


def _step(x: Tensor, granularity: DynamicGranularity, *, symmetric: bool) -> Tensor:
    rows = x if granularity == "per_token" else x.reshape(1, -1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    return torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_the_values_are_those_of_torchs_fake_quantize(granularity: DynamicGranularity) -> None:
    x = torch.randn(6, 16) + 0.5
    rounded = round_dynamically(x, granularity)
    for given_rows, found in zip(
        *((x, rounded) if granularity == "per_token" else (x[None], rounded[None])), strict=True
    ):
        scale, zero_point = torch._choose_qparams_per_tensor(given_rows, False)
        expected = torch.fake_quantize_per_tensor_affine(given_rows, scale, zero_point - 128, -128, 127)
        assert torch.allclose(found, expected, atol=1e-6)


def test_roundings_can_be_disturbed_where_the_inputs_of_a_network_are_integers() -> None:
    network = nn.Sequential(nn.Embedding(8, 16), DynamicFakeQuantize())
    tokens = torch.arange(8)
    expected = network(tokens)
    with disturbed_roundings(lambda x: x * 1.01):
        assert not torch.equal(network(tokens), expected)
    assert torch.equal(network(tokens), expected)
