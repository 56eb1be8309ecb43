"""Finding networks in LightningModules, and their slots."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import OWN_FORWARD, OwnForward, Slot
from qat_lightning.errors import ConfigurationError, NetworkError


class Base(LightningModule):
    """Layers as attributes, and modules that are not part of the network."""

    scale = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 4})
        self.fc = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.metrics = MetricCollection({"acc": MulticlassAccuracy(4)})
        self.loss = nn.CrossEntropyLoss()

    def helper(self, x: Tensor) -> Tensor:
        return x * self.scale + self.hparams["width"]

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.fc(x)) + self.shift


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Holder(LightningModule):
    """A LightningModule with given children and no ``forward``."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class HolderWithForward(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return x


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Holder(net=perceptron()), ["net"]),
        (Holder(net=perceptron(), loss=nn.CrossEntropyLoss(), acc=MulticlassAccuracy(3)), ["net"]),
        (Holder(net=perceptron(), augment=nn.Sequential(nn.Flatten())), ["net"]),
        (HolderWithForward(net=perceptron()), ["net"]),
        (HolderWithForward(stem=nn.Linear(2, 2), body=perceptron()), [OWN_FORWARD]),
        (Holder(net=nn.Linear(2, 2)), ["net"]),
        (Base(), [OWN_FORWARD]),
        # Lists and dicts of modules are called by nobody.
        (Holder(nets=nn.ModuleDict({"one": perceptron()})), ["nets.one"]),
        (Holder(nets=nn.ModuleList([nn.ModuleList([perceptron()]), nn.ReLU()])), ["nets.0.0"]),
        (HolderWithForward(layers=nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)])), [OWN_FORWARD]),
        (HolderWithForward(blocks=nn.ModuleList([perceptron(), perceptron()])), [OWN_FORWARD]),
    ],
)
def test_found(module: LightningModule, names: list[str]) -> None:
    assert find_networks(module, None) == names


@pytest.mark.parametrize("kind", [Holder, HolderWithForward])
def test_unclear(kind: type[Holder]) -> None:
    with pytest.raises(NetworkError) as caught:
        find_networks(kind(student=perceptron(), teacher=perceptron()), None)
    assert "'student' (Sequential), 'teacher' (Sequential)" in str(caught.value)
    assert ("own forward" in str(caught.value)) == (kind is HolderWithForward)


def test_a_network_that_trains_is_suggested_before_a_frozen_one() -> None:
    module = Holder(teacher=perceptron().requires_grad_(False), student=perceptron())
    with pytest.raises(NetworkError, match=r"'student' \(Sequential\), 'teacher'.* module='student', a list"):
        find_networks(module, None)


def test_parts_of_a_list_are_named_where_it_is_not_clear() -> None:
    module = Holder(layers=nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), perceptron()]))
    with pytest.raises(NetworkError, match=r"'layers.0' \(Linear\), 'layers.2' \(Sequential\)"):
        find_networks(module, None)
    with pytest.raises(ConfigurationError, match=r"is a ModuleList, .* module=\['layers.0', 'layers.2'\]"):
        find_networks(module, "layers")
    with pytest.raises(NetworkError, match=r"'nets.one' \(Sequential\), 'nets.other' \(Sequential\)"):
        find_networks(HolderWithForward(nets=nn.ModuleDict({"one": perceptron(), "other": perceptron()})), None)


def test_named() -> None:
    module = Holder(net=nn.Sequential(perceptron(), perceptron()))
    assert find_networks(module, "net.1") == ["net.1"]
    assert find_networks(module, ["net.0", "net.1"]) == ["net.0", "net.1"]
    with pytest.raises(ConfigurationError, match=r"module='nat' does not exist in Holder.*: net"):
        find_networks(module, ["net.0", "nat"])


@pytest.mark.parametrize("names", [["net.0", "net"], ["net", "net"], [".", "net"], []])
def test_networks_that_overlap(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="module="):
        find_networks(Holder(net=nn.Sequential(perceptron())), names)


X = torch.arange(8.0).reshape(2, 4)


@pytest.mark.parametrize("make", [Base, Derived])
def test_the_own_forward_computes_what_the_lightning_module_does(make: type[Base]) -> None:
    module = make()
    own = OwnForward(module)
    assert torch.equal(own(X), module(X))
    assert {name for name, _ in own.named_children()} == {"fc"}
    assert set(own.state_dict()) == {"fc.weight", "fc.bias", "shift"}
    assert type(own).__name__ == make.__name__
    assert own.hparams["width"] == 4
    assert own.fc is module.fc


def test_a_copy_of_the_own_forward_has_layers_of_its_own_and_no_second_lightning_module() -> None:
    module = Derived()
    module.dataset = object()  # something large
    own = OwnForward(module)
    copied = copy.deepcopy(own)
    assert torch.equal(copied(X), own(X))
    assert copied.dataset is module.dataset
    with torch.no_grad():
        copied.fc.weight.zero_()
    assert not torch.equal(copied(X), own(X))


def test_a_copy_of_the_lightning_module_takes_its_own_forward_along() -> None:
    module = Base()
    module.view = [OwnForward(module)]
    copied = copy.deepcopy(module)
    (view,) = copied.view
    assert view.fc is copied.fc
    assert view.__dict__["_lightning_module"] is copied


def test_the_own_forward_is_pickled() -> None:
    own: Any = OwnForward(Base())
    again = pickle.loads(pickle.dumps(own))
    assert torch.equal(again(X), own(X))


def test_a_slot_runs_another_network_for_a_while() -> None:
    for module, name in ((Holder(net=nn.Sequential(perceptron())), "net.0"), (Base(), OWN_FORWARD)):
        slot, before = Slot(module, name), module.state_dict()
        called = slot.get() if name != OWN_FORWARD else module.forward
        undo = slot.run_instead(nn.Identity())
        x = torch.randn(3)
        assert torch.equal((module.get_submodule(name) if name != OWN_FORWARD else module)(x), x)
        slot.run_again(undo)
        assert (slot.get() if name != OWN_FORWARD else module.forward) == called
        assert module.state_dict().keys() == before.keys()
        assert "forward" not in vars(module)
