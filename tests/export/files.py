"""Helpers for tests of several formats."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.numerics.sqnr import sqnr_db
from tests.artifact.making import Batch, batch_of, case_named, quantize
from tests.support.exactness import SEVEN_BITS


@functools.cache
def quantized_case(name: str, mode: str, backend: str = "x86") -> tuple[QuantizedNetwork, Batch]:
    """An int8 network of the table, created once, and a function that makes its batches."""
    torch.manual_seed(0)
    case = case_named(name)
    return quantize(mode, backend, case.network(), batch_of(case), scheme=SEVEN_BITS), batch_of(case)


def assert_same_outputs(network: nn.Module, run: Any, batch: Batch, least: float = 30.0) -> None:
    """Compare a loaded artifact with the network at two batch sizes, by SQNR in dB."""
    for size in (1, 6):
        args, kwargs = batch(size)
        with torch.no_grad():
            expected = tree_leaves(network(*args, **kwargs))
        got = run([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        for one, other in zip(expected, got, strict=True):
            assert one.shape == other.shape
            assert sqnr_db(one, other) > least


class Odd(nn.Module):
    """Ends with a function that ONNX does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(F.relu(self.conv(x)))
