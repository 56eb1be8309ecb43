"""Random and training-only behavior of networks in mode fx."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import prepare
from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.layers.mode_layers import DropoutLike
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import carried_through, prepared_as_float

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class DropPath(nn.Module):
    """Drops whole samples, as in timm, with a shape that a trace does not know."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(0.7).div_(0.7)


class Mask(nn.Module):
    """Adds random numbers that a trace could turn into constants; uses a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(1, x.shape[1], 1, 1) > self.share) if self.training else x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Halves(nn.Module):
    """Not a dropout: it also acts in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(1) if self.training else x * 0.5


class Leaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rrelu(x, training=self.training)


class Residual(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.again, self.head = inner(), inner(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(x + self.inner(self.b(x)))
        return self.head(self.again(x))


@pytest.mark.parametrize("inner", [DropPath, Mask, Noise, Halves, Leaky])
def test_random_layers_train_as_in_float_and_evaluate(inner: Any) -> None:
    torch.manual_seed(0)
    assert all(row.quantized for row in carried_through(Residual(inner), IMAGES).coverage)


def test_what_drops_out_costs_the_int8_network_nothing_and_keeps_its_attributes() -> None:
    network = Residual(DropPath)
    network.inner.probability = 0.3
    prepared = prepared_as_float(network, IMAGES)
    assert isinstance(prepared.inner, DropoutLike)
    assert prepared.inner.probability == 0.3
    assert any(isinstance(module, DropPath) for module in prepared.modules())
    converted = carried_through(Residual(DropPath), IMAGES)
    assert all(row.quantized for row in converted.operations)
    assert not any(isinstance(module, DropoutLike) for module in converted.network.modules())


class Limited(nn.Module):
    """Does not change small inputs like the example."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-90, 90)


class Decides(nn.Module):
    """The same, decided by inspecting the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-90, 90) if float(x.abs().max()) > 90 else x


@pytest.mark.parametrize("inner", [Limited, Decides])
def test_what_changes_nothing_of_the_example_is_run_for_other_inputs(inner: Any) -> None:
    torch.manual_seed(0)
    network, large = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), inner()), 200 * IMAGES
    with torch.no_grad():
        wanted = network(large)
    assert wanted.abs().max() == 90
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86", exclude=("2",)))
    prepared.train()(large)
    prepared.eval()
    int8 = get_mode("fx").convert(prepared, Example((IMAGES,))).network
    with torch.no_grad():
        assert sqnr_db(wanted, prepared(large)) > 25
        assert sqnr_db(wanted, int8(large)) > 25


class Remembers(DropPath):
    """Stores its last input."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


def test_a_module_that_keeps_what_it_is_given_keeps_real_tensors() -> None:
    network = Residual(Remembers)
    prepared_as_float(network, IMAGES)
    assert type(network.inner.last) is Tensor


class Crops(nn.Module):
    """Does not change inputs as small as the example."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :8, :8] if x.shape[-1] > 8 else x


def test_a_module_that_decides_by_sizes_is_run_for_others() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), Crops())
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86", exclude=("2",)))
    prepared.train()(IMAGES)
    int8 = get_mode("fx").convert(prepared.eval(), Example((IMAGES,))).network
    assert int8(torch.randn(2, 3, 12, 12)).shape == (2, 4, 8, 8)


class Attention(nn.Module):
    """An argument that differs in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        share = 0.3 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(query, key, value, dropout_p=share))


def test_a_function_whose_argument_depends_on_the_mode() -> None:
    torch.manual_seed(0)
    carried_through(Attention(), torch.randn(2, 5, 8))


class NormWithDropout(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class NormWithFlag(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.add(y, y, alpha=0.5 if self.training else 1.0)


class CheckingNorm(nn.BatchNorm2d):
    """As in timm, the message of an assertion may differ between the traces: there it names a value."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"4D input expected ({self.training=})")
        return super().forward(x)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize("norm", [NormWithDropout, NormWithFlag, CheckingNorm])
def test_a_batchnorm_that_calls_functions_with_a_flag_or_checks_its_input(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    carried_through(Normed(norm(8)), IMAGES)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class PartlyFrozen(nn.Module):
    """Attention with dropout, and a head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


class Freezes(PartlyFrozen):
    """Keeps the encoder in evaluation by itself."""

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self.encoder.eval()
        return self


TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", ["before", "after", "override"])
@pytest.mark.parametrize(
    "encoder", [Attention, MultiHead, lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)]
)
def test_attention_in_a_frozen_part_drops_nothing_while_the_network_trains(encoder: Any, way: str) -> None:
    torch.manual_seed(0)
    network = (Freezes if way == "override" else PartlyFrozen)(encoder()).train()
    if way == "before":
        network.encoder.eval()
    prepared: Any = prepare(network, Example((TOKENS,)), Recipe("fx", "x86"))
    set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
    with torch.no_grad():
        if way != "before":
            prepared.train()
        if way == "after":
            assert not torch.equal(prepared(TOKENS), prepared(TOKENS))
            prepared.encoder.eval()
        assert prepared.training
        assert torch.equal(prepared(TOKENS), prepared(TOKENS))
        if way != "override":
            prepared.encoder.train()
            assert not torch.equal(prepared(TOKENS), prepared(TOKENS))


class ByChance(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        if self.training and random.random() < 2:
            x = F.relu(x + self.b(x))
        return self.head(x)


def test_a_way_that_is_chosen_by_chance_is_refused() -> None:
    state = random.getstate()
    with pytest.raises(TraceError, match="draws random numbers outside of the graph"):
        get_mode("fx").prepare(ByChance(DropPath), Example((IMAGES,)), Recipe("fx", "x86"))
    assert random.getstate() == state


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ByChance(DropPath)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_part_that_decides_by_chance_is_named() -> None:
    with pytest.raises(TraceError, match="'inner' draws random numbers"):
        get_mode("fx").prepare(Sampled(), Example((IMAGES,)), Recipe("fx", "x86"))
