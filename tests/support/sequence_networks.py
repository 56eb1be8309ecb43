"""Small networks for sequences and tables, for tests of the kinds without calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Recurrent(nn.Module):
    """A bidirectional recurrent layer with two layers, and a head on its last output."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(16, 24, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    """Cells in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(16, 24)
        self.gru = nn.GRUCell(24, 24)
        self.rnn = nn.RNNCell(24, 24, bias=False, nonlinearity="relu")
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, cell = self.lstm(x[:, 0])
        gru = self.gru(hidden)
        for step in range(1, 3):
            hidden, cell = self.lstm(x[:, step], (hidden, cell))
            gru = self.gru(hidden, gru)
        return self.head(self.rnn(gru))


class Transformer(nn.Module):
    """torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, called with weights and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)
        self.head = nn.Linear(16, 5)
        self.register_buffer("mask", torch.ones(7, 7).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mixed, weights = self.attention(x, x, x, attn_mask=self.mask)
        return self.head(mixed.mean(0)) + weights.mean((1, 2))[:, None]


class Tables(nn.Module):
    """An embedding, a bag with padding, and a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 17, padding_idx=0)
        self.bag = nn.EmbeddingBag(50, 17, mode="mean", padding_idx=1)
        self.weight = nn.Parameter(torch.randn(17, 17) / 4)
        self.head = nn.Linear(17, 5)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = F.linear(self.tokens(indices).mean(1) + self.bag(indices), self.weight)
        return self.head(F.relu(hidden))


class Convolutions(nn.Module):
    """Convolutions and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.up = nn.ConvTranspose1d(12, 8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.conv(x.transpose(1, 2)))).mean(-1))


class Perceptron(nn.Module):
    """Linear layers, one of them used twice; with ``branches``, control flow that cannot be captured."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.branches = branches
        self.first = nn.Linear(16, 16)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x.mean(1)))
        if self.branches and float(x.detach().mean()) < -100:
            return self.head(x)
        return self.head(x + self.relu(self.first(x)))


def _rows(count: int) -> Tensor:
    return torch.randn(count, 7, 16)


def _tokens(count: int) -> Tensor:
    return torch.randint(0, 50, (count, 6))


ALL = frozenset({"eager", "fx", "pt2e"})


@dataclass(frozen=True)
class SequenceCase:
    """A network of the table.

    Attributes:
        name: Name for tests.
        network: Creates it.
        dynamic: The layers that become integer with kind="dynamic", by mode.
        weight_only: The same with kind="weight_only".
        batch: Creates inputs.
    """

    name: str
    network: Callable[[], nn.Module]
    dynamic: dict[str, set[str]]
    weight_only: dict[str, set[str]]
    batch: Callable[[int], Tensor] = field(default=_rows)

    def layers(self, kind: str, mode: str) -> set[str]:
        """The layers that become integer; none if the mode cannot capture the network."""
        return getattr(self, kind).get(mode, set())


def _same(*names: str) -> dict[str, set[str]]:
    return {mode: set(names) for mode in ALL}


_RNN = {"eager": {"rnn", "head"}, "fx": {"rnn", "head"}, "pt2e": {"head"}}
_ENCODER = {f"encoder.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "linear1", "linear2")} | {
    "head"
}
_CELLS = {"lstm", "gru", "rnn", "head"}

CASES = (
    SequenceCase("lstm", lambda: Recurrent(nn.LSTM), _RNN, _same("rnn", "head")),
    SequenceCase("gru", lambda: Recurrent(nn.GRU), _RNN, _same("rnn", "head")),
    SequenceCase("cells", Cells, {"eager": _CELLS, "fx": _CELLS, "pt2e": {"head"}}, _same(*_CELLS)),
    SequenceCase("transformer", Transformer, _same(*_ENCODER), _same(*_ENCODER)),
    SequenceCase("attention", Attention, _same("attention", "head"), _same("attention", "head")),
    SequenceCase(
        "tables",
        Tables,
        {
            "eager": {"tokens", "bag", "head"},
            "fx": {"tokens", "bag", "head", "functional_linear"},
            "pt2e": {"head"},
        },
        {mode: {"tokens", "bag", "head"} | ({"functional_linear"} if mode == "fx" else set()) for mode in ALL},
        batch=_tokens,
    ),
    SequenceCase("convolutions", Convolutions, _same("head"), _same("conv", "up", "head")),
    SequenceCase("perceptron", Perceptron, _same("first", "head"), _same("first", "head")),
    SequenceCase("branches", lambda: Perceptron(True), {"eager": {"first", "head"}}, {"eager": {"first", "head"}}),
)
