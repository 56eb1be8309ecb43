"""Modules that act as a BatchNorm are frozen and folded in mode fx like BatchNorm itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import calibrate
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.layers.qat_modules import ConvBn2d, FunctionalBatchNorm
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.batchnorm import reestimate_batchnorm
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import carried_through, prepared_as_float

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class NormAct(nn.BatchNorm2d):
    """With an activation, and its own counter."""

    def __init__(self, channels: int, act: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        average = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if average is None:
                average = 1.0 / float(self.num_batches_tracked)
        batch = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, batch, average or 0.0, self.eps
        )
        return self.act(x)


class Derived(nn.BatchNorm2d):
    """With an activation after torch's own forward."""

    def __init__(self, channels: int, act: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.act = nn.Hardswish() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Alike(nn.Module):
    """Not a class of torch: with or without a counter, and a factor after it."""

    def __init__(self, channels: int, counts: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.factor = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        if counts:
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.counts:
            self.num_batches_tracked += 1
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.2, 1e-3) * self.factor


class OtherNames(nn.Module):
    """With other names for its tensors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return F.batch_norm(x, self.mean, self.variance, self.gamma, self.beta, self.training)


class Frozen(nn.Module):
    """Like torchvision's FrozenBatchNorm2d: four buffers and arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def between(norm: nn.Module, *behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, *behind, nn.Conv2d(8, 4, 1))


FOLDED = {
    "subclass": lambda: NormAct(8),
    "parameters in its activation": lambda: NormAct(8, nn.PReLU(8)),
    "subclass without parameters": lambda: NormAct(8, affine=False),
    "subclass with a cumulative average": lambda: NormAct(8, momentum=None),
    "derived": lambda: Derived(8),
    "derived with a cumulative average": lambda: Derived(8, momentum=None),
    "no class of torch's": lambda: Alike(8),
    "no counter": lambda: Alike(8, counts=False),
    "frozen": lambda: Frozen(8),
    "without parameters": lambda: nn.BatchNorm2d(8, affine=False),
}


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_folds_into_the_convolution_before_it(make: Any) -> None:
    torch.manual_seed(0)
    assert all(row.quantized for row in carried_through(between(make()), IMAGES).coverage)
    prepared = get_mode("fx").prepare(between(make()), Example((IMAGES,)), Recipe("fx", "x86"))
    assert any(isinstance(module, ConvBn2d) for module in prepared.modules())


UNFOLDED = {
    "subclass without statistics": lambda: NormAct(8, track_running_stats=False),
    "other names": lambda: OtherNames(8),
    "without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "with nothing": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("make", UNFOLDED.values(), ids=UNFOLDED)
def test_runs_where_it_cannot_be_folded(make: Any) -> None:
    torch.manual_seed(0)
    assert all(row.quantized for row in carried_through(between(make(), nn.ReLU()), IMAGES).coverage)


@pytest.mark.parametrize("make", [lambda: Frozen(3), lambda: nn.BatchNorm2d(3, affine=False), lambda: NormAct(3)])
@pytest.mark.parametrize("exclude", [(), ("0",)])
def test_runs_behind_no_layer_and_behind_one_that_stays_float(make: Any, exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    carried_through(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), make(), nn.Conv2d(3, 4, 1)), IMAGES, exclude=exclude)
    carried_through(nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.Conv2d(3, 4, 1)), IMAGES, exclude=exclude)
    carried_through(nn.Sequential(make(), nn.Conv2d(3, 4, 1)), IMAGES, exclude=exclude)


class Gate(nn.Module):
    """Squeeze-and-excitation as in MobileNetV3: an activation with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), NormAct(8, nn.Hardswish())
        self.squeeze, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.head(x * F.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))


def test_an_activation_inside_of_it_is_int8() -> None:
    torch.manual_seed(0)
    converted = carried_through(Gate(), IMAGES)
    assert {row.name: row.quantized for row in converted.operations}["norm.act"]


def test_a_gamma_of_zero_trains() -> None:
    norm = NormAct(8)
    nn.init.zeros_(norm.weight)
    prepared = prepared_as_float(between(norm), IMAGES)
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters())


def test_what_is_frozen_stays_so_when_statistics_are_estimated_anew() -> None:
    prepared = prepared_as_float(nn.Sequential(between(Frozen(8)), nn.BatchNorm2d(4)), IMAGES)
    before = prepared.state_dict()["0.1.running_mean"].clone()
    moved = prepared.state_dict()["1.running_mean"].clone()
    reestimate_batchnorm(prepared, [IMAGES])
    assert torch.equal(prepared.state_dict()["0.1.running_mean"], before)
    assert not torch.equal(prepared.state_dict()["1.running_mean"], moved)


def test_tracing_counts_no_batch() -> None:
    network = between(NormAct(8))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86"))
    assert all(torch.equal(value, prepared.state_dict()[key]) for key, value in before.items())
    assert not any(isinstance(module, FunctionalBatchNorm) for module in prepared.modules())


class HoldsTheTensors(nn.Module):
    """The network itself has the tensors of its ``F.batch_norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        return self.last(F.batch_norm(self.first(x), *tensors, self.training, 0.1, 1e-5))


def test_the_network_itself_may_hold_the_tensors_of_its_batchnorm() -> None:
    network = HoldsTheTensors()
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86")).train()
    for _ in range(2):
        prepared(IMAGES)
    assert int(prepared.state_dict()["num_batches_tracked"]) == 2
    assert prepared.state_dict()["running_mean"].abs().sum() > 0
    assert set(network.state_dict()) <= set(prepared.state_dict())


def test_a_network_that_is_a_batchnorm_has_nothing_to_quantize() -> None:
    with pytest.raises(NetworkError, match="nothing to quantize in BatchNorm1d"):
        get_mode("fx").prepare(nn.BatchNorm1d(8), Example((torch.randn(4, 8),)), Recipe("fx", "x86"))


class OverTokens(nn.Module):
    """A BatchNorm whose dimension 1 is that of the tokens, behind a layer whose channels are the last dimension."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(tokens), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(x)).relu())
        return y


@pytest.mark.parametrize("exclude", [(), ("layer",), ("norm",)])
@pytest.mark.parametrize("tokens", [6, 8])
def test_is_not_folded_where_it_normalizes_no_channels(tokens: int, exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network, example = OverTokens(tokens), Example((torch.randn(4, tokens, 8),))
    for _ in range(20):
        network(3 * torch.randn(4, tokens, 8) + 1)
    expected = network.eval()(*example.args)
    prepared = get_mode("fx").prepare(network, example, Recipe("fx", "x86", kind="static", exclude=exclude))
    prepared.eval()
    calibrate(prepared, [example])
    converted = get_mode("fx").convert(prepared, example)
    assert {row.name for row in converted.coverage if row.quantized} == {"layer", "head"} - set(exclude)
    torch.testing.assert_close(converted.network(*example.args), expected, atol=0.05, rtol=0)
    trained = get_mode("fx").prepare(OverTokens(tokens), example, Recipe("fx", "x86", exclude=exclude))
    trained(*example.args).sum().backward()
    assert get_mode("fx").convert(trained.eval(), example).coverage
