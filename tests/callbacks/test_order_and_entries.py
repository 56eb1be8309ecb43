"""Order and entries of the state equal the float network's, in every mode and with old checkpoints."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import LoadsQuantizedCheckpoints, Scheme, float_state_dict
from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.numerics.state_entries import from_entry, to_tensor
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, loader, qat, state, trainer


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Mixed(nn.Module):
    """Modules not in call order, one called twice, tied weights, and direct parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(8, 1, 1))])
        self.shift = nn.Parameter(torch.zeros(1))
        self.register_buffer("offset", torch.zeros(1))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.stem = nn.Conv2d(1, 8, 3)
        self.stem_norm = nn.BatchNorm2d(8)
        self.again = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x + self.offset)))
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block(x) * scale
        x = x.mean((2, 3)) + self.shift
        x = self.tied(F.relu(self.again(F.relu(self.again(x)))))
        return self.head(x)


class Adam(Lit):
    """Weight decay for matrices only: two groups, each in the order of the parameters."""

    def configure_optimizers(self) -> Any:
        ours = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in ours if p.ndim > 1]}, {"params": [p for p in ours if p.ndim < 2]}]
        return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_order_is_that_of_the_float_network_and_entries_are_tensors(mode: str) -> None:
    plain, module = Lit(Mixed()), Lit(Mixed())
    trainer(qat(mode), max_steps=1).fit(module, loader())
    for wanted, now in (
        ([n for n, _ in plain.named_parameters()], [n for n, _ in module.named_parameters()]),
        ([n for n, _ in plain.named_buffers()], [n for n, _ in module.named_buffers()]),
        (list(plain.state_dict()), list(module.state_dict())),
    ):
        assert [name for name in now if name in set(wanted)] == wanted
    assert not [key for key, value in module.state_dict().items() if not isinstance(value, Tensor)]


@pytest.mark.parametrize("learned", ["none", "lsq"])
@pytest.mark.parametrize("mode", MODES)
def test_tensors_of_the_float_network_come_before_those_that_it_does_not_have(mode: str, learned: Any) -> None:
    """In the network and in a part of it, so that pairs by position are right."""
    plain, module = Mixed(), Lit(Mixed())
    trainer(qat(mode, scheme=Scheme(learned_step=learned)), max_steps=1).fit(module, loader())
    copied = copy.deepcopy(module.net)
    pairs = [(plain, module.net), (plain, copied), (plain.blocks, module.net.blocks), (plain.blocks, copied.blocks)]
    for wanted, network in pairs:
        for names in (lambda n: [k for k, _ in n.named_parameters()], lambda n: [k for k, _ in n.named_buffers()]):
            assert names(network)[: len(names(wanted))] == names(wanted)
    assert list(module.net.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())


class Averages(Lit):
    """Averages a copy of the network that was made before its preparation."""

    def __init__(self, average: Callable[[nn.Module, nn.Module], Any]) -> None:
        super().__init__()
        self.copied = copy.deepcopy(self.net).requires_grad_(False)
        self.average = average
        self.expected = {key: value.clone() for key, value in self.copied.state_dict().items()}

    def on_train_batch_end(self, *args: Any) -> None:
        now = self.net.state_dict()
        for key, value in self.expected.items():
            value.copy_((value * 0.5 + now[key] * 0.5).to(value.dtype))
        self.average(self.copied, self.net)


@torch.no_grad()
def _average_parameters_and_buffers(copied: nn.Module, network: nn.Module) -> None:
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for mean, value in zip(tensors(copied), tensors(network), strict=False):
            mean.copy_((mean * 0.5 + value * 0.5).to(mean.dtype))


@torch.no_grad()
def _average_entries(copied: nn.Module, network: nn.Module) -> None:
    for mean, value in zip(copied.state_dict().values(), network.state_dict().values(), strict=False):
        mean.copy_((mean * 0.5 + value * 0.5).to(mean.dtype))


@pytest.mark.parametrize("average", [_average_parameters_and_buffers, _average_entries])
@pytest.mark.parametrize("learned", ["none", "lsq"])
@pytest.mark.parametrize("mode", MODES)
def test_an_average_by_position_averages_the_same_tensors(mode: str, learned: Any, average: Any) -> None:
    module = Averages(average)
    trainer(qat(mode, module="net", scheme=Scheme(learned_step=learned)), max_steps=3).fit(module, loader())
    assert_same_state(module.copied.state_dict(), module.expected)


@pytest.mark.parametrize("mode", MODES)
def test_adam_of_a_float_run_goes_on(mode: str, tmp_path: Path) -> None:
    """Each parameter keeps its own moments, which are equal in all modes before fake-quantization."""
    plain = Adam(Mixed())
    fitting = trainer(max_steps=2)
    fitting.fit(plain, loader())
    fitting.save_checkpoint(tmp_path / "float.ckpt")
    saved = float_state_dict(plain.state_dict())
    moments = {
        name: fitting.optimizers[0].state[p]["exp_avg"].clone()
        for name, p in plain.named_parameters()
        if p.grad is not None
    }
    module, run = Adam(Mixed()), trainer(qat(mode), max_steps=2)
    with pytest.warns(UserWarning, match="ran no training step"):
        run.fit(module, loader(), ckpt_path=str(tmp_path / "float.ckpt"))
    parameters = dict(module.named_parameters())
    for name, wanted in moments.items():
        assert torch.equal(run.optimizers[0].state[parameters[name]]["exp_avg"], wanted), name
    assert_same_state({key: module.state_dict()[key] for key in saved}, saved)


class OptimizesNetwork(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_of_before_finds_learned_scales_where_they_were(mode: str, tmp_path: Path) -> None:
    """And so do those that follow; in a new run scales come last."""

    def fit(epochs: int, start: str | None, end: str) -> tuple[OptimizesNetwork, dict[str, Tensor]]:
        torch.manual_seed(0)
        module = OptimizesNetwork()
        run = trainer(qat(mode, scheme=Scheme(learned_step="lsq")), max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=start and str(tmp_path / start))
        run.save_checkpoint(tmp_path / end)
        return module, dict(module.net.named_parameters())

    def order(parameters: Mapping[str, Tensor]) -> list[bool]:
        return ["step" in name for name in parameters]

    _, usual = fit(1, None, "first.ckpt")
    assert order(usual) == sorted(order(usual))
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    entry = "net._quantization._extra_state"
    values = from_entry(checkpoint["state_dict"][entry])
    del values["float_first"]
    checkpoint["state_dict"][entry] = to_tensor(values)
    traversed = [name for name, _ in nn.Module.named_parameters(fit(1, None, "same.ckpt")[0].net)]
    optimizer = checkpoint["optimizer_states"][0]
    moments = {name: optimizer["state"][number] for number, name in enumerate(usual)}
    optimizer["state"] = {number: moments[name] for number, name in enumerate(traversed)}
    torch.save(checkpoint, tmp_path / "before.ckpt")
    ended = []
    for starts in (("first.ckpt", "usual"), ("before.ckpt", "second.ckpt"), ("second.ckpt", "third.ckpt")):
        epochs = 3 if starts[0] == "second.ckpt" else 2
        module, parameters = fit(epochs, *starts)
        ended.append(state(module))
        assert list(parameters) == (list(usual) if starts[1] == "usual" else traversed)
    compared = [{key: value for key, value in values.items() if "_extra_state" not in key} for values in ended]
    assert_same_state(compared[0], compared[1])


def as_before(path: Path) -> None:
    """Write a checkpoint like earlier releases of ``fx``: BatchNorm after the rest, the recipe as a dict."""
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["state_dict"]
    behind = [key for key in saved if key.startswith("net.norm.")]
    entry = "net._quantization._extra_state"
    order = [key for key in saved if key not in behind and key != entry] + behind
    values = from_entry(saved[entry])
    del values["own_order"], values["float_first"]
    checkpoint["state_dict"] = OrderedDict({key: saved[key] for key in order} | {entry: values})
    torch.save(checkpoint, path)


@pytest.mark.slow
def test_a_checkpoint_of_before_goes_on_in_its_own_order_and_so_do_those_that_follow(tmp_path: Path) -> None:
    def fit(epochs: int, start: str | None, end: str) -> Adam:
        torch.manual_seed(0)
        module, run = Adam(), trainer(qat("fx"), max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=start and str(tmp_path / start))
        run.save_checkpoint(tmp_path / end)
        return module

    fit(1, None, "first.ckpt")
    first = torch.load(tmp_path / "first.ckpt", weights_only=True)
    as_before(tmp_path / "first.ckpt")
    # The optimizer of that run numbered the parameters as they came there.
    before = torch.load(tmp_path / "first.ckpt", weights_only=True)
    numbers = numbered(first["state_dict"])
    there = numbered(before["state_dict"])
    moments = first["optimizer_states"][0]["state"]
    before["optimizer_states"][0]["state"] = {there[key]: moments[numbers[key]] for key in numbers}
    torch.save(before, tmp_path / "first.ckpt")
    assert numbers != there
    fit(2, "first.ckpt", "second.ckpt")
    resumed = fit(3, "second.ckpt", "third.ckpt")
    assert prepared_state(resumed.net).own_order
    assert [name for name, _ in resumed.named_parameters()][-1] == "net.norm.bias"
    usual = fit(1, None, "usual.ckpt")
    assert not prepared_state(usual.net).own_order
    fit(2, "usual.ckpt", "usual_2.ckpt")
    wanted, now = state(fit(3, "usual_2.ckpt", "usual_3.ckpt")), state(resumed)
    for both in (wanted, now):
        del both["net._quantization._extra_state"]
    assert_same_state(now, wanted)


def numbered(saved: dict[str, Any]) -> dict[str, int]:
    """The index of each parameter in `Adam`: the groups follow each other."""
    parameters = dict(Adam().named_parameters())
    ours = [key for key in saved if key in parameters]
    grouped = [key for key in ours if parameters[key].ndim > 1] + [key for key in ours if parameters[key].ndim < 2]
    return {key: number for number, key in enumerate(grouped)}


def test_a_float_optimizer_begins_anew_where_scales_learn(tmp_path: Path) -> None:
    fitting = trainer(max_steps=1)
    fitting.fit(Adam(), loader())
    fitting.save_checkpoint(tmp_path / "float.ckpt")
    run = trainer(qat("fx", scheme=Scheme(learned_step="lsq")), max_steps=2)
    with pytest.warns(UserWarning, match="the optimizer starts afresh"):
        run.fit(Adam(), loader(), ckpt_path=str(tmp_path / "float.ckpt"))
    assert run.global_step == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_float_class_is_told_in_one_line_how_to_load(mode: str, tmp_path: Path) -> None:
    run = trainer(qat(mode), max_steps=1)
    run.fit(Lit(), loader())
    path = tmp_path / "qat.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(
        CheckpointMismatchError, match=r"class Lit\(LoadsQuantizedCheckpoints, .*float_state_dict"
    ) as said:
        Lit.load_from_checkpoint(path)
    assert "\n" not in str(said.value)
    with pytest.raises(CheckpointMismatchError, match="give the Trainer the callback"):
        trainer(max_steps=2).fit(Lit(), loader(), ckpt_path=str(path))

    class WithMixin(LoadsQuantizedCheckpoints, Lit):
        pass

    wanted = float_state_dict(path)
    assert_same_state(state(WithMixin.load_from_checkpoint(path)), wanted)
    assert_same_state(state(Lit.load_from_checkpoint(path, strict=False)), wanted)
    plain = Lit()
    plain.load_state_dict(wanted)
