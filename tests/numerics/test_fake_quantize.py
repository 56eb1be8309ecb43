"""The arithmetic, compared with float64, with upstream's kernels, and with the integers of int8 kernels."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.modes.qconfig import make_qconfig
from qat_lightning.modes.shared_range import SharedRange
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import EPS, choose_qparams, fake_quantize, smallest_and_largest
from qat_lightning.settings.backends import BACKENDS
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

FINITE = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
GRIDS = st.sampled_from([(0, 255), (-128, 127), (-127, 127), (-63, 63), (-7, 7), (0, 15)])


def activation(**changes: object) -> FakeQuantize:
    """An affine uint8 FakeQuantize."""
    settings = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    return FakeQuantize(**(settings | changes))  # type: ignore[arg-type]


@given(FINITE, FINITE, GRIDS)
def test_affine_qparams_equal_float64_arithmetic(a: float, b: float, grid: tuple[int, int]) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    quant_min, quant_max = grid
    scale, zero_point = choose_qparams(
        torch.tensor(min(a, b)), torch.tensor(max(a, b)), quant_min=quant_min, quant_max=quant_max, symmetric=False
    )
    span = np.float64(high) - np.float64(low)
    exact = max(span / (quant_max - quant_min), EPS) if span else 1 / (quant_max - quant_min)
    assert scale.item() == pytest.approx(exact, rel=1e-6)
    assert quant_min <= zero_point.item() <= quant_max
    # Float32 may break a tie the other way than float64, by one.
    assert abs(zero_point.item() - np.clip(quant_min - np.rint(low / exact), quant_min, quant_max)) <= 1


@given(FINITE, FINITE, GRIDS)
def test_symmetric_qparams_equal_float64_arithmetic(a: float, b: float, grid: tuple[int, int]) -> None:
    quant_min, quant_max = grid
    scale, zero_point = choose_qparams(
        torch.tensor(min(a, b)), torch.tensor(max(a, b)), quant_min=quant_min, quant_max=quant_max, symmetric=True
    )
    largest = max(abs(np.float64(a)), abs(np.float64(b))) if a * b < 0 else max(abs(a), abs(b))
    half = (quant_max - quant_min) // 2
    assert scale.item() == pytest.approx(max(largest / half, EPS) if largest else 1 / half, rel=1e-6)
    assert zero_point.item() == quant_min + (quant_max - quant_min + 1) // 2


@given(FINITE, FINITE, GRIDS, st.booleans())
def test_zero_is_exactly_representable(a: float, b: float, grid: tuple[int, int], symmetric: bool) -> None:
    scale, zero_point = choose_qparams(
        torch.tensor(min(a, b)), torch.tensor(max(a, b)), quant_min=grid[0], quant_max=grid[1], symmetric=symmetric
    )
    zero = fake_quantize(torch.zeros(1), scale, zero_point, quant_min=grid[0], quant_max=grid[1])
    assert zero.item() == 0.0


@given(
    st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=40),
    st.floats(1e-3, 10),
    st.integers(0, 255),
)
def test_rounding_equals_the_integers_that_kernels_store(values: list[float], scale: float, zero_point: int) -> None:
    """Except ties: ``quantize_per_tensor`` adds the zero point before rounding, and an odd one reverses them."""
    x = torch.tensor(values)
    assume(zero_point % 2 == 0 or not (x / scale * 2 % 2 == 1).any())
    rounded = fake_quantize(
        x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), quant_min=0, quant_max=255
    )
    stored = torch.quantize_per_tensor(x, torch.tensor(scale).item(), zero_point, torch.quint8).dequantize()
    assert torch.equal(rounded, stored)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 20))
def test_weights_equal_the_integers_that_kernels_store(seed: int, channels: int, size: int) -> None:
    weight = torch.randn(channels, size, generator=torch.Generator().manual_seed(seed))
    fq = make_qconfig(Recipe("fx", "x86")).weight()
    rounded = fq(weight)
    scale, zero_point = fq.calculate_qparams()
    stored = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8)
    assert torch.equal(rounded, stored.dequantize())
    assert stored.int_repr().abs().amax(1).eq(127).all(), "each channel's largest weight is at the end of its grid"


@given(st.integers(0, 2**32 - 1), st.floats(-5, 0), st.floats(0.1, 5))
def test_gradient_passes_where_nothing_is_clamped(seed: int, low: float, high: float) -> None:
    """Forward and gradient of torch's own unfused kernel, with the same settings."""
    x = (torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 4).requires_grad_()
    fq = activation()
    fq.min_val.fill_(low)
    fq.max_val.fill_(high)
    fq.eval()
    fq(x).sum().backward()
    scale, zero_point = fq.calculate_qparams()
    integers = torch.round(x.detach() / scale) + zero_point
    inside = (integers >= 0) & (integers <= 255)
    assert x.grad is not None
    near_edge = ((integers == 0) | (integers == 255)) & (
        (x.detach() / scale - torch.round(x.detach() / scale)).abs() > 0.499
    )
    assume(not near_edge.any())
    assert torch.equal(x.grad, inside.float())


LAYOUTS = st.sampled_from(["contiguous", "channels_last", "transposed", "every other"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory format."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if layout == "every other" else x


def border_values(seed: int, scale: Tensor) -> Tensor:
    """Values across the grid and beyond, including every tie and the next float32 on both sides of it."""
    generator = torch.Generator().manual_seed(seed)
    ties = torch.arange(-600, 601) / 2
    ties = torch.stack([ties * scale, ties / (1.0 / scale)]).flatten()
    ties = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    x = torch.cat([ties, torch.randn(12 * 30 * 24 - len(ties), generator=generator) * 150 * scale])
    return x[torch.randperm(len(x), generator=generator)].reshape(2, 6, 30, 24)


@given(st.integers(0, 2**32 - 1), st.floats(2**-20, 1000.0, width=32), st.integers(0, 255), GRIDS, LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_torchs_kernel_also_where_it_begins_to_clamp(
    seed: int, scale: float, zero_point: int, grid: tuple[int, int], layout: str
) -> None:
    low, high = grid
    zero_point = low + zero_point % (high - low + 1)
    qparams = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    x = laid_out(border_values(seed, qparams[0]), layout)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rounded = fake_quantize(ours, *qparams, quant_min=low, quant_max=high)
    expected = torch.fake_quantize_per_tensor_affine(theirs, *qparams, low, high)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(ours.grad, theirs.grad)
    if layout == "channels_last":
        assert rounded.is_contiguous(memory_format=torch.channels_last)


@given(st.integers(0, 2**32 - 1), st.booleans(), GRIDS, LAYOUTS, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_per_channel_are_those_of_torchs_kernel(
    seed: int, symmetric: bool, grid: tuple[int, int], layout: str, axis: int
) -> None:
    low, high = grid
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(border_values(seed, torch.tensor(0.01)), layout)
    channels = x.shape[axis]
    scale = torch.rand(channels, generator=generator) * 0.1 + 1e-3
    scale[0] = 0.01
    middle = low + (high - low + 1) // 2
    zero_point = torch.randint(low, high + 1, (channels,), generator=generator).to(torch.int32)
    if symmetric:
        zero_point.fill_(middle)
    gradient = torch.randn(x.shape, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    given_point = middle if symmetric else zero_point
    rounded = fake_quantize(ours, scale, given_point, quant_min=low, quant_max=high, axis=axis)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, axis, low, high)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(ours.grad, theirs.grad)


@given(st.integers(0, 2**32 - 1), st.floats(2**-30, 2**30, width=32), GRIDS, st.booleans(), LAYOUTS)
@settings(max_examples=40, deadline=None)
def test_nothing_of_a_weight_is_beyond_its_own_symmetric_range(
    seed: int, size: float, grid: tuple[int, int], per_channel: bool, layout: str
) -> None:
    """Nothing has to be clamped, and the whole gradient passes, as in torch's kernel."""
    low, high = grid
    x = laid_out(torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(seed)) * size, layout)
    fq = FakeQuantize(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else -1,
        source="present",
    )
    gradient = torch.randn(x.shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rounded = fq(ours)
    scale, zero_point = fq.calculate_qparams()
    if per_channel:
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, 0, low, high)
    else:
        expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, low, high)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_smallest_and_largest_see_every_value_in_any_memory_format() -> None:
    values = torch.randn(2, 3, 4, 5)
    for same in (values, values.to(memory_format=torch.channels_last), values.transpose(1, 3), values.flatten()):
        assert smallest_and_largest(same) == (values.min(), values.max())
    for same in (values, values.to(memory_format=torch.channels_last)):
        low, high = smallest_and_largest(same, -2)
        assert torch.equal(low, values.movedim(-2, 0).flatten(1).amin(1))
        assert torch.equal(high, values.movedim(-2, 0).flatten(1).amax(1))
    assert all(torch.equal(end, values[0, 0, 0]) for end in smallest_and_largest(values[0, 0, 0], 0))
    values[1, 2, 3, 4] = torch.nan
    assert all(end.isnan() for end in smallest_and_largest(values))


def test_range_moves_in_training_only_and_stops_when_frozen() -> None:
    fq = activation()
    fq(torch.tensor([0.0, 1.0]))
    fq(torch.tensor([0.0, 3.0]))
    assert fq.max_val.item() == pytest.approx(1 + 2 * 9 / 11)
    fq.eval()
    fq(torch.tensor([0.0, 100.0]))
    assert fq.max_val.item() == pytest.approx(1 + 2 * 9 / 11)
    fq.train()
    fq.observer_enabled = False
    fq(torch.tensor([0.0, 100.0]))
    assert fq.max_val.item() == pytest.approx(1 + 2 * 9 / 11)


def test_range_follows_the_first_batches_closely_and_then_slowly() -> None:
    fq = activation(averaging_constant=0.25)
    expected = 1.0
    fq(torch.tensor([0.0, 1.0]))
    for seen in range(1, 60):
        fq(torch.tensor([0.0, float(seen + 1)]))
        expected += max(0.25, 9 / (10 + seen)) * (seen + 1 - expected)
        assert fq.max_val.item() == pytest.approx(expected)
    assert fq.batches.item() == 60


def test_frozen_range_clamps() -> None:
    fq = activation()
    fq(torch.tensor([0.0, 2.55]))
    fq.observer_enabled = False
    assert fq(torch.tensor([5.0])).item() == pytest.approx(2.55)


def test_observes_before_rounding_is_on_and_rounds_nothing() -> None:
    fq = activation()
    fq.fake_quant_enabled = False
    x = torch.tensor([0.0, 0.1234567, 1.0])
    assert torch.equal(fq(x), x)
    assert fq.seen


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_batch_is_counted_and_leaves_the_range(bad: float) -> None:
    fq = activation()
    fq(torch.tensor([0.0, bad]))
    assert not fq.seen
    fq(torch.tensor([0.0, 1.0]))
    fq(torch.tensor([bad, 1.0]))
    assert (fq.min_val.item(), fq.max_val.item()) == (0.0, 1.0)
    assert fq.nonfinite_batches.item() == 2


OBSERVERS = [
    "moving_average",
    "min_max",
    "histogram_mse",
    "histogram_kl",
    "percentile",
    "batch_mse",
    "batch_percentile",
]
LARGEST = torch.finfo(torch.float32).max
HUGE = st.one_of(
    st.sampled_from([-LARGEST, LARGEST, 0.0, 1.0, -1.0]),
    st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=False),
    st.floats(2.0**126, LARGEST, width=32),
    st.floats(-LARGEST, -(2.0**126), width=32),
)


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric], ids=["affine", "symmetric"])
@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=pytest.mark.slow if name == "histogram_kl" else ()) for name in OBSERVERS]
)
@given(batches=st.lists(st.lists(HUGE, min_size=1, max_size=8), min_size=1, max_size=3), grid=GRIDS)
@settings(max_examples=25, deadline=None)
def test_values_up_to_float32s_largest_have_a_range_and_a_finite_grid(
    source: str, qscheme: torch.qscheme, batches: list[list[float]], grid: tuple[int, int]
) -> None:
    fq = activation(source=source, qscheme=qscheme, quant_min=grid[0], quant_max=grid[1], percentile=99.0)
    fq.fake_quant_enabled = False
    for batch in batches:
        fq(torch.tensor(batch))
    fq.settle()
    values = torch.tensor([value for batch in batches for value in batch])
    assert int(fq.nonfinite_batches) == 0
    assert fq.seen
    low, high = (float(end) for end in fq.range())
    assert min(values.min().item(), 0.0) - 1e-6 * abs(low) <= low <= high
    assert high <= max(values.max().item(), 0.0) + 1e-6 * abs(high)
    scale, _ = fq.calculate_qparams()
    assert scale.isfinite()
    fq.fake_quant_enabled = True
    x = torch.cat([values, torch.tensor([-LARGEST, 0.0, LARGEST])]).requires_grad_()
    rounded = fq.eval()(x)
    rounded.sum().backward()
    assert rounded.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("source", OBSERVERS)
def test_an_additive_mask_is_observed_and_rounded_to_finite_values(source: str) -> None:
    x = torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(0)).relu()
    x[:, 3:] += torch.finfo(torch.float32).min
    fq = activation(source=source)
    fq(x)
    fq.settle()
    assert fq.seen
    assert fq(x).isfinite().all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-41, -1e-41])
def test_a_channel_whose_batchnorm_factor_cannot_be_divided_by_stays_as_it_is(
    tiny: float, clipped: bool, per_channel: bool
) -> None:
    fq = FakeQuantize(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else -1,
        source="present",
        clipped=clipped,
    )
    weight = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = fq(weight, torch.tensor([1.0, tiny]))
    rounded.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    if not per_channel or clipped or tiny == 0.0:
        assert torch.equal(rounded[1], weight[1])
    assert rounded.isfinite().all()
    assert torch.equal(rounded[0], fq(weight, torch.tensor([1.0, 0.0]))[0])
    assert torch.equal(rounded[0], fq.grid.round(weight, *fq.calculate_qparams())[0])


@pytest.mark.parametrize("source", OBSERVERS)
@pytest.mark.parametrize("bad", [[torch.nan, 1.0], [torch.inf, 1.0], [torch.nan], []])
def test_a_batch_that_is_not_finite_in_this_process_alone_is_left_out_here(
    source: str, bad: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has a finite batch, so that the range of both is finite."""
    others = torch.tensor(0.0), torch.tensor(1.0)

    def reduced(low: Tensor, high: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert not finite
        return *others, torch.tensor(True)

    module = "qat_lightning.numerics.fake_quantize"
    monkeypatch.setattr(f"{module}.process_count", lambda: 2)
    monkeypatch.setattr(f"{module}.range_over_all", reduced)
    monkeypatch.setattr(f"{module}.sum_over_all", lambda counts: counts + 1.0)
    fq = activation(source=source)
    fq.reduce_across_processes = True
    fq.observe(torch.tensor(bad))
    assert int(fq.nonfinite_batches) == (1 if bad else 0)
    assert int(fq.batches) == 1
    assert 0.0 <= float(fq.range()[0]) < float(fq.range()[1]) <= 1.0
    assert fq.histogram is None or not fq.histogram.counts.any()


def test_constant_and_empty_tensors_have_a_grid() -> None:
    fq = activation()
    fq(torch.empty(0))
    assert not fq.seen
    assert torch.isfinite(fq(torch.zeros(3))).all()
    scale, _ = fq.calculate_qparams()
    assert scale.item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_and_ranges_are_float32_in_any_precision(dtype: torch.dtype) -> None:
    fq = activation()
    x = torch.linspace(-1, 2, 50).to(dtype)
    y = fq(x)
    assert y.dtype == dtype
    assert fq.min_val.dtype == torch.float32
    reference = activation()
    assert torch.equal(y, reference(x.float()).to(dtype))


def test_autocast_leaves_the_arithmetic_in_float32() -> None:
    x = torch.randn(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = activation()(x)
    assert torch.equal(y, activation()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranges_stay_float32_when_the_network_is_cast(dtype: torch.dtype) -> None:
    fq = activation()
    fq(torch.tensor([0.0, 1.2345678]))
    network = nn.Sequential(fq, nn.Linear(1, 1)).to(dtype)
    assert network[1].weight.dtype == dtype
    assert fq.max_val.dtype == torch.float32
    assert fq.max_val.item() == pytest.approx(1.2345678)
    assert fq.batches.dtype == torch.int64


def test_state_reloads_strictly_and_holds_no_flags() -> None:
    fq = activation()
    fq(torch.randn(10))
    fq.fake_quant_enabled = False
    assert set(fq.state_dict()) == {"min_val", "max_val", "batches"}
    buffer = io.BytesIO()
    torch.save(fq.state_dict(), buffer)
    buffer.seek(0)
    other = activation()
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert other.seen
    assert other.fake_quant_enabled
    x = torch.randn(10)
    assert torch.equal(other.eval()(x), activation_like(fq)(x))


def activation_like(fq: FakeQuantize) -> FakeQuantize:
    """A copy that rounds."""
    copied = copy.deepcopy(fq).eval()
    copied.fake_quant_enabled = True
    return copied


def test_weight_range_is_of_the_present_weight_and_not_saved() -> None:
    fq = make_qconfig(Recipe("eager", "x86")).weight()
    assert not fq.state_dict()
    for factor in (1.0, 10.0):
        weight = torch.tensor([[factor, -factor / 2]])
        fq(weight)
        assert fq.calculate_qparams()[0].item() == pytest.approx(factor / 127)


def test_fixed_range_is_never_moved() -> None:
    fq = activation(source="fixed", fixed_range=(0.0, 1.0))
    fq(torch.tensor([50.0]))
    assert fq.seen
    assert fq.max_val.item() == 1.0


def test_shared_range_rounds_and_does_not_observe() -> None:
    fq = activation()
    fq(torch.tensor([0.0, 2.55]))
    network = nn.ModuleDict({"fq": fq, "shared": SharedRange(fq)})
    assert network["shared"](torch.tensor([9.0])).item() == pytest.approx(2.55)
    assert fq.max_val.item() == pytest.approx(2.55)
    copied = copy.deepcopy(network)
    assert copied["shared"].__dict__["fq"] is copied["fq"]


@pytest.mark.parametrize("backend", sorted(name for name, row in BACKENDS.items() if not row.own_grids))
def test_ranges_follow_the_kernel_of_the_backend(backend: str) -> None:
    recipe = Recipe(BACKENDS[backend].modes[0], backend)
    qconfig = make_qconfig(recipe)
    act, weight = qconfig.activation(), qconfig.weight()
    assert (act.quant_min, act.quant_max) == ((-128, 127) if backend in ("xnnpack", "tensorrt") else (0, 255))
    assert weight.quant_max == (63 if backend == "fbgemm" else 127)
    assert weight.quant_min == -weight.quant_max


def test_fewer_bits_have_a_coarser_grid() -> None:
    weight = make_qconfig(Recipe("fx", "x86", Scheme(weight_bits=4))).weight()
    values: Tensor = weight(torch.linspace(-1, 1, 101)[None])
    assert values.unique().numel() == 15
