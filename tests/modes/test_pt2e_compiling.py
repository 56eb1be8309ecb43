"""Int8 graphs of mode pt2e compiled by AOTInductor, and messages if that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qat_lightning.graph.example import Example
from qat_lightning.modes.decomposed import int8
from qat_lightning.modes.decomposed.compiling import compile_library
from qat_lightning.modes.decomposed.int8 import Int8Network
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.pt2e import Pt2eMode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import SEVEN_BITS


class Sequences(nn.Module):
    """Padded, strided, grouped convolutions of a sequence, one called twice, residual adds, a linear layer added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm1d(16)
        self.conv, self.norm2 = nn.Conv1d(16, 16, 3, padding=2, dilation=2, groups=4), nn.BatchNorm1d(16)
        self.last = nn.Conv1d(16, 16, 3, padding=1)
        self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for _ in range(2):
            x = x + F.relu(self.norm2(self.conv(x)))
        x = F.relu(self.last(x) + x).mean(2)
        return self.head(x + F.relu(self.gate(x)))


def convert(network: nn.Module, example: Example) -> Int8Network:
    # 7 bits, which oneDNN multiplies exactly on every CPU
    prepared = Pt2eMode().prepare(network, example, Recipe("pt2e", "x86", SEVEN_BITS))
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    for _ in range(3):
        prepared.train()(*example.args)
    converted = Pt2eMode().convert(cpu_copy(prepared), example).network
    assert isinstance(converted, Int8Network)
    return converted


@pytest.mark.slow
def test_sequences_run_in_int8_kernels() -> None:
    """With residual adds, at any batch size, and with gradients enabled during compilation."""
    torch.manual_seed(0)
    example = Example((torch.randn(8, 3, 40),))
    network = convert(Sequences(), example)
    counters.clear()
    library = compile_library(network.decomposed, network.spec, list(example.args))
    # One of them has no ReLU of its own behind it.
    assert counters["inductor"]["qconv_weight_prepack_matcher_count"] == 4
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 2
    with torch.no_grad():
        for size in (1, 3, 16):
            x = torch.randn(size, 3, 40)
            assert sqnr_db(network.decomposed(x)[0], library(x)[0]) > 45


def test_an_error_without_words_is_named_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a missing compiler is not reported if there is one."""

    def fuse(*inputs: Any) -> Any:
        raise AssertionError

    example = Example((torch.randn(4, 8),))
    network = convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), example)
    monkeypatch.setattr(int8, "compile_library", fuse)
    with pytest.warns(UserWarning, match=r"\(AssertionError: in fuse, test_pt2e_compiling\.py:\d+\)\. QAT"):
        network(*example.args)
