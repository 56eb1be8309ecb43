"""Matrices for rotations: orthogonal for each size, with entries of similar magnitude."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.recipes.hadamard import hadamard, rotation

SIZES = st.integers(1, 400)


@given(SIZES)
def test_it_is_orthogonal_and_flat(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-9


@given(SIZES, st.booleans())
def test_a_rotation_is_orthogonal_and_the_same_at_each_call(size: int, keeps_ones: bool) -> None:
    matrix = rotation(size, keeps_ones=keeps_ones)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.equal(matrix, rotation(size, keeps_ones=keeps_ones))
    if keeps_ones:
        ones = torch.ones(size, dtype=torch.float64)
        torch.testing.assert_close(matrix @ ones, ones, atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 24, 28, 64, 128, 384, 576, 768, 1152])
def test_hadamards_matrix_is_taken_where_it_is_known(size: int) -> None:
    torch.testing.assert_close(hadamard(size).abs() * size**0.5, torch.ones(size, size, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 384, 768])
def test_one_large_channel_is_spread_over_all(size: int) -> None:
    one = torch.zeros(size, dtype=torch.float64)
    one[size // 3] = 1
    for keeps_ones in (False, True):
        assert float((one @ rotation(size, keeps_ones=keeps_ones)).abs().max()) < 3 / size**0.5
