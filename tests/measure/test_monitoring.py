"""The monitor's figures, compared with the arithmetic of fake-quant and with numbers computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.measure.layer_figures import LayerFigures, decibel
from qat_lightning.measure.monitoring import Probe, along, grid_of, totals
from qat_lightning.modes.prepared import fake_quantizers, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import choose_qparams, fake_quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES, Case, Plain, train

floats = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(floats, min_size=1, max_size=40), floats, floats, st.booleans())
def test_the_grid_is_that_of_fake_quant_and_the_mask_that_of_its_gradient(
    values: list[float], one: float, other: float, symmetric: bool
) -> None:
    limits = {"quant_min": -127, "quant_max": 127} if symmetric else {"quant_min": 0, "quant_max": 255}
    low, high = torch.tensor(min(one, other)), torch.tensor(max(one, other))
    scale, zero_point = choose_qparams(low, high, symmetric=symmetric, **limits)
    x = torch.tensor(values, requires_grad=True)
    rounded = fake_quantize(x, scale, zero_point, **limits)
    (gradient,) = torch.autograd.grad(rounded.sum(), x)
    integers, clipped = grid_of(x, scale, zero_point, **limits)
    assert torch.equal((integers - zero_point) * scale, rounded)
    assert torch.equal(clipped, gradient == 0)


def test_the_grid_of_channels() -> None:
    weight = torch.randn(5, 3, 2)
    low, high = weight.flatten(1).aminmax(dim=1)
    scale, zero_point = choose_qparams(low, high, quant_min=-7, quant_max=7, symmetric=True)
    integers, clipped = grid_of(weight, scale, zero_point, quant_min=-7, quant_max=7, axis=0)
    expected = fake_quantize(weight, scale, zero_point, quant_min=-7, quant_max=7, axis=0)
    assert torch.equal(integers * along(scale, weight, 0), expected)
    assert not clipped.any()


@pytest.mark.parametrize(("signal", "noise"), [(0.0, 1.0), (float("nan"), 1.0), (1.0, float("inf")), (0.0, 0.0)])
def test_there_is_no_ratio_without_a_finite_signal(signal: float, noise: float) -> None:
    assert decibel(signal, noise) is None


def prepared_plain(mode: str, *, normal: bool = False, **scheme: Any) -> nn.Module:
    torch.manual_seed(0)
    network = Plain()
    if normal:
        for layer in (network.conv, network.head):
            nn.init.normal_(layer.weight)
    recipe = Recipe(mode, "x86", Scheme(**scheme))
    return get_mode(mode).prepare(network, Example((torch.randn(4, 3, 8, 8),)), recipe)


def measured(prepared: nn.Module, *args: Tensor, **settings: Any) -> tuple[dict[str, LayerFigures], Probe]:
    probe = Probe({"net": prepared}, **settings)
    with probe:
        prepared(*args).square().sum().backward()
    return {row.layer: row for row in probe.figures()}, probe


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_layer_by_hand(mode: str) -> None:
    """Clipping, SQNR and scale of the convolution's output, with half of its actual range."""
    prepared = prepared_plain(mode)
    x = torch.randn(16, 3, 8, 8)
    prepared(x)
    places = {place.layer: place for *_, place in Probe({"net": prepared})._places if place.what == "activation"}
    fq = places["conv"].fq
    fq.max_val.fill_(float(fq.max_val) / 2)
    prepared.eval()
    seen: list[tuple[Tensor, Tensor]] = []
    handle = places["conv"].module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out)))
    rows, _ = measured(prepared, x, samples=16)
    handle.remove()
    value, rounded = seen[0]
    row = rows["conv"]
    scale, zero_point = (float(q) for q in fq.calculate_qparams())
    assert (row.scale, row.zero_point) == (scale, int(zero_point))
    assert row.high == pytest.approx(float(fq.max_val))
    # A value that rounds to the last step is not clipped.
    assert row.clipped_share == pytest.approx(float((value > fq.max_val + scale / 2).float().mean()))
    assert 0 < row.clipped_share < 1
    assert row.activation_sqnr_db == pytest.approx(sqnr_db(value, rounded.detach()), abs=1e-3)
    assert 0 < row.gradient_cut_share < 1
    assert row.kind == "Conv2d"
    assert row.mode == mode


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_the_gradient_cut_of_a_weight_stands_beside_that_of_its_activation(mode: str) -> None:
    """3 bits clip the largest weights: their gradient lacks a part that the rounded weight's gradient has."""
    prepared = prepared_plain(mode, normal=True, weight_bits=3)
    x = torch.randn(16, 3, 8, 8)
    places = {place.layer: place for *_, place in Probe({"net": prepared})._places if place.what == "weight"}
    gradients: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(gradients.append)

    handle = places["head"].module.register_forward_hook(watch)
    rows, _ = measured(prepared, x)
    handle.remove()
    passed = prepared.get_parameter("head.weight").grad
    share = 1 - float(passed.abs().sum() / gradients[0].abs().sum())
    assert 0 < share < 1
    assert rows["head"].weight_gradient_cut_share == pytest.approx(share, abs=1e-6)
    assert rows["conv"].weight_gradient_cut_share > 0
    assert rows["conv"].gradient_cut_share == 0
    assert totals(rows.values())["most_weight_gradient_cut_share"] == max(
        rows[name].weight_gradient_cut_share for name in ("conv", "head")
    )


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_the_gradient_cut_leaves_out_channels_whose_batchnorm_is_0(mode: str) -> None:
    prepared = prepared_plain(mode, normal=True, weight_bits=3)
    with torch.no_grad():
        prepared.get_parameter("bn.weight")[:2] = 0.0
        prepared.get_parameter("bn.bias")[:2] = 1.0
    rows, _ = measured(prepared, torch.randn(16, 3, 8, 8))
    assert 0 < rows["conv"].weight_gradient_cut_share < 1


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_scale_and_range_of_weights(mode: str, granularity: str) -> None:
    prepared = prepared_plain(mode, weight_granularity=granularity)
    with torch.no_grad():
        prepared.get_parameter("head.weight")[0] *= 10
    rows, _ = measured(prepared, torch.randn(16, 3, 8, 8))
    weight = prepared.get_parameter("head.weight").detach()
    largest = weight.abs().amax(1) if granularity == "per_channel" else weight.abs().amax()
    row = rows["head"]
    assert row.weight_scale_min == pytest.approx(float((largest / 127).min()))
    assert row.weight_scale_max == pytest.approx(float((largest / 127).max()))
    assert (row.weight_scale_min < row.weight_scale_max) == (granularity == "per_channel")
    assert (row.weight_low, row.weight_high) == pytest.approx((-float(largest.max()), float(largest.max())))


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_dead_channels_are_counted_once(mode: str) -> None:
    """Two channels have a BatchNorm weight of 0; one also has a negative bias, which ReLU makes 0."""
    prepared = prepared_plain(mode)
    with torch.no_grad():
        prepared.get_parameter("bn.weight")[:2] = 0.0
        prepared.get_parameter("bn.bias")[1] = -1.0
    x = torch.randn(16, 3, 8, 8)
    prepared(x)
    rows, _ = measured(prepared, x)
    assert rows["conv"].dead_channels == 2
    assert rows["conv"].weight_sqnr_db > 30


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_before_fake_quantization_is_enabled_activations_are_measured_and_weights_are_not(mode: str) -> None:
    prepared = prepared_plain(mode)
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    prepared(torch.randn(16, 3, 8, 8))
    rows, _ = measured(prepared, torch.randn(16, 3, 8, 8))
    assert rows["conv"].activation_sqnr_db > 20
    assert rows["conv"].weight_sqnr_db is None


def test_fewer_bits_are_noisier() -> None:
    ratios = []
    for bits in (8, 4):
        torch.manual_seed(0)
        recipe = Recipe("fx", "x86", Scheme(weight_bits=bits))
        x = torch.randn(16, 3, 8, 8)
        prepared = get_mode("fx").prepare(Plain(), Example((x,)), recipe)
        prepared(x)
        rows, probe = measured(prepared, x, histograms=True)
        ratios.append(rows["conv"].weight_sqnr_db)
        counts, edges = probe.histograms()["weight_integers/conv"]
        assert len(counts) == 2**bits - 1
        assert counts.sum() == 16 * 3 * 3 * 3
        assert edges[0] == -(2 ** (bits - 1)) + 0.5
    assert ratios[0] - ratios[1] == pytest.approx(24, abs=4), "6 dB a bit"


MODES_AND_CASES = [
    pytest.param(mode, case, id=f"{mode}-{case.name}")
    for case in CASES
    for mode in ("eager", "fx", "pt2e")
    if mode in case.modes
]


@pytest.mark.parametrize(("mode", "case"), MODES_AND_CASES)
def test_measuring_changes_nothing_and_leaves_nothing(mode: str, case: Case) -> None:
    """Two networks train bit-equal, one of them measured in every step."""
    torch.manual_seed(0)
    args, kwargs, _ = case.batch(8)
    prepared = get_mode(mode).prepare(case.network(), Example(args, kwargs), Recipe(mode, "x86"))
    other = copy.deepcopy(prepared)
    torch.manual_seed(1)
    train(prepared, case, steps=3)
    torch.manual_seed(1)
    with Probe({"net": other}, histograms=True) as probe:
        train(other, case, steps=3)
    assert {layer for layer, *_ in probe._places} >= {row.layer for row in probe.figures()}
    assert len(probe.figures()) >= case.layers - (case.name == "control_flow")
    for (name, one), (_, two) in zip(prepared.state_dict().items(), other.state_dict().items(), strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one, two), name
    assert not any(module._forward_hooks or module._backward_hooks for _, module in fake_quantizers(other))


def test_what_never_ran_has_no_row() -> None:
    prepared = prepared_plain("fx")
    assert Probe({"net": prepared}).figures() == []
    fq = FakeQuantize(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    assert not fq.seen
