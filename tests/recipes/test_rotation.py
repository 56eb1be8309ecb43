"""Rotation keeps the outputs of a network, and spreads outliers over all channels."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Scheme
from qat_lightning.demos.networks.char_transformer import CharTransformer
from qat_lightning.demos.networks.vision_transformer import SmallViT
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.plain import convert, prepare, quantize
from qat_lightning.recipes.rotation import Rotated, rotate
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from tests.recipes.test_smoothquant import FEATURES, TOKENS, Gated, encoder


def trained(network: nn.Module) -> nn.Module:
    """Move every parameter away from its initial value."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval()


class Llama(nn.Module):
    """Manual RMSNorm, two query heads per key, a packed gate, a separate head; 24 channels, heads of 6."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.norm, self.norm2 = nn.Parameter(torch.rand(24) + 0.5), nn.RMSNorm(24)
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
        self.o, self.gate_up, self.down = nn.Linear(24, 24), nn.Linear(24, 48, bias=False), nn.Linear(24, 24)
        self.last, self.head = nn.RMSNorm(24), nn.Linear(24, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * 24**0.5
        normed = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        q, k, v = (part(normed).unflatten(-1, (-1, 6)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for part in (k, v))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        x += self.down(F.silu(gate) * up)
        return self.head(self.last(x))


class ClassToken(nn.Module):
    """Image patches, a class token before them, positions, torch's own encoder, a head without a bias."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(5, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Any, tuple[Tensor, ...], dict[int, int], int]] = {
    # network, inputs, how many layers read how many channels that are rotated together, how many cannot be
    "char": (lambda: CharTransformer(20, 12, 16, 2, 2), (TOKENS,), {16: 9, 8: 2}, 2),
    "vit": (lambda: SmallViT(2, 1, 8, 4, 16, 2, 2), (IMAGES,), {16: 9, 8: 2}, 2),
    "class token": (ClassToken, (IMAGES,), {16: 5, 8: 2}, 2),
    "llama": (Llama, (TOKENS,), {24: 5, 6: 1}, 1),
    "llama, tied": (lambda: Llama(tied=True), (TOKENS,), {6: 1}, 6),
    "gated": (Gated, (TOKENS,), {4: 1}, 6),
    "norm last": (lambda: encoder(False, batch_first=False, activation="gelu"), (FEATURES,), {8: 2}, 6),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, norm_first=True, batch_first=True), 1),
        (FEATURES, FEATURES.flip(1)),
        {8: 2},
        4,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same(name: str) -> None:
    make, args, sizes, left = NETWORKS[name]
    network = trained(make())
    before = copy.deepcopy(network)
    done = rotate(network, Example(args))
    assert (Counter(done.rotated.values()), len(done.left)) == (sizes, left), done
    assert network.state_dict().keys() == before.state_dict().keys()
    others = tuple(part.flip(0) for part in args)
    with torch.no_grad():
        expected = before(*others)
        torch.testing.assert_close(network(*others), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    weights = dict(before.named_parameters())
    for layer in done.rotated:
        weight = layer if layer in weights else f"{layer}.weight"
        assert not torch.equal(network.get_parameter(weight), weights[weight])


def test_scales_and_shifts_of_norms_go_into_what_reads_them() -> None:
    """The shift of a norm stays if a layer after it has no bias."""
    network = trained(ClassToken())
    rotate(network, Example((IMAGES,)))
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert all(torch.equal(norm.weight, torch.ones(16)) for norm in norms)
    assert [bool(norm.bias.any()) for norm in norms] == [False] * 4 + [True]


@pytest.mark.parametrize("width", [6, 7, 12, 14, 40])
def test_every_width_can_be_rotated(width: int) -> None:
    network = trained(nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 5)))
    before = copy.deepcopy(network)
    assert rotate(network, Example((torch.randn(4, 3),))).rotated == {"2": width}
    x = torch.randn(9, 3)
    torch.testing.assert_close(network(x), before(x), rtol=1e-4, atol=1e-5)


def test_a_tied_head_behind_a_norm_that_scales_is_said() -> None:
    done = rotate(trained(Llama(tied=True)), Example((TOKENS,)))
    assert done.left["head" if "head" in done.left else "table"] == (
        "table.weight is read in several places, and last.weight scales in one"
    )


def test_a_tied_head_is_rotated_with_its_table_where_nothing_scales() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 16), nn.RMSNorm(16, elementwise_affine=False)
            self.linear = nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return F.linear(self.norm(x + self.linear(self.norm(x))), self.table.weight)

    network = trained(Tied())
    before = copy.deepcopy(network)
    assert rotate(network, Example((TOKENS,))).rotated == {"linear": 16, "table": 16}
    torch.testing.assert_close(network(TOKENS), before(TOKENS), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Two linear layers with a norm between them, and another reader of the same channels or weights."""

    def __init__(self, otherwise: Any) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.packed, self.otherwise = nn.Parameter(torch.randn(16, 8)), otherwise

    def forward(self, x: Tensor) -> Any:
        return self.otherwise(self, x)


@pytest.mark.parametrize(
    ("otherwise", "left"),
    [
        (lambda net, x: (net.two(net.norm(net.one(x))), net.one(x)), "the network's result"),
        (lambda net, x: net.two(net.norm(net.one(x)).relu()), "relu"),
        (lambda net, x: net.two(net.norm(net.one(x)) * net.one(x)), "mul"),
        (lambda net, x: net.two(net.norm(net.one(x)) + net.one(x)), "a residual addition reads what norm.weight"),
        (lambda net, x: net.two(net.norm(net.one(x)) + 1), "add"),
        (lambda net, x: net.two(net.norm(net.one(x)).flip(-1) + net.norm(net.one(x))), "a residual addition reads"),
        (lambda net, x: net.two(net.norm(net.one(x)).pow(2)), "pow"),
        (lambda net, x: net.two(net.one(x) * net.one(x).pow(2).mean(0, keepdim=True)), "mul"),
        (lambda net, x: net.two(net.norm(net.one(x)) + net.two.bias.exp()), "add"),
        (lambda net, x: F.linear(F.linear(x, net.packed), net.packed.t()), "an input of the network"),
        (
            lambda net, x: F.linear(net.one(x), net.packed)[..., :8] + F.linear(net.one(x), net.packed[:8]),
            "a weight that is read as a whole and in parts",
        ),
    ],
)  # fmt: skip
def test_channels_that_something_else_reads_stay(otherwise: Any, left: str) -> None:
    network = trained(Odd(otherwise))
    before = copy.deepcopy(network.state_dict())
    done = rotate(network, Example((torch.randn(4, 8),)))
    assert not done.rotated
    assert any(why.startswith(left) for why in done.left.values()), done
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_channels_that_are_in_another_order_are_rotated_alike() -> None:
    network = trained(Odd(lambda net, x: net.two(net.one(x).flip(-1) + net.one(x))))
    before = copy.deepcopy(network)
    done = rotate(network, Example((torch.randn(4, 8),)))
    x = torch.randn(5, 8)
    torch.testing.assert_close(network(x), before(x), rtol=1e-4, atol=1e-5)
    assert "two" in done.rotated or "two" in done.left


def test_what_was_done_is_one_sentence() -> None:
    done = Rotated({"a": 64, "b": 64, "c": 16}, {"d": "gelu"})
    assert str(done) == (
        "the inputs of 3 linear layers were rotated (2 of 64 channels each, 1 of 16 channels each); 1 cannot be: "
        "d (gelu)."
    )


def with_outliers(where: str) -> nn.Module:
    """Normal weights, like trained ones; two channels of the residual stream or of each weight are large."""
    network = trained(CharTransformer(20, 12, 64, 2, 4))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 2 and "tokens" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
                if where == "weights" and "mlp.2" not in name:
                    parameter[:, torch.randint(0, parameter.shape[1], (2,))] *= 8
        if where == "stream":
            network.get_parameter("tokens.weight")[:, [3, 40]] *= 60
    return network


def integer(network: nn.Module, recipe: Recipe) -> nn.Module:
    example = Example((TOKENS,))
    if recipe.kind != "static":
        return quantize(network, example, recipe)
    prepared = prepare(copy.deepcopy(network), example, recipe)
    calibrate(prepared, [(TOKENS,)])
    return convert(prepared, example)


@pytest.mark.parametrize(
    ("where", "kind", "scheme", "factor"),
    [
        ("stream", "dynamic", Scheme(), 2.0),
        pytest.param("stream", "static", Scheme(), 2.5, marks=pytest.mark.slow),
        ("stream", "weight_only", Scheme(weight_bits=4), 1.3),
        ("weights", "weight_only", Scheme(weight_bits=4), 1.8),
        pytest.param(
            "weights",
            "dynamic",
            Scheme(weight_bits=4, activation_granularity="per_token"),
            1.8,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_error_of_int8_falls_where_channels_are_outliers(
    where: str, kind: Any, scheme: Scheme, factor: float
) -> None:
    network = with_outliers(where)
    rotated = copy.deepcopy(network)
    rotate(rotated, Example((TOKENS,)))
    recipe = Recipe("fx" if kind == "static" else "eager", "x86", scheme, kind=kind)
    with torch.no_grad():
        expected = network(TOKENS)
        plain, better = (float((integer(n, recipe)(TOKENS) - expected).norm()) for n in (network, rotated))
    assert better * factor < plain, (plain, better)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_what_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"rotation=.* is not valid: use True or False"):
        Recipe("fx", "x86", rotation=value)


def test_a_network_that_does_not_run_is_refused() -> None:
    with pytest.raises(NetworkError, match="Sequential"):
        rotate(nn.Sequential(nn.Linear(3, 3)), Example((torch.zeros(2, 4),)))
