"""BatchNorm: into which layers it folds, and that a folded layer computes the same as both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.layers.batchnorm import (
    factor_of,
    fold_factor,
    folded_bias,
    folded_parameters,
    folded_weight,
    folds_into,
    has_statistics,
    is_batchnorm,
)
from qat_lightning.layers.operators import OPERATORS
from qat_lightning.layers.qat_modules import FreezableBatchNorm2d, FunctionalBatchNorm

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 2, groups=2), torch.randn(3, 4, 5)),
    "conv2d": (nn.Conv2d(4, 6, 2, bias=False), torch.randn(3, 4, 5, 5)),
    "conv3d": (nn.Conv3d(4, 6, 2), torch.randn(3, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6, bias=False), torch.randn(3, 4)),
}


def trained(batchnorm: Any) -> Any:
    batchnorm.running_mean.normal_()
    batchnorm.running_var.uniform_(0.5, 2)
    if batchnorm.affine:
        nn.init.normal_(batchnorm.weight)
        nn.init.normal_(batchnorm.bias)
    return batchnorm.eval()


@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("row", [row for row in OPERATORS if row.batchnorm], ids=lambda row: row.name)
def test_a_folded_layer_computes_what_both_did(row: Any, affine: bool) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[row.name]
    batchnorm = trained(row.batchnorm(6, affine=affine, eps=0.1))
    assert folds_into(batchnorm, layer)
    wanted = batchnorm(layer(x))
    function, bias = row.functions[0], layer.bias
    more: dict[str, Any] = {"groups": layer.groups} if hasattr(layer, "groups") else {}
    factor = factor_of(batchnorm)
    ours = folded_weight(layer.weight, factor), folded_bias(bias, batchnorm.running_mean, factor, batchnorm.bias)
    for weight, shift in (ours, folded_parameters(layer, batchnorm)):
        torch.testing.assert_close(function(x, weight, shift, **more), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_transposed_weight_is_folded_along_its_second_dimension() -> None:
    torch.manual_seed(0)
    layer, batchnorm = nn.ConvTranspose2d(3, 5, 2), trained(nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 4, 4)
    wanted = batchnorm(layer(x))
    factor = fold_factor(batchnorm.weight, batchnorm.running_var, batchnorm.eps)
    layer.bias.copy_(folded_bias(layer.bias, batchnorm.running_mean, factor, batchnorm.bias))  # type: ignore[union-attr]
    layer.weight.copy_(folded_weight(layer.weight, factor, axis=1))
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_what_folds_into_nothing() -> None:
    conv = nn.Conv2d(2, 2, 1)
    assert not folds_into(nn.BatchNorm2d(2, track_running_stats=False), conv)
    assert not folds_into(nn.BatchNorm1d(2), conv)
    assert not folds_into(nn.InstanceNorm2d(2, track_running_stats=True), conv)
    assert not folds_into(nn.BatchNorm2d(2), nn.Embedding(2, 2))


def test_what_a_batchnorm_is() -> None:
    assert is_batchnorm(FreezableBatchNorm2d(2))
    assert is_batchnorm(FunctionalBatchNorm(0.1, 1e-5))
    assert not is_batchnorm(nn.InstanceNorm2d(2))
    assert has_statistics(FreezableBatchNorm2d(2))
    assert not has_statistics(FunctionalBatchNorm(0.1, 1e-5))
