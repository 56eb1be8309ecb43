"""Learned scales and zero points: values and gradients of the papers, and when they start to learn."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import fake_quantize, fake_quantize_learned
from qat_lightning.numerics.learned_step import LearnedStep
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES, train

SEEDS = st.integers(0, 2**31)


def weight_fq(channels: int | None = None, rate: float = 1.0) -> FakeQuantize:
    fq = FakeQuantize(
        dtype=torch.int8,
        quant_min=-7,
        quant_max=7,
        qscheme=torch.per_channel_symmetric if channels else torch.per_tensor_symmetric,
        ch_axis=0 if channels else -1,
        source="present",
        learned="lsq",
        learned_rate=rate,
    )
    fq.materialize(torch.ones(channels or 1, 2))
    return fq


def activation_fq(learned: str = "lsq+") -> FakeQuantize:
    return FakeQuantize(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=15,
        qscheme=torch.per_tensor_affine,
        learned=learned,  # type: ignore[arg-type]
    )


@given(SEEDS, st.sampled_from([-0.5, 0.0, 0.6]), st.sampled_from([1.0, 0.25, 3.0]))
@settings(max_examples=30)
def test_sgd_moves_the_scale_as_lsq_does(seed: int, u: float, rate: float) -> None:
    """Esser et al., equation 3, with the gradient scale of section 2.2, times ``rate``."""
    weight = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    fq = weight_fq(rate=rate)
    fq(weight)
    assert fq.step is not None
    with torch.no_grad():
        fq.step.log_ratio.fill_(u / rate)  # where it shrank some are clamped
    scale = fq.calculate_qparams()[0].double()
    optimizer = torch.optim.SGD(fq.step.parameters(), lr=2e-5)
    (fq(weight) * torch.arange(50.0)).sum().backward()
    optimizer.step()
    ratio = weight.double() / scale
    rounded = torch.round(ratio)
    slope = torch.where(rounded.abs() > 7, 7.0 * ratio.sign(), rounded - ratio)
    expected = -2e-5 * rate * float((slope * torch.arange(50.0)).sum()) / math.sqrt(50 * 7)
    moved = float(fq.calculate_qparams()[0].double() - scale)
    assert moved == pytest.approx(expected, rel=2e-2, abs=1e-6)


@given(SEEDS, st.booleans())
@settings(max_examples=20)
def test_values_and_gradient_of_the_input_are_those_of_fixed_scales(seed: int, per_channel: bool) -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    fq = weight_fq(4 if per_channel else None)
    rounded = fq(weight)
    scale, zero_point = fq.calculate_qparams()
    (gradient,) = torch.autograd.grad(rounded.square().sum(), weight)
    axis = 0 if per_channel else None
    fixed = fake_quantize(weight, scale, zero_point, quant_min=-7, quant_max=7, axis=axis)
    (expected,) = torch.autograd.grad(fixed.square().sum(), weight)
    assert torch.equal(rounded, fixed)
    assert torch.equal(gradient, expected)


@given(SEEDS, st.booleans(), st.floats(-3, 18))
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_torchs_kernel(seed: int, per_channel: bool, zero_point: float) -> None:
    assume(zero_point % 1 != 0.5)  # which torch rounds up for the gradient, and to the even number for the value
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 4, 5, 6, generator=generator) * 2).to(memory_format=torch.channels_last)
    shape = (4,) if per_channel else (1,)
    scale = torch.rand(shape, generator=generator) * 0.3 + 0.05
    point = torch.full(shape, zero_point).clamp(0, 15)
    gradient = torch.randn(x.shape, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (x, scale, point)]
    theirs = [tensor.clone().requires_grad_() for tensor in (x, scale, point)]
    if per_channel:
        rounded = fake_quantize_learned(*ours, quant_min=0, quant_max=15, axis=1)
        expected = torch._fake_quantize_learnable_per_channel_affine(*theirs, 1, 0, 15, 1.0)
    else:
        reshaped = [tensor if tensor.dim() > 1 else tensor.reshape(()) for tensor in ours]
        rounded = fake_quantize_learned(*reshaped, quant_min=0, quant_max=15)
        expected = torch._fake_quantize_learnable_per_tensor_affine(*theirs, 0, 15, 1.0)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def _straight_through(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The same rounding in operations of torch, whose gradients have gradients."""
    ratio, point = x / scale, zero_point + (zero_point.round() - zero_point).detach()
    integers = ratio + (ratio.round() - ratio).detach() + point
    return (integers.clamp(0, 15) - point) * scale


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_have_gradients_as_a_gradient_penalty_needs_them(per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator) * 2
    scale = (torch.rand(4, generator=generator) * 0.3 + 0.05) if per_channel else torch.tensor(0.2)
    factor = torch.randn(6, 4, generator=generator)
    found = []
    for ours in (True, False):
        given = [tensor.clone().requires_grad_() for tensor in (x, scale, torch.full_like(scale, 6.3), factor)]
        if ours:
            rounded = fake_quantize_learned(*given[:3], quant_min=0, quant_max=15, axis=1 if per_channel else None)
        else:
            rounded = _straight_through(*given[:3])
        first = torch.autograd.grad((rounded.square() * given[3]).sum(), given[:3], create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
        found.append([*first, *second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def error_of(fq: FakeQuantize, x: torch.Tensor, qparams: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The squared error with a given scale and zero point."""
    return float((fq.grid.round(x, *qparams) - x).square().mean())


@pytest.mark.parametrize("learned", ["lsq", "lsq+"])
def test_they_begin_at_the_observed_range_and_then_are_the_optimizers(learned: str) -> None:
    fq = activation_fq(learned)
    fq.fake_quant_enabled = False
    x = torch.randn(8, 64) + 1
    assert fq(x) is x
    observed = fq.calculate_qparams()
    assert not fq.learns
    fq.fake_quant_enabled = True
    fq.observer_enabled = False
    fq(x)
    assert fq.learns
    begins = fq.calculate_qparams()
    # 4 bits: at the part of the observed range whose grid has the least squared error.
    assert begins[0] < observed[0]
    assert error_of(fq, x, begins) < error_of(fq, x, observed)
    observed = begins
    assert fq.step is not None
    optimizer = torch.optim.Adam(fq.step.parameters(), lr=0.01)
    for _ in range(60):
        loss = (fq(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scale, zero_point = fq.calculate_qparams()
    assert scale != observed[0]
    assert (fq.step.shift is not None and bool(fq.step.shift != 0)) == (learned == "lsq+")
    assert zero_point == observed[1] or learned == "lsq+"
    before = fq.calculate_qparams()
    fq.observer_enabled = True
    fq(x * 100)
    assert all(torch.equal(a, b) for a, b in zip(fq.calculate_qparams(), before, strict=True))
    low, high = fq.range()
    assert (high - low) / 15 == pytest.approx(float(scale))


def test_they_learn_to_clip_what_plain_ranges_cannot() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 512)
    x[0, 0] = 40.0
    fq = activation_fq()
    plain = error_of(fq, x, fq.grid.qparams(x.min(), x.max()))
    first = (fq(x) - x).square().mean().item()
    assert first < 0.9 * plain
    optimizer = torch.optim.Adam(fq.parameters(), lr=0.005)
    for _ in range(100):
        loss = (fq(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() <= 1.05 * first
    assert loss.item() < 0.6 * plain


def test_8_bits_begin_at_the_observed_range() -> None:
    fq = FakeQuantize(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, learned="lsq", learned_rate=2.0
    )
    fq.may_learn = False
    x = torch.randn(8, 64)
    fq(x)
    observed = fq.calculate_qparams()
    assert not fq.learns
    fq.may_learn, fq.observer_enabled = True, False
    fq(x)
    assert fq.learns
    assert all(torch.equal(a, b) for a, b in zip(fq.calculate_qparams(), observed, strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("is_weight", [True, False])
def test_a_scale_never_grows_until_everything_is_rounded_to_0(optimizer: Any, is_weight: bool) -> None:
    """With a rate at which LSQ's scale exceeds all values in one step, and a gradient that increases it."""
    step = LearnedStep(None, quant_min=-7, quant_max=7, learn_zero_point=False)
    x = torch.linspace(-1, 1, 64)
    step.begin(torch.tensor(1 / 7), torch.tensor(0))
    moves = optimizer(step.parameters(), lr=10.0)
    for sign in (1.0,) * 3 + (-1.0,) * 20:
        moves.zero_grad()
        scale, _ = step._values(1.0)
        (-sign * scale).backward()
        moves.step()
        assert float(step.round(x, axis=None, is_weight=is_weight).detach().abs().max()) > 0
        if sign > 0:
            assert float(step.qparams()[0]) == pytest.approx(1.0), "where 1 is still rounded to an integer"
    assert float(step.qparams()[0]) < 1 / 7


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("end", [0, 15])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_zero_point_comes_back_from_the_end_of_the_grid(rate: float, end: int, optimizer: Any) -> None:
    """With gradients that push it beyond, and then back."""
    step = LearnedStep(None, quant_min=0, quant_max=15, learn_zero_point=True, rate=rate)
    step.begin(torch.tensor(0.1), torch.tensor(end))
    moves = optimizer(step.parameters(), lr=0.01)
    for away in (True,) * 3 + (False,) * 50:
        moves.zero_grad()
        _, zero_point = step._values(1.0)
        (zero_point * (1.0 if away == (end == 0) else -1.0)).backward()
        moves.step()
        if away:
            assert int(step.qparams()[1]) == end
    assert int(step.qparams()[1]) != end


@given(
    st.integers(0, 15),
    st.floats(-3, 3, width=32),
    st.sampled_from([1.0, 0.25, 3.0]),
    st.sampled_from([(0, 15), (-8, 7)]),
)
def test_a_learned_zero_point_is_on_the_grid_and_never_without_a_gradient_into_it(
    base: int, shift: float, rate: float, grid: tuple[int, int]
) -> None:
    step = LearnedStep(None, quant_min=grid[0], quant_max=grid[1], learn_zero_point=True, rate=rate)
    step.begin(torch.tensor(0.1), torch.tensor(grid[0] + base))
    assert step.shift is not None
    step.shift.data.fill_(shift)
    wanted = grid[0] + base + rate * 15 * shift
    assert float(step._values(1.0)[1].detach()) == pytest.approx(min(max(wanted, grid[0]), grid[1]), abs=1e-4)
    assert grid[0] <= int(step.qparams()[1]) <= grid[1]
    for sign in (1.0, -1.0):
        step.shift.grad = None
        (sign * step._values(1.0)[1]).backward()
        moves_out = wanted < grid[0] - 1e-3 if sign > 0 else wanted > grid[1] + 1e-3
        moves_in = wanted > grid[0] + 1e-3 if sign > 0 else wanted < grid[1] - 1e-3
        assert not (moves_out and bool(step.shift.grad)), "farther from the grid"
        assert not moves_in or float(step.shift.grad) * sign > 0


def test_a_zero_point_at_the_end_of_the_grid_learns_what_inputs_need() -> None:
    fq = activation_fq()
    x = torch.linspace(0, 4, 256).reshape(4, 64)
    fq(x)
    assert fq.step is not None
    assert fq.step.shift is not None
    fq.step.shift.data.fill_(-0.001)
    optimizer = torch.optim.Adam(fq.step.parameters(), lr=1e-3)
    x = torch.linspace(-1, 4, 256).reshape(4, 64)
    for _ in range(300):
        optimizer.zero_grad()
        (fq(x) - x).square().mean().backward()
        optimizer.step()
    assert int(fq.calculate_qparams()[1]) > 0


def test_the_state_of_releases_before_stands_for_the_same_scale() -> None:
    """There it was ``exp(10 * log_ratio)``."""
    state = activation_fq().state_dict()
    for logarithm in (-0.7, 0.4):
        state |= {"step.learning": torch.tensor(1), "step.base_scale": torch.tensor(0.1)}
        state |= {"step.log_ratio": torch.tensor(logarithm / 10), "step.shift": torch.tensor(0.02)}
        fq = activation_fq()
        fq.load_state_dict(state)
        scale, zero_point = fq.calculate_qparams()
        assert float(scale) == pytest.approx(0.1 * math.exp(logarithm))
        assert int(zero_point) == 3, "10 * 0.02 * 15"


def test_evaluation_before_the_training_begins_nothing() -> None:
    fq = activation_fq()
    fq.observe(torch.randn(4, 4))
    fq.eval()
    fq(torch.randn(4, 4))
    assert not fq.learns


def test_state_reloads_and_goes_on_learning_where_it_was() -> None:
    fq = activation_fq()
    fq(torch.randn(4, 4))
    with torch.no_grad():
        fq.step.log_ratio.add_(0.03)  # type: ignore[union-attr]
    buffer = io.BytesIO()
    torch.save(fq.state_dict(), buffer)
    buffer.seek(0)
    other = activation_fq()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 4)
    assert other.learns
    assert torch.equal(other(x), fq(x))
    assert all(torch.equal(a, b) for a, b in zip(other.calculate_qparams(), fq.calculate_qparams(), strict=True))


def test_parameters_stay_the_same_float32_objects_in_any_precision() -> None:
    fq = activation_fq()
    before = dict(fq.named_parameters())
    fq.to(torch.bfloat16)
    assert all(parameter is before[name] for name, parameter in fq.named_parameters())
    assert {parameter.dtype for parameter in fq.parameters()} == {torch.float32}
    assert copy.deepcopy(fq)(torch.randn(3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_grid_that_stands_for_a_relu6_stays_within_it() -> None:
    fq = activation_fq()
    fq.begins_at_zero(6.0)
    fq(torch.linspace(0, 6, 64).reshape(4, 16))
    assert fq.step is not None
    with torch.no_grad():
        fq.step.log_ratio.fill_(1.0)
    scale, zero_point = fq.calculate_qparams()
    assert zero_point == 0
    assert float(scale) * 15 <= 6.0 + 1e-5


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize(
    "scheme", [Scheme(weight_bits=4, learned_step="lsq"), Scheme(learned_step="lsq+")], ids=["lsq", "lsq+"]
)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("depthwise", "functional")], ids=lambda c: c.name
)
@pytest.mark.slow
def test_int8_equals_what_learned(mode: str, scheme: Scheme, case: object) -> None:
    torch.manual_seed(0)
    flow, network = get_mode(mode), case.network()  # type: ignore[attr-defined]
    args, kwargs, _ = case.batch(8)  # type: ignore[attr-defined]
    prepared = flow.prepare(network, Example(args, kwargs), Recipe(mode, "x86", scheme))
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    train(prepared, case, steps=8)  # type: ignore[arg-type]
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    train(prepared, case, steps=12)  # type: ignore[arg-type]
    ratios = [p for name, p in prepared.named_parameters() if name.endswith("log_ratio")]
    assert ratios
    assert any(bool(ratio.any()) for ratio in ratios)
    args, kwargs, _ = case.batch(64)  # type: ignore[attr-defined]
    converted = flow.convert(cpu_copy(prepared), Example(args, kwargs))
    assert min(check.sqnr_db for check in converted.checks) > (55 if onednn_is_exact() else 45)


@pytest.mark.parametrize("learned", ["lsq", "lsq+"])
def test_gradients_of_a_range_of_float32s_largest_values_are_finite(learned: str) -> None:
    fq = activation_fq(learned)
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    x[0] = torch.finfo(torch.float32).min
    fq(x).backward(torch.full_like(x, 100.0))
    fq(1.2 * x[1:] * 2.0**126).backward(torch.full_like(x[1:], 100.0))
    gradients = [parameter.grad for parameter in fq.parameters()]
    assert len(gradients) == (1 if learned == "lsq" else 2)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_scale_that_shrinks_stays_finite() -> None:
    """Divided by its own square, the gradient of a scale near 0 would be infinite."""
    step = LearnedStep(None, quant_min=-127, quant_max=127, learn_zero_point=False)
    step.begin(torch.tensor(0.01), torch.tensor(0))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.5, momentum=0.9)
    x = torch.linspace(-1, 1, 64)
    for _ in range(300):
        optimizer.zero_grad()
        step.round(x, axis=None, is_weight=True).abs().sum().backward()
        optimizer.step()
    scale, _ = step.qparams()
    assert torch.isfinite(step.log_ratio)
    assert 0 < float(scale) < 0.01
