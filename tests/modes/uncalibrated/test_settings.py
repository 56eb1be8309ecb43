"""Chosen layers, layers that stay float with the reason, and errors."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Scheme
from qat_lightning.errors import ConfigurationError, ConversionError, NetworkError, VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer.dynamic import DynamicLinear
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.kinds import DIRECT, check_kind
from qat_lightning.settings.recipe import Kind, Recipe
from tests.support.sequence_networks import Perceptron, Recurrent

EXAMPLE = Example((torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0)),))


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_excluded_layers_stay_float(mode: str) -> None:
    recipe = Recipe(mode, "x86", kind="dynamic", exclude=("net.head",))
    rows = {row.name: row for row in quantize(Perceptron(), EXAMPLE, recipe, prefix="net").coverage}
    assert rows["first"].quantized
    assert rows["head"].reason == "excluded"


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_nothing_to_quantize_says_why(mode: str) -> None:
    network = nn.Sequential(nn.Conv1d(7, 3, 1), nn.ReLU())
    with pytest.raises(NetworkError, match=r"Conv1d has no dynamic kernel: kind='static'.*another kind="):
        quantize(network, EXAMPLE, Recipe(mode, "x86", kind="dynamic"))


@pytest.mark.slow
def test_pt2e_says_where_lstm_is_dynamic() -> None:
    recipe = Recipe("pt2e", "x86", kind="dynamic")
    rows = {row.name: row for row in quantize(Recurrent(nn.LSTM), EXAMPLE, recipe).coverage}
    assert "mode='eager' and mode='fx' have" in rows["rnn"].reason


@pytest.mark.parametrize(
    ("scheme", "field"),
    [
        (Scheme(weight_symmetric=False), "weight_symmetric"),
        (Scheme(activation_bits=4), "activation_bits"),
        (Scheme(activation_symmetric=True), "activation_symmetric"),
    ],
)
def test_dynamic_refuses_what_its_kernels_cannot(scheme: Scheme, field: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"scheme\.{field}=.*use scheme\.{field}="):
        quantize(Perceptron(), EXAMPLE, Recipe("eager", "x86", scheme, kind="dynamic"))


@pytest.mark.parametrize(
    ("kind", "scheme", "named"),
    [
        ("dynamic", Scheme(activation_observer="percentile"), "scheme.activation_observer='percentile'"),
        ("weight_only", Scheme(activation_observer="min_max"), "scheme.activation_observer='min_max'"),
        ("weight_only", Scheme(activation_bits=4), "scheme.activation_bits=4"),
        ("weight_only", Scheme(activation_symmetric=True), "scheme.activation_symmetric=True"),
    ],
)
def test_what_has_no_effect_is_named(kind: Kind, scheme: Scheme, named: str) -> None:
    with pytest.warns(UserWarning, match=rf"kind='{kind}' .*does not use {re.escape(named)}\.$"):
        made = quantize(Perceptron(), EXAMPLE, Recipe("eager", "x86", scheme, kind=kind))
    assert any(row.quantized for row in made.coverage)


@pytest.mark.parametrize("kind", DIRECT)
def test_what_has_an_effect_is_not_named(kind: Kind) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_kind(Recipe("eager", "x86", Scheme(weight_bits=4, weight_observer="min_max"), kind=kind))


@pytest.mark.parametrize("kind", ["qat", "static"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="dynamic, weight_only"):
        quantize(Perceptron(), EXAMPLE, Recipe("eager", "x86", kind=kind))


def test_network_that_does_not_run() -> None:
    with pytest.raises(NetworkError, match="does not run on its example"):
        quantize(Perceptron(), Example((torch.randn(2, 7, 3),)), Recipe("eager", "x86", kind="dynamic"))


class LooksAtTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc) is not nn.Linear:
            raise TypeError("no linear layer")
        return self.fc(x)


def test_network_that_does_not_run_with_integers() -> None:
    with pytest.raises(ConversionError, match="no linear layer"):
        quantize(LooksAtTypes(), Example((torch.randn(2, 4),)), Recipe("eager", "x86", kind="dynamic"))


class Tied(nn.Module):
    """A head tied to the embedding, as a parameter or read in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.tokens(indices).mean(1)
        return self.head(hidden) + hidden @ self.tokens.weight.T


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_shared_weights(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    network, indices = Tied().eval(), torch.randint(0, 12, (4, 6))
    converted = quantize(network, Example((indices,)), Recipe(mode, "x86", kind=kind))
    wanted = network(indices)
    assert (converted.network(indices) - wanted).abs().max() < 0.05 * wanted.abs().max()
    for row in converted.coverage:
        assert row.quantized or row.reason


def test_saturating_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturated(self: DynamicLinear, input: Tensor) -> Tensor:
        return self.reference(input).float().clamp(-0.1, 0.1)

    monkeypatch.setattr(DynamicLinear, "forward", saturated)
    with pytest.raises(VerificationError, match=r"'first'.*linear_dynamic.*exclude=\['first'\]"):
        quantize(Perceptron(), EXAMPLE, Recipe("eager", "x86", kind="dynamic"))


def test_layers_of_ones_own_and_parametrized_ones_stay_float() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    network = nn.Sequential(Own(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 2))
    rows = quantize(network, EXAMPLE, Recipe("eager", "x86", kind="dynamic")).coverage
    assert [row.quantized for row in rows] == [False, False, True]


def test_a_layer_by_itself_is_a_network_in_mode_fx() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(3, 16)
    converted = quantize(layer, Example((x,)), Recipe("fx", "x86", kind="dynamic"))
    assert [row.quantized for row in converted.coverage] == [True]
    assert torch.allclose(converted.network(x), layer(x), atol=0.05)


def test_a_layer_by_itself_is_a_network() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(3, 16)
    converted = quantize(layer, Example((x,)), Recipe("eager", "x86", kind="dynamic"))
    assert isinstance(converted.network, DynamicLinear)
    assert torch.allclose(converted.network(x), layer(x), atol=0.05)
