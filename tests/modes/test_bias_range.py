"""Biases beside which a channel's weight is negligible fit into the 32 bits in which QNNPACK stores them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from qat_lightning import Example, Recipe, Scheme, calibrate, convert, prepare
from qat_lightning.numerics.sqnr import sqnr_db


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_channel_that_batchnorm_has_nearly_removed_stays_int8(mode: str, backend: str, granularity: str) -> None:
    torch.manual_seed(0)
    norm, last = nn.BatchNorm2d(8), nn.Linear(144, 5)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1), nn.Flatten(), last)
    images = 0.1 * torch.randn(16, 3, 8, 8)
    network(images)
    with torch.no_grad():
        norm.weight[:2] = torch.tensor([1e-8, 0.0])
        norm.bias[:2] = torch.tensor([-3.0, 2.0])
        if granularity == "per_tensor":  # the scale is that of all channels
            last.weight *= 1e-8
            last.bias.fill_(1.0)
    network.eval()
    recipe = Recipe(mode, backend, Scheme(weight_granularity=granularity), kind="static")  # type: ignore[arg-type]
    prepared = prepare(copy.deepcopy(network), Example((images,)), recipe)
    calibrate(prepared, [images])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This CPU has no VNNI")
        made = convert(prepared, Example((images,)))
    assert [row.reason for row in made.coverage if row.what == "layer" and not row.quantized] == []
    assert sqnr_db(prepared(images), made(images)) > 35
