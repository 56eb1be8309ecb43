"""Gradients that a forward decides itself: a prepared network has them too, or an error says that it would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining
from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2

pytestmark = pytest.mark.usefixtures("without_compiler")


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -ctx.factor * grads[0], None


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


reverse = Reversal.apply  # a name from before anything is watched


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Adversary(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(reverse(self.features(x), 2.0))


class Reverses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return reverse(x, 2.0)


class Spikes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return Spike.apply(x - self.threshold)


class WithModule(Network):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.features(x)))


class Hooked(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.requires_grad:
            y.register_hook(lambda grad: -grad)
        return self.head(y)


class Learner(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _prepared(network: nn.Module, mode: str, kind: Any = "qat") -> nn.Module:
    return get_mode(mode).prepare(network, Example((IMAGES,)), Recipe(mode, "x86", kind=kind))


def _gradients(network: nn.Module) -> dict[str, Tensor | None]:
    set_phase(network, fake_quant=False, observers=True, batchnorm_frozen=False)
    F.cross_entropy(network.train()(IMAGES), LABELS).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def _fit(network: nn.Module, mode: str) -> tuple[Learner, QuantizationAwareTraining]:
    module, qat = Learner(network), QuantizationAwareTraining(mode=mode)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[qat]
    )
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4))
    return module, qat


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_function_with_its_own_backward_is_refused_where_the_graph_would_lose_it(mode: str) -> None:
    with pytest.raises(TraceError, match=r"Reversal\.apply at .*test_own_gradients.*mode='eager'"):
        _prepared(Adversary(), mode)


def test_a_hook_on_a_tensor_is_refused_where_the_graph_would_lose_it() -> None:
    with pytest.raises(TraceError, match=r"register_hook at .*test_own_gradients"):
        _prepared(Hooked(), "pt2e")


def test_auto_takes_a_mode_that_keeps_the_backward() -> None:
    before = Adversary().body.weight
    plain = Learner(Adversary())
    F.cross_entropy(plain.net(IMAGES), LABELS).backward()
    module, qat = _fit(Adversary(), "auto")
    moved = dict(module.named_parameters())["net.body.weight"] - before
    assert (moved * plain.net.body.weight.grad).sum() < 0  # against the gradient that the network has
    assert qat.quantized is not None


@pytest.mark.parametrize("part", [Reverses, Spikes])
def test_a_module_without_layers_keeps_its_backward_in_fx(part: type[nn.Module], tmp_path: Path) -> None:
    wanted = WithModule(part())
    F.cross_entropy(wanted(IMAGES), LABELS).backward()
    prepared = _prepared(WithModule(part()), "fx")
    got = _gradients(prepared)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared(IMAGES)
    converted = get_mode("fx").convert(cpu_copy(prepared), Example((IMAGES,)))
    saved = QuantizedNetwork(converted, Recipe("fx", "x86"), Example((IMAGES,)))
    saved.save(tmp_path / "model.int8")
    again = load_quantized(tmp_path / "model.int8", network=WithModule(part()))
    assert torch.equal(again(IMAGES), saved(IMAGES))


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_calibration_needs_no_backward(mode: str) -> None:
    prepared = _prepared(Adversary(), mode, "static")
    calibrate(prepared, [IMAGES])
    assert get_mode(mode).convert(cpu_copy(prepared), Example((IMAGES,))).network is not None


class Frozen(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.features(x)
        return self.head(y)


class Decorated(Network):
    features = torch.no_grad()(Network.features)  # type: ignore[assignment]


class InTraining(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            y = self.features(x)
        return self.head(y)


class InContainer(Network):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y, (state, _) = self.rnn(self.body(x).flatten(2).transpose(1, 2))
        return self.head(y[:, -1] + state[0])


class Target(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(x).mean(0, keepdim=True)
        return self.head(self.features(x) - target)


class Unchanged(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        with torch.no_grad():
            y = y.contiguous()
        return self.head(y)


class Averages(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return self.head(y - self.mean)


NO_GRAD = [Frozen, Decorated, InTraining, InContainer, Target, Unchanged, Averages]


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("network", NO_GRAD)
def test_no_gradient_flows_where_the_network_has_none(network: Any, mode: str) -> None:
    wanted = network()
    F.cross_entropy(wanted(IMAGES), LABELS).backward()
    prepared = _prepared(network(), mode)
    got = _gradients(prepared)
    for name, parameter in wanted.named_parameters():
        assert (got[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, msg=name)
    F.cross_entropy(prepared(IMAGES), LABELS).backward()  # a buffer holds no part of the last step
    converted = get_mode(mode).convert(cpu_copy(prepared), Example((IMAGES,)))
    assert converted.checks


def test_what_no_grad_freezes_does_not_move_in_a_fit_and_the_rest_is_int8(tmp_path: Path) -> None:
    module, qat = _fit(Frozen(), "fx")
    after = dict(module.named_parameters())
    assert torch.equal(after["net.body.weight"], Frozen().body.weight)
    assert not torch.equal(after["net.head.weight"], Frozen().head.weight)
    assert all(row.quantized for row in qat.quantized.coverage)
    qat.save(tmp_path / "model.int8")
    assert torch.equal(load_quantized(tmp_path / "model.int8")(IMAGES), qat.quantized(IMAGES))


def test_a_write_that_no_grad_hides_from_the_gradient_is_refused() -> None:
    class Clamped(Network):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.head.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    with pytest.raises(TraceError, match=r"in place within torch.no_grad\(\) \('clamp_'\)"):
        _prepared(Clamped(), "fx")
    assert _prepared(Clamped(), "eager") is not None


def test_parameters_that_a_trace_does_not_see_are_refused() -> None:
    class Normalized(Network):
        def forward(self, x: Tensor) -> Tensor:
            scale = dict(self.named_parameters())["head.bias"].square().sum()
            return super().forward(x) / (1 + scale)

    with pytest.raises(TraceError, match="computed from parameters that are not read as attributes at "):
        _prepared(Normalized(), "fx")
