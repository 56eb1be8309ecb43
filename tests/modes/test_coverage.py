"""Coverage: the prediction after preparing equals the result of conversion, for layers and ops, with reasons."""

from __future__ import annotations

import operator
from dataclasses import dataclass
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


class Dense(nn.Module):
    """A linear layer written as a function, as `transformers.pytorch_utils.Conv1D` is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Standardized(Dense):
    """Computes with its weight before it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight / self.weight.std()).T, self.bias)


class Wrapping(nn.Module):
    """Returns what its inner module does in a container, and may be impossible to trace."""

    def __init__(self, inner: nn.Module, wrap: Any, *, decides: bool) -> None:
        super().__init__()
        self.inner, self.wrap, self.decides = inner, wrap, decides

    def forward(self, x: Tensor) -> Any:
        if self.decides and bool(x.isnan().any()):
            raise ValueError("not a number")
        return self.wrap(self.inner(x))


@dataclass
class Holder:
    """A result with a name."""

    value: Tensor


class Around(nn.Module):
    """Calls a `Wrapping` between two layers."""

    def __init__(self, block: nn.Module, take: Any) -> None:
        super().__init__()
        self.first, self.block, self.last, self.take = nn.Linear(8, 8), block, nn.Linear(8, 4), take

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.take(self.block(self.first(x))))
        return y


@pytest.mark.parametrize("cls", [Dense, Standardized])
@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_a_weight_that_a_function_multiplies_by_is_reported_if_it_stays_float(mode: str, cls: type[Dense]) -> None:
    rows = rows_of(mode, nn.Sequential(nn.Linear(8, 8), cls(8, 8), nn.Linear(8, 4)), torch.randn(4, 8))
    is_int8 = mode == "fx" or (mode == "pt2e" and cls is Standardized)
    layers = {name: (row.kind, row.quantized) for name, row in rows.items() if row.what == "layer"}
    assert layers == {
        "0": ("Linear", True),
        "2": ("Linear", True),
        **({} if is_int8 else {"1": (cls.__name__, False)}),
    }
    assert int8_share(rows.values()) == pytest.approx(1.0 if is_int8 else 96 / 160)


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: (x, None), operator.itemgetter(0)),
        (lambda x: {"a": [x]}, lambda found: found["a"][0]),
        (lambda x: Holder(x), lambda found: found.value),
    ],
    ids=["tensor", "tuple", "dictionary", "dataclass"],
)
def test_weights_inside_what_is_called_as_a_whole_are_reported(wrap: Any, take: Any) -> None:
    rows = rows_of("fx", Around(Wrapping(Dense(8, 8), wrap, decides=True), take), torch.randn(4, 8))
    assert not rows["block.inner"].quantized
    assert "'block', which is called as a whole" in rows["block.inner"].reason
    assert (rows["block"].what, rows["block"].quantized, rows["block"].macs) == ("op", False, 64)
    assert int8_share(rows.values()) == pytest.approx(96 / 160)
    as_said = rows_of("eager", Around(Wrapping(nn.Linear(8, 8), wrap, decides=True), take), torch.randn(4, 8))
    assert as_said["block.inner"].quantized


@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_an_excluded_custom_module_has_that_as_its_reason(mode: str) -> None:
    network = nn.Sequential(nn.Linear(8, 8), Dense(8, 8), nn.Linear(8, 4))
    rows = rows_of(mode, network, torch.randn(4, 8), exclude=("1",))
    assert rows["1"].excluded


class WeightRead(nn.Module):
    """Gives the weight of a layer to a function, as the attention of EVA and Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias, self.out = nn.Linear(8, 8, bias=False), nn.Parameter(torch.zeros(4)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.bias, torch.zeros_like(self.bias)))
        y: Tensor = self.out(F.linear(x, weight=self.qkv.weight, bias=bias))
        return y


def test_a_layer_whose_weight_a_function_reads_is_int8_if_the_function_is() -> None:
    rows = rows_of("fx", WeightRead(), torch.randn(4, 8))
    assert rows["qkv"].quantized
    assert "cat" not in rows, "it is computed once, in conversion"
    assert int8_share(rows.values()) == 1
    rows = rows_of("fx", WeightRead(), torch.randn(4, 8), include=("out",))
    assert rows["qkv"].excluded


class OutputUnread(nn.Module):
    """The last residual convolution of WaveNet has an output that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unread, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        _ = x + self.unread(x)
        y: Tensor = self.out(x)
        return y


def test_a_layer_whose_output_nothing_reads_is_reported_before_training() -> None:
    rows = rows_of("fx", OutputUnread(), torch.randn(4, 8))
    assert {name: row.reason for name, row in rows.items() if not row.quantized} == {"unread": "its output is not used"}


class Residual(nn.Module):
    """Every sum doubles the number of paths to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), Dense(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(40):
            x = x + F.gelu(x) / 8
        y: Tensor = self.last(x)
        return y


def test_sums_in_a_row_are_reported_without_following_every_path_through_them() -> None:
    rows = rows_of("fx", Residual(), torch.randn(4, 8))
    assert int8_share(rows.values()) == 1
