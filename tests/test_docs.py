"""The support matrix in the docs matches the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.backends import BACKENDS, MODES, pairs
from qat_lightning.settings.engines import engine_here
from qat_lightning.settings.kinds import supported
from qat_lightning.settings.recipe import Recipe

METHODS = Path(__file__).parents[1] / "docs" / "methods.md"


def table() -> dict[str, list[str]]:
    """The rows of the docs: their subject, and a cell for each mode."""
    section = METHODS.read_text().split("## Support matrix\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", *(f"`{mode}`" for mode in MODES)]
    return {label: cells for label, *cells in rows[2:]}


EXAMPLES = [
    code for code in re.findall(r"```python\n(.*?)```", METHODS.read_text(), re.DOTALL) if "LightningModule" in code
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", EXAMPLES, ids=["a transformer", "adapters"])
def test_whole_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    if "peft" in code:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(METHODS), "exec"), names)
    quantized = names["qat"].quantized  # type: ignore[attr-defined]
    assert all(row.quantized for row in quantized.coverage)


PAIRS = [(mode, backend) for mode, backend in pairs() if not BACKENDS[backend].own_grids]
"""Those of the table; the others, whose quantizers decide, are in docs/targets.md."""


def of_mode(mode: str, kind: str = "static") -> list[str]:
    return [backend for name, backend in supported(kind) if name == mode and (name, backend) in PAIRS]


def backends_in(cell: str, mode: str) -> list[str]:
    """The backends that a cell names; additional text follows a semicolon."""
    named = cell.split(";")[0].strip()
    if named == "–":
        return []
    return [backend for name, backend in PAIRS if name == mode] if named == "all backends" else named.split(", ")


@pytest.mark.parametrize("label", ["`dynamic`: `nn.Linear`", "`weight_only`: every layer with a weight"])
def test_the_docs_have_the_backends_of_each_kind_without_calibration(label: str) -> None:
    kind = label.split("`")[1]
    for mode, cell in zip(MODES, table()[label], strict=True):
        assert sorted(backends_in(cell, mode)) == sorted(of_mode(mode, kind))


class Between(nn.Module):
    """Layers between two linear ones, which every mode and backend supports."""

    def __init__(self, forward: Callable[..., Tensor], width: int, **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(width, 2)
        self.inner = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self, self.first(x)).flatten(1))


class OwnWeight(nn.Module):
    """A function with a weight of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _recurrent(net: nn.Module, x: Tensor) -> Tensor:
    hidden = net.gru(net.lstm(x)[0])[0]
    return net.gru_cell(net.lstm_cell(hidden[:, 0])[0])


def _cells(net: nn.Module, x: Tensor) -> Tensor:
    return net.rnn_cell(_recurrent(net, x))


def _looked_up(net: nn.Module, x: Tensor) -> Tensor:
    indices = x[..., 0].clamp(0, 3).long()
    return net.table(indices).mean(1) + net.bag(indices)


def _conv_pair(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x[:, None]
    return net.left(x), net.right(x)


_ROWS = (4, 3, 8)
_IMAGE = (4, 8, 8)
_RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
    "gru": lambda: nn.GRU(8, 8, batch_first=True),
    "lstm_cell": lambda: nn.LSTMCell(8, 8),
    "gru_cell": lambda: nn.GRUCell(8, 8),
}
_BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "left": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "right": lambda: nn.Conv2d(1, 2, 1),
}


@dataclass(frozen=True)
class Row:
    """The network for a row of the docs.

    Attributes:
        label: The label in the docs.
        forward: The code between the two linear layers.
        width: Number of values per sample after it.
        layers: Created anew for each network.
        names: Modules or ops that are integer where the docs say so.
        shape: Shape of a batch.
    """

    label: str
    forward: Callable[..., Tensor]
    width: int
    layers: dict[str, Callable[[], nn.Module]]
    names: tuple[str, ...]
    shape: tuple[int, ...] = _ROWS

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return Between(self.forward, self.width, **{name: make() for name, make in self.layers.items()})

    def integer(self, rows: list[LayerCoverage]) -> dict[str, bool]:
        """For each name, whether anything in it is integer."""
        return {
            name: any(row.quantized for row in rows if f"{row.name}.".startswith(f"{name}.")) for name in self.names
        }


def _only(layer: Callable[[], nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    return {"layer": layer}


ATTENTION = Row(
    "`nn.MultiheadAttention`",
    lambda net, x: net.layer(x, x, x)[0],
    24,
    _only(lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
    ("layer",),
)

EMBEDDINGS = Row(
    "embeddings",
    _looked_up,
    8,
    {"table": lambda: nn.Embedding(4, 8), "bag": lambda: nn.EmbeddingBag(4, 8)},
    ("table", "bag"),
)

FIXED = [
    Row(
        "`nn.Conv2d`, `nn.Linear`",
        lambda net, x: net.layer(x[:, None]),
        2 * 64,
        _only(lambda: nn.Conv2d(1, 2, 3, padding=1)),
        ("first", "layer", "last"),
        _IMAGE,
    ),
    Row("`nn.Conv1d`", lambda net, x: net.layer(x), 16, _only(lambda: nn.Conv1d(3, 2, 1)), ("layer",)),
    Row(
        "`nn.Conv3d`",
        lambda net, x: net.layer(x[:, None, None]),
        2 * 24,
        _only(lambda: nn.Conv3d(1, 2, 1)),
        ("layer",),
    ),
    Row(
        "transposed convolutions",
        lambda net, x: net.layer(x[:, None]),
        2 * 64,
        _only(lambda: nn.ConvTranspose2d(1, 2, 1)),
        ("layer",),
        _IMAGE,
    ),
    Row("LSTM, GRU, `LSTMCell`, `GRUCell`", _recurrent, 8, _RECURRENT, tuple(_RECURRENT)),
    ATTENTION,
    EMBEDDINGS,
    Row(
        "LayerNorm, softmax",
        lambda net, x: net.layer(x).softmax(-1),
        24,
        _only(lambda: nn.LayerNorm(8)),
        ("layer", "softmax"),
    ),
    Row("residual additions", lambda net, x: torch.add(*_conv_pair(net, x)), 2 * 64, _BRANCHES, ("add",), _IMAGE),
    Row("concatenations", lambda net, x: torch.cat(_conv_pair(net, x), 1), 4 * 64, _BRANCHES, ("cat",), _IMAGE),
]

DYNAMIC = [
    Row(
        "`F.linear` with a weight of the network's own",
        lambda net, x: net.layer(x),
        24,
        _only(OwnWeight),
        ("functional_linear",),
    ),
    Row(
        "LSTM, GRU, `LSTMCell`, `GRUCell`, `RNNCell`",
        _cells,
        8,
        {**_RECURRENT, "rnn_cell": lambda: nn.RNNCell(8, 8)},
        ("lstm", "gru", "lstm_cell", "gru_cell", "rnn_cell"),
    ),
    ATTENTION,
    EMBEDDINGS,
]


def test_every_row_of_the_docs_is_looked_at() -> None:
    labels = {label for label in table() if label.startswith(("`static`", "`dynamic`"))}
    looked_at = {f"`static`, `qat`: {row.label}" for row in FIXED} | {f"`dynamic`: {row.label}" for row in DYNAMIC}
    assert labels == {*looked_at, "`dynamic`: `nn.Linear`"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", FIXED, ids=lambda row: row.label.replace("`", ""))
@pytest.mark.slow
def test_the_docs_have_what_fixed_ranges_reach(row: Row, mode: str) -> None:
    cell = dict(zip(MODES, table()[f"`static`, `qat`: {row.label}"], strict=True))[mode]
    flow, example = get_mode(mode), Example((torch.randn(row.shape),))
    found: dict[str, set[str]] = {name: set() for name in row.names}
    # QNNPACK, which runs instead of oneDNN on CPUs without VNNI, does not have them.
    lacking = {name for name, row_of in BACKENDS.items() if engine_here(row_of.engine) != row_of.engine}
    lacking = lacking if "3d" in row.label.lower() and mode != "pt2e" else set()
    for backend in set(of_mode(mode)) - lacking:
        prepared = flow.prepare(row.network(), example, Recipe(mode, backend, kind="static"))
        calibrate(prepared, [example])
        for name, integer in row.integer(flow.coverage(cpu_copy(prepared), example)).items():
            found[name] |= {backend} if integer else set()
    assert found == {name: set(backends_in(cell, mode)) - lacking for name in row.names}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", DYNAMIC, ids=lambda row: row.label.replace("`", ""))
def test_the_docs_have_what_dynamic_reaches(row: Row, mode: str) -> None:
    cell = dict(zip(MODES, table()[f"`dynamic`: {row.label}"], strict=True))[mode]
    recipe = Recipe(mode, "x86", kind="dynamic")
    rows = quantize(row.network().eval(), Example((torch.randn(row.shape),)), recipe).coverage
    assert row.integer(list(rows)) == dict.fromkeys(row.names, not cell.startswith("–"))
