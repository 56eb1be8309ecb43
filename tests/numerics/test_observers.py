"""Histograms that add up exactly, and the ranges chosen from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import choose_qparams, fake_quantize
from qat_lightning.numerics.observers import (
    BINS,
    Histogram,
    entropy_range,
    least_squares_clip,
    least_squares_range,
    percentile_range,
)

SEEDS = st.integers(0, 2**31)
LARGEST = torch.finfo(torch.float32).max


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.observe(batch)
    return histogram


def heavy_tailed(seed: int, count: int = 20000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    values[:5] *= 20
    return values


def error(values: torch.Tensor, low: float, high: float, bits: int = 4, *, symmetric: bool = False) -> float:
    grid = {"quant_min": 0, "quant_max": 2**bits - 1}
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), symmetric=symmetric, **grid)
    return float((fake_quantize(values, scale, zero_point, **grid) - values).square().mean())


@given(SEEDS, st.lists(st.floats(1e-3, 1e4), min_size=2, max_size=4))
@settings(max_examples=20)
def test_histograms_of_batches_add_up_in_any_order(seed: int, sizes: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(500, generator=generator) * size for size in sizes]
    one, other = histogram_of(*batches), histogram_of(*reversed(batches))
    assert one.limit == other.limit
    assert one.counts.sum() == 500 * len(sizes)
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.counts, histogram_of(torch.cat(batches)).counts)


@settings(deadline=None)
@given(SEEDS, st.integers(-40, 40), st.sampled_from(["contiguous", "channels_last", "strided"]))
def test_each_bin_includes_the_end_farther_from_zero(seed: int, exponent: int, layout: str) -> None:
    """Also for values at the ends of bins and their neighbours, in any memory format, and in more than one part."""
    limit = 2.0**exponent
    ends = torch.arange(-BINS // 2, BINS // 2 + 1) * (2 * limit / BINS)
    neighbours = [torch.nextafter(ends, torch.tensor(towards)).clamp(-limit, limit) for towards in (9e30, -9e30)]
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([ends, *neighbours, (2 * torch.rand(4 * 2**17, generator=generator) - 1) * limit])
    values = values[: len(values) // 64 * 64].view(4, 4, 4, -1)
    values[0, 0, 0, 0] = limit
    values[values.abs() < 1e-37] = 0.0  # division by a power of two is exact except for subnormal numbers
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        values = values[..., ::2]
    exact = values.double() / (2 * limit / BINS)
    bins = torch.where(exact < 0, exact.floor(), (exact.ceil() - 1).clamp(min=0)).long() + BINS // 2
    assert torch.equal(histogram_of(values).counts, torch.bincount(bins.flatten(), minlength=BINS).double())


def test_the_side_of_the_largest_value_fills_more_than_half_of_its_bins() -> None:
    histogram = histogram_of(torch.tensor([0.001]), torch.tensor([-70.0]))
    assert histogram.limit == 128
    used = histogram.counts.nonzero().flatten()
    assert used.tolist() == [BINS // 2 - int(70 / 256 * BINS), BINS // 2]


@given(SEEDS, st.floats(51, 100))
@settings(max_examples=20)
def test_percentile_is_that_of_the_values(seed: int, percentile: float) -> None:
    values = heavy_tailed(seed)
    low, high = percentile_range(histogram_of(values), percentile)
    width = 2 * float(histogram_of(values).limit) / BINS
    for end, share in ((low, 1 - percentile / 100), (high, percentile / 100)):
        ends = torch.quantile(values, torch.tensor([max(0.0, share - 1e-3), min(1.0, share + 1e-3)]))
        assert ends[0] - 2 * width <= end <= ends[1] + 2 * width


@given(SEEDS, st.booleans())
@settings(max_examples=10)
def test_least_squares_beats_the_whole_range_and_every_share_of_it(seed: int, symmetric: bool) -> None:
    values = heavy_tailed(seed)
    low, high = values.min().item(), values.max().item()
    found = least_squares_range(histogram_of(values), low, high, quant_min=0, quant_max=15, symmetric=symmetric)
    least = error(values, *found, symmetric=symmetric)
    for share in (1.0, 0.7, 0.4, 0.2, 0.1):
        assert least <= 1.02 * error(values, low * share, high * share, symmetric=symmetric)
    assert least < 0.8 * error(values, low, high, symmetric=symmetric)


def test_least_squares_is_no_worse_than_upstreams_histogram_observer() -> None:
    from torch.ao.quantization import HistogramObserver

    for seed in range(3):
        values = torch.relu(heavy_tailed(seed)) if seed else heavy_tailed(seed)
        upstream = HistogramObserver(dtype=torch.quint8)
        upstream(values)
        scale, zero_point = upstream.calculate_qparams()
        theirs = float(
            (torch.quantize_per_tensor(values, float(scale), int(zero_point), torch.quint8).dequantize() - values)
            .square()
            .mean()
        )
        low, high = least_squares_range(
            histogram_of(values),
            values.min().item(),
            values.max().item(),
            quant_min=0,
            quant_max=255,
            symmetric=False,
        )
        assert error(values, low, high, bits=8) <= 1.02 * theirs


@pytest.mark.slow
@given(SEEDS)
@settings(max_examples=10)
def test_entropy_leaves_outliers_out_and_the_bulk_in(seed: int) -> None:
    values = heavy_tailed(seed)
    low, high = entropy_range(
        histogram_of(values), values.min().item(), values.max().item(), levels=256, symmetric=False
    )
    assert values.min() <= low < -2
    assert 2 < high <= values.max()
    assert max(-low, high) < values.abs().max()


def divergences(values: np.ndarray, width: float, levels: int) -> dict[int, float]:
    """For each threshold, in bins: the Kullback-Leibler divergence, step by step as in Migacz's slides.

    Args:
        values: Magnitudes, of one sign or both.
        width: Width of a bin.
        levels: Number of levels that the bins below a threshold are merged into.
    """
    last = int(np.ceil(values.max() / width))
    counts, _ = np.histogram(values, bins=last, range=(0.0, last * width))
    counts[0] = counts[1]  # as NVIDIA's own calibrator has it
    found = {}
    for threshold in range(min(levels, last), last + 1):
        reference = counts[:threshold].astype(float)
        reference[-1] += counts[threshold:].sum()
        merged = np.zeros(threshold)
        for level in range(levels):
            # as many bins for each level as divide evenly, rounded up
            bins = slice(-(-level * threshold // levels), -(-(level + 1) * threshold // levels))
            inside = counts[:threshold][bins]
            if inside.any():
                merged[bins] = np.where(inside > 0, inside.sum() / np.count_nonzero(inside), 0.0)
        p, q = reference / reference.sum(), merged / merged.sum()
        # where all of a bin's mass was clipped into it there is no q: a large divergence, and not an infinite one
        found[threshold] = float(sum(a * np.log(a / max(b, 1e-10)) for a, b in zip(p, q, strict=True) if a > 0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("signs", ["both", "positive", "negative"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_is_that_of_every_threshold_tried_by_hand(symmetric: bool, signs: str, levels: int) -> None:
    values = heavy_tailed(levels)
    if signs != "both":
        values = values.abs() if signs == "positive" else -values.abs()
    histogram = histogram_of(values)
    low, high = values.min().item(), values.max().item()
    width = 2 * float(histogram.limit) / BINS
    # one threshold for both signs, each of which has half of the levels; on a symmetric grid, also for one sign
    halved = symmetric or signs == "both"
    by_hand = divergences(values.abs().double().numpy(), width, levels // 2 if halved else levels)

    ends = entropy_range(histogram, low, high, levels=levels, symmetric=symmetric)
    limit = max(-ends[0], ends[1])
    assert ends == (max(min(low, 0.0), -limit), min(max(high, 0.0), limit))
    threshold = round(limit / width)
    assert limit == threshold * width
    assert threshold == min(by_hand, key=by_hand.__getitem__)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 15), (-7, 7)])
def test_entropy_counts_only_the_levels_that_one_sign_has_on_a_symmetric_grid(
    quant_min: int, quant_max: int, sign: float
) -> None:
    values = torch.empty(20_000).exponential_(generator=torch.Generator().manual_seed(0)) * sign
    ends = values.min().item(), values.max().item()
    chosen = entropy_range(histogram_of(values), *ends, levels=quant_max - quant_min + 1, symmetric=True)
    # An affine grid of 8 integers has the same integers for values of one sign.
    assert chosen == entropy_range(histogram_of(values), *ends, levels=8, symmetric=False)
    of_all = entropy_range(histogram_of(values), *ends, levels=16, symmetric=False)
    assert error(values, *chosen, symmetric=True) < 0.85 * error(values, *of_all, symmetric=True)


FEW = {
    "constant": torch.full((1000,), 2.5),
    "two values": torch.tensor([1.0, 2.5]).repeat(500),
    "mask": torch.tensor([0.0, 1.0]).repeat(500),
    "negative": torch.tensor([-3.0, -1.0, -0.5]).repeat(400),
}


@pytest.mark.parametrize("name", FEW)
def test_entropy_keeps_all_of_few_values(name: str) -> None:
    values = FEW[name]
    low, high = entropy_range(
        histogram_of(values), values.min().item(), values.max().item(), levels=256, symmetric=False
    )
    assert (low, high) == (min(values.min().item(), 0.0), max(values.max().item(), 0.0))


def test_the_zeros_of_a_relu_do_not_decide_its_range() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()
    _, high = entropy_range(histogram_of(values), 0.0, values.max().item(), levels=256, symmetric=False)
    assert high > 0.8 * values.max()


def test_entropy_of_a_uniform_distribution_keeps_it() -> None:
    values = torch.linspace(0, 1, 100_000)
    low, high = entropy_range(histogram_of(values), 0.0, 1.0, levels=256, symmetric=False)
    assert low == 0.0
    assert high == pytest.approx(1.0, abs=0.02)


@given(SEEDS, st.integers(2, 6), st.booleans())
@settings(max_examples=20)
def test_clipped_weights_have_no_larger_error_in_any_channel(seed: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)) ** 3
    low, high = (
        (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    clip = least_squares_clip(weight, quant_min=low, quant_max=high, symmetric=symmetric)
    assert ((clip > 0) & (clip <= 1)).all()

    def errors(share: torch.Tensor) -> torch.Tensor:
        ends = torch.aminmax(weight, dim=1)
        scale, zero_point = choose_qparams(
            ends[0] * share, ends[1] * share, quant_min=low, quant_max=high, symmetric=symmetric
        )
        rounded = fake_quantize(weight, scale, zero_point, quant_min=low, quant_max=high, axis=0)
        return (rounded - weight).square().sum(1)

    assert (errors(clip) <= errors(torch.ones(5)) * 1.0001).all()


@pytest.mark.parametrize("source", ["min_max", "histogram_mse", "histogram_kl", "percentile"])
def test_settling_chooses_a_range_within_what_was_seen(source: str) -> None:
    fq = FakeQuantize(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        source=source,  # type: ignore[arg-type]
        percentile=99.9,
    )
    fq.fake_quant_enabled = False
    batches = [heavy_tailed(seed) for seed in range(3)]
    for batch in batches:
        fq(batch)
    fq(torch.tensor([float("nan"), 1e9]))
    fq.settle()
    low, high = (end.item() for end in fq.range())
    values = torch.cat(batches)
    assert fq.nonfinite_batches.item() == 1
    assert values.min() <= low < high <= values.max()
    assert (high == values.max()) == (source == "min_max")
    fq.forget()
    assert not fq.seen


def test_counts_and_limit_move_to_a_device_and_keep_their_precision() -> None:
    moved = histogram_of(torch.full((3,), LARGEST)).to(torch.bfloat16)
    assert moved.counts.dtype == moved.limit.dtype == torch.float64
    assert moved.limit == 2.0**128


@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=20), st.integers(0, 20))
def test_histograms_hold_every_finite_float32_and_add_up(numbers: list[float], split: int) -> None:
    values = torch.tensor(numbers)
    values[values.abs() < 0.01] = 0.0  # divided by the width of the largest bins they would be subnormal
    one = histogram_of(values[:split], values[split:])
    largest = float(values.abs().max())
    assert one.limit >= largest
    assert one.limit / 2 < max(largest, 1e-30)
    assert one.counts.sum() == len(numbers)
    assert torch.equal(one.counts, histogram_of(values).counts)
    assert one.centers().isfinite().all()


def test_a_histogram_saved_with_a_float32_limit_goes_on_counting() -> None:
    first, second = heavy_tailed(0), torch.tensor([-LARGEST, 3.0])
    state = histogram_of(first).state_dict()
    state["limit"] = state["limit"].float()  # as in checkpoints of releases before
    resumed = Histogram()
    resumed.load_state_dict(state)
    assert resumed.limit.dtype == torch.float64
    assert torch.equal(resumed.counts, histogram_of(first).counts)
    resumed.observe(second)
    assert resumed.limit == 2.0**128
    assert torch.equal(resumed.counts, histogram_of(first, second).counts)


@given(st.floats(-100, 100, width=32, allow_subnormal=False), st.floats(51, 99.99))
def test_a_percentile_of_one_value_is_a_range_that_holds_it(value: float, percentile: float) -> None:
    qscheme = torch.per_tensor_affine
    limits = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": qscheme}
    fq = FakeQuantize(**limits, source="percentile", percentile=percentile)  # type: ignore[arg-type]
    fq.observe(torch.full((9,), value))
    fq.settle()
    assert fq.seen
    assert [float(end) for end in fq.range()] == [value, value]
