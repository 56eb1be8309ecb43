"""Modules that FX calls as a whole stay float inside, and the rest of the network is int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe

TOKENS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
WHOLE = {
    "gru": lambda: nn.GRU(16, 16, batch_first=True),
    "bilinear": lambda: nn.Bilinear(16, 16, 16),
}


class Network(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part, self.head = nn.Linear(16, 16), part, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if isinstance(self.part, nn.GRU):
            x = self.part(x)[0]
        else:
            x = self.part(x, x) if isinstance(self.part, nn.Bilinear) else self.part(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("kind", ["qat", "static"])
@pytest.mark.parametrize("whole", WHOLE)
def test_it_stays_float_with_all_that_is_in_it(whole: str, kind: str, tmp_path: Path) -> None:
    flow, example = get_mode("fx"), Example((TOKENS,))
    prepared = flow.prepare(Network(WHOLE[whole]()), example, Recipe("fx", "x86", kind=kind))
    if kind == "static":
        calibrate(prepared, [TOKENS])
    else:
        set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
        prepared.train()(TOKENS).sum().backward()
    converted = flow.convert(cpu_copy(prepared), example)
    rows = {row.name: row for row in converted.coverage}
    assert {name for name, row in rows.items() if row.quantized} == {"before", "head"}
    inside = {name for name in rows if name.startswith("part")}
    assert inside
    assert all(rows[name].reason for name in inside)
    saved = QuantizedNetwork(converted, Recipe("fx", "x86"), example)
    saved.save(tmp_path / "model.int8")
    again = load_quantized(tmp_path / "model.int8", network=Network(WHOLE[whole]()))
    assert torch.equal(again(TOKENS), saved(TOKENS))


@pytest.mark.filterwarnings("error")
def test_functions_of_a_fixed_range_are_prepared_without_a_word_of_upstreams() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.hardsigmoid(self.gate(x)) * torch.sigmoid(self.value(x))

    flow, example = get_mode("fx"), Example((TOKENS,))
    rows = {row.name: row for row in flow.coverage(flow.prepare(Gated(), example, Recipe("fx", "x86")), example)}
    assert rows["hardsigmoid"].reason == "its int8 kernel has another grid"
    assert "not quantized" in rows["sigmoid"].reason
