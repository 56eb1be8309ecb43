"""Layers in training: the folded weight equals the kernel's, every channel learns, BatchNorm freezes by a flag."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qat_lightning.layers.batchnorm import fake_quantize_folded, fold_factor
from qat_lightning.layers.qat_modules import (
    FOLDED_OF_FLOAT,
    make_batchnorm_freezable,
    make_batchnorm_plain,
)
from qat_lightning.modes.qconfig import make_qconfig
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme

LAYERS = [
    pytest.param(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), torch.randn(5, 4, 9), id="conv1d"),
    pytest.param(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), torch.randn(5, 4, 9, 9), id="conv2d"),
    pytest.param(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), torch.randn(5, 2, 4, 4, 4), id="conv3d"),
    pytest.param(nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(5, 4), id="linear"),
]


def _trained(layer: nn.Module, batchnorm: nn.Module) -> tuple[nn.Module, nn.Module]:
    layer, batchnorm = copy.deepcopy(layer), copy.deepcopy(batchnorm)
    torch.manual_seed(0)
    batchnorm.running_mean.normal_()
    batchnorm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(batchnorm.weight)
    nn.init.normal_(batchnorm.bias)
    return layer, batchnorm


def _folded(layer: nn.Module, batchnorm: nn.Module, scheme: Scheme | None = None) -> nn.Module:
    qconfig = make_qconfig(Recipe("fx", "x86", scheme or Scheme()))
    return FOLDED_OF_FLOAT[type(layer)].fuse(layer, batchnorm, None, qconfig=qconfig)


@pytest.mark.parametrize(("layer", "batchnorm", "x"), LAYERS)
def test_without_rounding_it_is_layer_and_batchnorm(layer: nn.Module, batchnorm: nn.Module, x: Tensor) -> None:
    layer, batchnorm = _trained(layer, batchnorm)
    folded = _folded(layer, batchnorm)
    folded.weight_fake_quant.fake_quant_enabled = False
    assert folded.weight is layer.weight
    assert torch.equal(folded(x), batchnorm(layer(x)))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(("layer", "batchnorm", "x"), LAYERS)
def test_in_evaluation_it_computes_what_the_folded_kernel_will(
    layer: nn.Module, batchnorm: nn.Module, x: Tensor, granularity: str
) -> None:
    layer, batchnorm = _trained(layer, batchnorm)
    folded = _folded(layer, batchnorm, Scheme(weight_granularity=granularity)).eval()  # type: ignore[arg-type]
    batchnorm.eval()
    kernel = folded.to_float()
    with torch.no_grad():
        expected = folded(x)
        kernel.weight.data = folded.weight_fake_quant(kernel.weight)
        assert torch.allclose(expected, kernel(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layer", "batchnorm", "x"), LAYERS)
def test_to_float_folds_as_upstream_does(layer: nn.Module, batchnorm: nn.Module, x: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        return
    layer, batchnorm = _trained(layer, batchnorm)
    expected = fuse_conv_bn_eval(layer.eval(), batchnorm.eval())
    folded = _folded(layer, batchnorm)
    actual = folded.to_float()
    assert type(actual) is type(layer)
    fq = folded.weight_fake_quant
    fq.observe(expected.weight)
    assert torch.equal(actual.weight, fq.round(expected.weight)), "folded, and on the grid that is packed"
    assert torch.equal(actual.bias, expected.bias)


def test_a_channel_with_gamma_zero_is_finite_and_learns() -> None:
    layer, batchnorm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.zeros_(batchnorm.weight)
    folded = _folded(layer, batchnorm)
    loss = (folded(torch.randn(8, 3, 6, 6)) * torch.randn(8, 4, 4, 4)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert (batchnorm.weight.grad.abs() > 0).all()


def test_folding_does_not_change_a_per_channel_grid() -> None:
    """Per channel, rounding weight * factor and dividing again equals rounding the weight, for any factor."""
    weight = torch.randn(4, 3, 3, 3)
    fq = make_qconfig(Recipe("fx", "x86")).weight()
    plain = fq(weight)
    for factor in (torch.full((4,), 1e-3), torch.tensor([1.0, -2.0, 1e4, 0.25])):
        assert torch.allclose(fake_quantize_folded(weight, factor, fq), plain, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["per_channel", "per_tensor"]), st.booleans())
@settings(max_examples=30)
def test_a_folded_weight_has_the_integers_of_the_kernel_and_the_whole_gradient(
    seed: int, granularity: str, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    factor = torch.randn(6, generator=generator) * 10 ** torch.randint(-3, 3, (6,), generator=generator)
    factor[seed % 6] = 0.0
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_()
    qconfig = make_qconfig(Recipe("fx", "x86", Scheme(weight_granularity=granularity)))  # type: ignore[arg-type]
    fq = qconfig.weight()
    rounded = fake_quantize_folded(weight, factor, fq)
    alive = (factor != 0).reshape(-1, 1, 1, 1)
    shaped = factor.reshape(-1, 1, 1, 1)
    folded = (weight * shaped).detach()
    other = qconfig.weight()
    expected = other(folded)
    scale, zero_point = fq.calculate_qparams()
    assert torch.equal(scale, other.calculate_qparams()[0])
    if granularity == "per_channel":
        assert torch.equal(expected, torch.fake_quantize_per_channel_affine(folded, scale, zero_point, 0, -127, 127))
    else:
        assert torch.equal(expected, torch.fake_quantize_per_tensor_affine(folded, scale, zero_point, -127, 127))
    torch.testing.assert_close(
        rounded, torch.where(alive, expected / torch.where(alive, shaped, 1.0), weight), rtol=1e-6, atol=0.0
    )
    assert rounded.stride() == weight.stride()
    gradient = torch.randn(weight.shape, generator=generator)
    rounded.backward(gradient)
    assert torch.equal(weight.grad, gradient), "nothing of a weight is beyond its own range"


def test_fold_factor_without_gamma() -> None:
    assert torch.allclose(fold_factor(None, torch.tensor([3.0]), 1.0), torch.tensor([0.5]))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_frozen_batchnorm_uses_running_statistics_and_still_learns(kind: type[nn.Module]) -> None:
    x = torch.randn(8, 3, *([4] * (int(kind.__name__[-2]) if kind is not nn.BatchNorm1d else 1)))
    network = nn.Sequential(kind(3))
    plain = copy.deepcopy(network)
    make_batchnorm_freezable(network)
    assert set(network.state_dict()) == set(plain.state_dict())
    assert torch.equal(network(x), plain(x)), "not frozen, it is BatchNorm"
    before = network[0].running_mean.clone()
    network[0].frozen = True
    network.train()
    network(x).sum().backward()
    assert torch.equal(network[0].running_mean, before)
    assert network[0].weight.grad is not None
    assert torch.equal(network(x), plain.eval()(x))
    make_batchnorm_plain(network)
    assert type(network[0]) is kind
