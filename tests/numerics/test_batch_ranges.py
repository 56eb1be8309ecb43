"""Ranges of single batches from histograms, and their moving average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qat_lightning.numerics.batch_ranges import (
    BINS,
    SAMPLED,
    batch_histogram,
    least_squares_of_histogram,
    percentile_of_batch,
    sample,
)
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.integer_grid import IntegerGrid
from qat_lightning.numerics.observers import Histogram, least_squares_range

SCHEMES = [torch.per_tensor_affine, torch.per_tensor_symmetric]


def values_of(kind: str, count: int = 20000) -> Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    if kind == "with outliers":
        values[:5] *= 20
    return values.relu() if kind == "behind a ReLU" else values


def make(source: Any, bits: int = 8, qscheme: torch.qscheme = torch.per_tensor_affine) -> FakeQuantize:
    grid: dict[str, Any] = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 2**bits - 1, "qscheme": qscheme}
    return FakeQuantize(**grid, source=source, percentile=99.9)


def error(values: Tensor, grid: IntegerGrid, low: Any, high: Any) -> float:
    rounded = grid.round(values, *grid.qparams(torch.as_tensor(low), torch.as_tensor(high)))
    return float((rounded - values).square().mean())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(32, 64, 32, 32), (16, 96, 28, 28), (10, 30, 56, 56)])
def test_a_sample_leaves_out_no_channel_and_no_column(shape: Any, memory_format: torch.memory_format) -> None:
    for dim in (1, 3):
        sizes = [size if at == dim else 1 for at, size in enumerate(shape)]
        number = torch.arange(shape[dim], dtype=torch.float32).reshape(sizes).expand(shape)
        seen = sample(number.contiguous(memory_format=memory_format))
        assert seen.numel() <= 2 * SAMPLED
        assert len(seen.unique()) == shape[dim]


def test_a_histogram_counts_each_value_once_wherever_it_lies() -> None:
    values = values_of("with outliers")
    counts = batch_histogram(values, values.min(), values.max())
    assert counts.shape == (BINS,)
    assert counts.sum() == len(values)
    assert counts[0] >= 1
    assert counts[-1] >= 1
    same = batch_histogram(torch.full((9,), 3.0), torch.tensor(3.0), torch.tensor(3.0))
    assert same.sum() == 9


def test_a_relu_still_to_come_is_counted_as_if_it_had_been() -> None:
    values = values_of("plain") * 4
    ends = torch.tensor(0.0), torch.tensor(6.0)
    assert torch.equal(batch_histogram(values, *ends, relu=6.0), batch_histogram(values.clamp(0, 6), *ends))


@pytest.mark.parametrize("kind", ["plain", "with outliers", "behind a ReLU"])
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_a_percentile_is_that_of_the_sorted_values(kind: str, percentile: float) -> None:
    values = values_of(kind)
    ends = values.min(), values.max()
    low, high = percentile_of_batch(batch_histogram(values, *ends), *ends, percentile=percentile)
    width = float(ends[1] - ends[0]) / BINS
    share = percentile / 100
    assert float(high) == pytest.approx(float(values.quantile(share)), abs=width)
    assert float(low) == pytest.approx(float(values.quantile(1 - share)), abs=width)
    everything = percentile_of_batch(batch_histogram(values, *ends), *ends, percentile=100.0)
    assert [float(end) for end in everything] == pytest.approx([float(end) for end in ends], abs=width)


@pytest.mark.parametrize("qscheme", SCHEMES)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["plain", "with outliers", "behind a ReLU"])
def test_the_least_error_is_nearly_that_of_the_search_in_calibration(kind: str, bits: int, qscheme: Any) -> None:
    values, grid = values_of(kind), IntegerGrid(torch.uint8, 0, 2**bits - 1, qscheme)
    ends = values.min(), values.max()
    found = error(values, grid, *least_squares_of_histogram(batch_histogram(values, *ends), *ends, grid=grid))
    whole = Histogram()
    whole.observe(values)
    limits = {"quant_min": 0, "quant_max": 2**bits - 1, "symmetric": grid.symmetric}
    searched = error(values, grid, *least_squares_range(whole, *map(float, ends), **limits))
    assert found <= 1.1 * searched
    assert found <= error(values, grid, *ends)


@pytest.mark.parametrize("qscheme", SCHEMES)
@pytest.mark.parametrize("kind", ["plain", "with outliers", "behind a ReLU"])
@pytest.mark.parametrize("source", ["batch_mse", "batch_percentile"])
def test_the_range_of_the_largest_values_is_that_of_smaller_ones_enlarged(source: Any, kind: str, qscheme: Any) -> None:
    values = values_of(kind)
    values = values / values.abs().max()
    ranges = []
    for size in (1.0, 2.0**127):
        fq = make(source, bits=4, qscheme=qscheme)
        fq(values * size)
        ranges.append([float(end) / size for end in fq.range()])
    assert ranges[1] == pytest.approx(ranges[0], rel=1e-4)


@pytest.mark.parametrize("source", ["batch_mse", "batch_percentile"])
def test_the_range_is_the_moving_average_of_the_batches_and_stops_with_the_observers(source: Any) -> None:
    fq, values = make(source, bits=4), values_of("with outliers")
    fq(values)
    first = [float(end) for end in fq.range()]
    assert first[1] < 0.5 * float(values.max())
    fq(2 * values)
    weight = 9 / 11
    expected = [end + weight * end for end in first]
    assert [float(end) for end in fq.range()] == pytest.approx(expected, rel=1e-4)
    before = fq.range()[1].clone()
    fq.enable_observer(False)
    fq(9 * values)
    fq.eval().enable_observer()
    fq(9 * values)
    assert torch.equal(fq.range()[1], before)
    assert int(fq.batches) == 2


@pytest.mark.parametrize("source", ["batch_mse", "batch_percentile"])
def test_a_batch_that_is_not_finite_moves_nothing(source: Any) -> None:
    fq = make(source)
    fq(torch.tensor([torch.nan, 1.0]))
    assert not fq.seen
    fq(values_of("plain"))
    before = fq.range()[1].clone()
    for bad in (torch.inf, torch.nan):
        fq(torch.tensor([bad, 1.0]))
    assert torch.equal(fq.range()[1], before)
    assert (int(fq.batches), int(fq.nonfinite_batches)) == (1, 3)


@pytest.mark.parametrize("source", ["batch_mse", "batch_percentile"])
def test_values_of_half_precision_and_of_no_spread_have_a_range(source: Any) -> None:
    fq = make(source)
    fq(values_of("plain").bfloat16())
    assert all(end.dtype == torch.float32 for end in fq.range())
    constant = make(source)
    constant(torch.full((8,), 2.5))
    assert torch.equal(constant.round(torch.tensor([0.0, 2.5])), torch.tensor([0.0, 2.5]))


def test_what_is_saved_is_what_a_moving_average_saves() -> None:
    assert set(make("batch_mse").state_dict()) == set(make("moving_average").state_dict())
