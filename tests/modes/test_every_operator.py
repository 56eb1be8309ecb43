"""For every layer with a weight, each mode and kind has an implementation or a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.operators import OPERATORS
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import EXACT

CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Tensor], Any]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 2, 1), lambda layer, x, ids: layer(x.reshape(-1, 2, 4))),
    "conv2d": (lambda: nn.Conv2d(2, 2, 1), lambda layer, x, ids: layer(x.reshape(-1, 2, 2, 2))),
    "conv3d": (lambda: nn.Conv3d(1, 2, 1), lambda layer, x, ids: layer(x.reshape(-1, 1, 2, 2, 2))),
    "linear": (lambda: nn.Linear(8, 4), lambda layer, x, ids: layer(x)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 2, 2), lambda layer, x, ids: layer(x.reshape(-1, 2, 4))),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 2), lambda layer, x, ids: layer(x.reshape(-1, 2, 2, 2))),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), lambda layer, x, ids: layer(x.reshape(-1, 1, 2, 2, 2))),
    "bilinear": (lambda: nn.Bilinear(8, 8, 2), lambda layer, x, ids: layer(x, x)),
    "attention": (
        lambda: nn.MultiheadAttention(2, 1, batch_first=True),
        lambda layer, x, ids: layer(x.reshape(-1, 4, 2), x.reshape(-1, 4, 2), x.reshape(-1, 4, 2))[0],
    ),
    "lstm": (lambda: nn.LSTM(2, 2, batch_first=True), lambda layer, x, ids: layer(x.reshape(-1, 4, 2))[0]),
    "gru": (lambda: nn.GRU(2, 2, batch_first=True), lambda layer, x, ids: layer(x.reshape(-1, 4, 2))[0]),
    "rnn": (lambda: nn.RNN(2, 2, batch_first=True), lambda layer, x, ids: layer(x.reshape(-1, 4, 2))[0]),
    "lstm_cell": (lambda: nn.LSTMCell(8, 2), lambda layer, x, ids: layer(x)[0]),
    "gru_cell": (lambda: nn.GRUCell(8, 2), lambda layer, x, ids: layer(x)),
    "rnn_cell": (lambda: nn.RNNCell(8, 2), lambda layer, x, ids: layer(x)),
    "embedding": (lambda: nn.Embedding(5, 4), lambda layer, x, ids: layer(ids)),
    "embedding_bag": (lambda: nn.EmbeddingBag(5, 4), lambda layer, x, ids: layer(ids)),
}
"""For each weighted row of the table how a layer of it is made, and called."""

INT8 = {
    ("eager", "static"): {"convolution", "linear", "transposed", "table"},
    ("fx", "static"): {"convolution", "linear", "transposed", "table"},
    ("pt2e", "static"): {"linear"},
    ("eager", "dynamic"): {"linear", "attention", "cell"},
    ("fx", "dynamic"): {"linear", "attention", "cell"},
    ("pt2e", "dynamic"): {"linear"},
    ("eager", "weight_only"): {row.family for row in OPERATORS if row.weighted},
    ("fx", "weight_only"): {row.family for row in OPERATORS if row.weighted},
    ("pt2e", "weight_only"): {"convolution", "linear", "transposed"},
}
"""The families of which every row has an implementation; others may."""


class EveryLayer(nn.Module):
    """One layer of each row with a weight."""

    def __init__(self) -> None:
        super().__init__()
        for name, (make, _) in CALLS.items():
            self.add_module(name, make())

    def forward(self, x: Tensor, ids: Tensor) -> list[Any]:
        """Its output."""
        return [call(getattr(self, name), x, ids) for name, (_, call) in CALLS.items()]


def rows_of(mode: str, kind: str) -> list[LayerCoverage]:
    torch.manual_seed(0)
    network = EveryLayer().eval()
    example, recipe = (
        Example((torch.randn(3, 8), torch.randint(5, (3, 4)))),
        Recipe(mode, "x86" if mode == "pt2e" else EXACT, kind=kind),
    )
    if kind != "static":
        return quantize(network, example, recipe).coverage
    prepared = get_mode(mode).prepare(network, example, recipe)
    prepared(*example.args)
    return get_mode(mode).coverage(cpu_copy(prepared), example)


def test_every_weighted_row_is_called() -> None:
    assert set(CALLS) == {row.name for row in OPERATORS if row.weighted}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] == "pt2e" else ()) for one in INT8],
)
def test_every_weighted_row_is_quantized_or_refused_in_words(mode: str, kind: str) -> None:
    found = rows_of(mode, kind)
    for row in OPERATORS:
        if not row.weighted:
            continue
        own = [one for one in found if f"{one.name}.".startswith(f"{row.name}.") and one.what == "layer"]
        assert own, row.name
        assert all(one.quantized or len(one.reason.split()) > 3 for one in own), own
        if row.family in INT8[mode, kind]:
            assert all(one.quantized for one in own), own
