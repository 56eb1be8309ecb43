"""SmoothQuant keeps the outputs of a network, and moves outliers of activations into weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Scheme
from qat_lightning.demos.networks.char_transformer import CharTransformer
from qat_lightning.demos.networks.vision_transformer import SmallViT
from qat_lightning.errors import CombinationError, ConfigurationError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.plain import quantize
from qat_lightning.recipes.smoothquant import smooth
from qat_lightning.settings.recipe import Recipe


def with_outliers(network: nn.Module, size: float = 30.0) -> nn.Module:
    """Make every third channel of the norms large, as in language models, and change all initial parameters."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.data[::3] *= size
    return network.eval()


class Gated(nn.Module):
    """Manual RMSNorm, two query heads per key, a gate, a scale per channel, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.norm, self.norm2 = nn.Parameter(torch.rand(16) + 0.5), nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o, self.scale = nn.Linear(16, 16), nn.Parameter(torch.rand(16))
        self.gate_up, self.down = nn.Linear(16, 48, bias=False), nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        normed = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        q, k, v = (part(normed).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for part in (k, v))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.scale * self.o(mixed.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return F.linear(x + self.down(F.silu(gate) * up), self.table.weight)


def encoder(norm_first: bool, batch_first: bool = True, activation: str = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first, activation=activation)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TOKENS = torch.arange(24).reshape(2, 12) % 20
FEATURES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Any, tuple[Tensor, ...], int, int]] = {
    # network, inputs, how many layers are smoothed, how many cannot be
    "char": (lambda: CharTransformer(20, 12, 16, 2, 2), (TOKENS,), 11, 2),
    "vit": (lambda: SmallViT(2, 1, 8, 4, 16, 2, 2), (torch.randn(2, 1, 8, 8),), 11, 2),
    "gated": (Gated, (TOKENS,), 6, 1),
    "norm_first": (lambda: encoder(True), (FEATURES,), 8, 0),
    "norm_last": (lambda: encoder(False, batch_first=False, activation="gelu"), (FEATURES,), 2, 6),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, norm_first=True, batch_first=True), 1),
        (FEATURES, FEATURES.flip(1)),
        6,
        0,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same_and_its_activations_are_even(name: str) -> None:
    make, args, smoothed, left = NETWORKS[name]
    network = with_outliers(make())
    before = copy.deepcopy(network)
    done = smooth(network, Example(args))
    assert (len(done.smoothed), len(done.left)) == (smoothed, left), done
    assert network.state_dict().keys() == before.state_dict().keys()
    others = tuple(part.flip(0) for part in args)
    with torch.no_grad():
        expected = before(*others)
        near = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(network(*others), expected, rtol=1e-4, atol=near)
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))


def test_factors_are_those_of_the_paper() -> None:
    network = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    norm, linear = network
    x = torch.randn(64, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([50.0, 1, 1, 1, 1, 1, 1, 20]))
        largest, weights = norm(x).abs().amax(0), linear.weight.abs().amax(0)
        gamma, expected = norm.weight.clone(), largest**0.7 / weights**0.3
    smooth(network, Example((x,)), 0.7)
    torch.testing.assert_close(norm.weight, gamma / expected)
    torch.testing.assert_close(linear.weight.abs().amax(0), weights * expected)


def test_channels_that_go_elsewhere_stay() -> None:
    """Half of the channels of one layer are returned, half of another's go to a GELU."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two, self.three = (
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.Linear(8, 4),
                nn.Linear(4, 4),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(x)
            y = self.one(x)
            return self.three(self.two(y)) + F.gelu(y[..., 4:]), x[..., :4]

    network = with_outliers(Halves())
    before = copy.deepcopy(network.state_dict())
    done = smooth(network, Example((torch.randn(6, 8),)))
    assert done.smoothed == {"one": "norm", "two": "one", "three": "two"}
    after = network.state_dict()
    assert torch.equal(after["norm.weight"][:4], before["norm.weight"][:4])
    assert not torch.equal(after["norm.weight"][4:], before["norm.weight"][4:])
    assert torch.equal(after["one.bias"][4:], before["one.bias"][4:])
    assert not torch.equal(after["one.bias"][:4], before["one.bias"][:4])


def test_a_weight_that_is_read_twice_or_computed_is_said() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.shared = nn.LayerNorm(8), nn.Linear(8, 8)
            self.plain, self.computed = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8)
            nn.utils.parametrizations.weight_norm(self.computed)

        def forward(self, x: Tensor) -> Tensor:
            return self.computed(self.norm(self.shared(self.plain(self.shared(x)))))

    network = Twice()
    before = copy.deepcopy(network.state_dict())
    done = smooth(network, Example((torch.randn(6, 8),)))
    assert not done.smoothed
    assert done.left == {"shared": "layer_norm"}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_dynamic_int8_of_outliers_is_nearer_to_float() -> None:
    network = with_outliers(CharTransformer(20, 12, 32, 2, 2), 80.0)
    smoothed = copy.deepcopy(network)
    smooth(smoothed, Example((TOKENS,)))
    recipe = Recipe("eager", "x86", kind="dynamic")
    with torch.no_grad():
        expected = network(TOKENS)
        plain, better = (
            sqnr_db(expected, quantize(n, Example((TOKENS,)), recipe)(TOKENS)) for n in (network, smoothed)
        )
    assert better > plain + 3, (plain, better)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "much"])
def test_what_is_no_strength_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"smoothquant=.* is not valid: give a number from 0"):
        Recipe("fx", "x86", smoothquant=value)


def test_weight_only_has_no_use_for_it() -> None:
    with pytest.raises(CombinationError, match="kind='weight_only' leaves them float: use smoothquant=None"):
        Recipe("fx", "x86", Scheme(), kind="weight_only", smoothquant=0.5)


def test_a_network_that_does_not_run_is_refused() -> None:
    with pytest.raises(NetworkError, match="Sequential"):
        smooth(nn.Sequential(nn.Linear(3, 3)), Example((torch.zeros(2, 4),)))
