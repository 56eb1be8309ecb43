"""The choices in benchmarks.mixed_bits: both keep the size, and the integer program has no larger loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.mixed_bits import Case, choices, size_mb
from qat_lightning import Scheme

pytest.importorskip("scipy")


@pytest.mark.slow
def test_both_choices_keep_the_size_of_five_bits_on_average() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 8))
    case = Case(network, [torch.randn(32, 64)], lambda method, scheme: {"accuracy": 0.0})
    found = choices(case)
    eight, four = (size_mb(case, Scheme(weight_bits=bits)) for bits in (8, 4))
    assert four < found["limit_mb"] < eight
    for name in ("milp", "greedy"):
        assert size_mb(case, Scheme(overrides=found[name])) <= found["limit_mb"]
        assert set(map(str, found[name].values())) == {"{'weight_bits': 4}"}
