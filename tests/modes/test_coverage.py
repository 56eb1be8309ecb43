"""Coverage: the prediction after preparing equals the result of conversion, for layers and ops, with reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from qat_lightning import coverage_table
from qat_lightning.graph.example import Example
from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.backends import pairs
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import CASES, Attention, Case, train

TABLE = [
    pytest.param(mode, backend, case, id=f"{mode}-{backend}-{case.name}")
    for mode, backend in pairs()
    if backend in ("x86", "xnnpack", "qnnpack")
    for case in CASES
    # The others differ in no rule; in control_flow a layer that the example does not run is never observed.
    if mode in case.modes
    and case.name != "control_flow"
    and (backend == "x86" or case.name in ("depthwise", "attention"))
]


def both(
    mode: str, backend: str, network: nn.Module, *args: Tensor, **settings: Any
) -> tuple[list[LayerCoverage], ...]:
    """Coverage after preparing and after conversion."""
    flow, example = get_mode(mode), Example(args)
    prepared = flow.prepare(network, example, Recipe(mode, backend, **settings))
    prepared(*args)
    converted = flow.convert(cpu_copy(prepared), example)
    return flow.coverage(cpu_copy(prepared), example), [*converted.coverage, *converted.operations]


def rows_of(mode: str, network: nn.Module, *args: Tensor, **settings: Any) -> dict[str, LayerCoverage]:
    said, done = both(mode, "x86", network, *args, **settings)
    assert said == done
    return {row.name: row for row in done}


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_what_is_said_after_preparing_is_done(mode: str, backend: str, case: Case) -> None:
    torch.manual_seed(0)
    args, kwargs, _ = case.batch(8)
    flow, example = get_mode(mode), Example(args, kwargs)
    prepared = flow.prepare(case.network(), example, Recipe(mode, backend))
    train(prepared, case, steps=2)
    said = flow.coverage(cpu_copy(prepared), example)
    converted = flow.convert(cpu_copy(prepared), example)
    assert said == [*converted.coverage, *converted.operations]
    assert all(row.reason for row in said if not row.quantized)
    assert not any(row.reason for row in said if row.quantized)
    assert sum(row.quantized and row.what == "layer" for row in said) >= case.layers


class Mixed(nn.Module):
    """An int8 layer, ops that stay float in some mode, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)) + F.relu(self.second(x))
        return self.head(self.norm(F.gelu(x)))


def test_reasons_in_fx() -> None:
    rows = rows_of("fx", Mixed(), torch.randn(8, 8), exclude=("head",))
    assert "relu" not in rows, "it is part of the layer in front of it"
    assert rows["gelu"].reason == "mode='fx' has no int8 kernel for gelu"
    assert rows["norm"].reason == "LayerNorm is not quantized in mode='fx'"
    assert rows["head"].reason == "excluded"
    assert rows["add"].quantized
    assert rows["first"].what == "layer"
    assert rows["add"].what == "op"


def test_reasons_in_eager() -> None:
    rows = rows_of("eager", Mixed(), torch.randn(8, 8))
    assert rows["add"].reason == "functions stay float in mode='eager'"
    assert rows["relu"].calls == 2


def test_reasons_in_pt2e() -> None:
    rows = rows_of("pt2e", Mixed(), torch.randn(8, 8), exclude=("second",))
    assert rows["second"].reason == "excluded"
    assert "has no rule for aten.layer_norm" in rows["norm.layer_norm"].reason


class Moves(nn.Module):
    """Nothing is computed between its layers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.dropout(self.first(x), 0.1, self.training).transpose(2, 3)
        return self.last(F.dropout2d(x, 0.2, self.training).repeat_interleave(2, 2))


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_what_only_moves_values_is_not_reported(mode: str) -> None:
    assert set(rows_of(mode, Moves(), torch.randn(2, 3, 8, 8))) == {"first", "last"}


class Branches(nn.Module):
    """A layer in a branch of torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cond(x.sum() > 0, lambda v: self.inside(v).relu(), lambda v: v * 2, (x,))
        return self.last(x)


def test_branches_of_cond_train_and_are_reported() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    prepared = get_mode("pt2e").prepare(Branches(), Example((x,)), Recipe("pt2e", "x86"))
    for images in (x, -x):
        prepared(images).sum().backward()
    rows = rows_of("pt2e", Branches(), x)
    assert rows["first"].quantized
    assert rows["last"].quantized
    assert "branch of torch.cond" in rows["inside"].reason
    inside = [row for row in rows.values() if row.what == "op" and "torch.cond" in row.reason]
    assert sorted(row.kind for row in inside) == ["mul", "relu"]


def test_a_range_that_was_never_observed_is_the_reason() -> None:
    torch.manual_seed(0)
    flow, example = get_mode("pt2e"), Example((torch.randn(8, 8),))
    prepared = flow.prepare(Mixed(), example, Recipe("pt2e", "x86"))
    prepared(*example.args)
    copied = cpu_copy(prepared)
    copied.fake_quantize.x.forget()
    rows = {row.name: row for row in flow.convert(copied, example).coverage}
    assert "no finite range was observed" in rows["first"].reason


def test_multiply_accumulates_are_those_of_one_sample() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7))
    for batch in (2, 6):
        rows = rows_of("fx", network, torch.randn(batch, 3, 8, 8))
        assert rows["0"].macs == 5 * 36 * 3 * 9
        assert rows["3"].macs == 5 * 36 * 7


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_products_of_matrices_count(mode: str) -> None:
    """The two products of attention, with 16 tokens and 32 channels, are int8 in mode fx only."""
    rows = list(rows_of(mode, Attention(), torch.randn(4, 3, 8, 8)).values())
    products = sum(row.macs or 0 for row in rows if row.kind == "matmul")
    assert products == 2 * 16 * 16 * 32
    total = sum(row.macs or 0 for row in rows)
    assert int8_share(rows) == pytest.approx(1 if mode == "fx" else 1 - products / total)


def test_the_table_names_what_stayed_float_and_why() -> None:
    said, _ = both("fx", "x86", Mixed(), torch.randn(8, 8))
    console = Console(width=160, record=True, quiet=False)
    console.print(coverage_table(said, title="Coverage"))
    text = console.export_text()
    assert "no int8 kernel for gelu" in text
    assert "3 of 3 Linear; 100.0 % of the multiply-accumulates" in text


def test_the_table_shows_which_layers_have_weights_of_fewer_bits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [LayerCoverage(name, "Linear", name != "c") for name in "abc"]
    table = coverage_table(rows, weight_bits={"a": 4, "b": 8}.__getitem__)
    Console(width=160).print(table)
    rows_shown = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [(row[1].strip(), row[5].strip()) for row in rows_shown] == [
        ("int8 (int4 weights)", "a"),
        ("int8", "b"),
        ("float", "c"),
    ]
