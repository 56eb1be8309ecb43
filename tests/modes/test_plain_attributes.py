"""Plain attributes that change in training: where `forward` runs they are followed, and graphs refuse them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining, load_quantized
from qat_lightning.errors import ArtifactError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4

pytestmark = pytest.mark.usefixtures("without_compiler")


class Gate(nn.Module):
    """A branch that fades in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.share = nn.Conv2d(8, 8, 3, padding=1), 0.0
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.share * F.relu(self.conv(x))


class Fading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3), Gate(), nn.Linear(8, 4)
        self.scales: dict[str, Any] = {"head": (1.0, 1.0)}
        self.epoch = 0

    def fade(self, epoch: int) -> None:
        self.gate.share, self.scales, self.epoch = float(epoch), {"head": (1.0 + epoch, 1.0)}, epoch

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(F.relu(self.stem(x))).mean((2, 3))) * self.scales["head"][0]


class Rooted(nn.Module):
    """The attribute is the network's own, with a method that sets it."""

    def __init__(self, alpha: Any = 0.0, *, buffer: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.more, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.epoch = 0
        if buffer:
            self.register_buffer("alpha", torch.tensor(alpha))
        else:
            self.alpha = alpha

    def fade(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.alpha, Tensor):
            self.alpha.fill_(float(epoch))
        else:
            self.alpha = float(epoch)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.alpha * F.relu(self.more(x))).mean((2, 3)))


class Counting(Rooted):
    """What forward does not read, or counts, notes or collects itself, may change."""

    size: tuple[int, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.size, self.seen = 0, None, [0]

    def fade(self, epoch: int) -> None:
        self.epoch, self.size, self.seen = epoch, None, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.size = tuple(x.shape[2:])
        self.seen.append(len(self.seen))
        return super().forward(x.flatten(2).unflatten(2, self.size))


class Default(Rooted):
    """The attribute is a default of the class, which only training sets on the network."""

    factor = 1.0

    def fade(self, epoch: int) -> None:
        self.epoch, self.factor = epoch, 1.0 + epoch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class InTraining(Rooted):
    """The attribute is only read in training."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.0

    def fade(self, epoch: int) -> None:
        self.epoch, self.share = epoch, 0.1 * epoch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.share if self.training else 0.0, self.training))


class Learner(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def on_train_epoch_start(self) -> None:
        self.net.fade(self.current_epoch + 1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class OwnForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.alpha = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(x)).mean((2, 3)) * self.alpha)

    on_train_epoch_start = Learner.on_train_epoch_start
    configure_optimizers = Learner.configure_optimizers

    @property
    def net(self) -> Any:
        return self

    def fade(self, epoch: int) -> None:
        self.alpha = 1.0 + epoch

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def _fit(module: LightningModule, **settings: Any) -> QuantizationAwareTraining:
    qat = QuantizationAwareTraining(**settings)
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[qat]
    )
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    return qat


def _prepared(network: nn.Module, mode: str) -> Any:
    return get_mode(mode).prepare(network, Example((IMAGES,)), Recipe(mode, "x86"))


SETTINGS = [
    {"mode": "eager"},
    {"mode": "eager", "kind": "weight_only"},
    {"mode": "fx", "kind": "weight_only"},
    {"mode": "eager", "kind": "dynamic"},
    {"mode": "fx", "kind": "dynamic"},
]


@pytest.mark.parametrize("network", [Fading, Default])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_the_int8_network_and_its_file_have_the_attributes_that_training_ended_with(
    settings: dict[str, Any], network: type[nn.Module], tmp_path: Path
) -> None:
    module = Learner(network())
    qat = _fit(module, **settings)
    assert module.net.epoch == 2
    with torch.no_grad():
        trained = module.net.eval()(IMAGES)
    assert sqnr_db(trained, qat.quantized(IMAGES)) > 40
    qat.save(tmp_path / "model.int8")
    again = load_quantized(tmp_path / "model.int8", network=network())
    assert torch.equal(again(IMAGES), qat.quantized(IMAGES))
    again.save(tmp_path / "again.int8")
    assert torch.equal(load_quantized(tmp_path / "again.int8", network=network())(IMAGES), again(IMAGES))


class Parts(nn.Module):
    """A loop whose length depends on values, around a part that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head, self.factor = nn.Linear(8, 4), 1.0

    def fade(self, epoch: int) -> None:
        self.factor = 1.0 + epoch

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).mean((2, 3))
        if float(y.detach().sum()) > 1e9:
            y = y / 2
        return self.head(y * self.factor)


def test_the_code_around_parts_follows_an_attribute_also_in_a_file(tmp_path: Path) -> None:
    module = Learner(Parts())
    qat = _fit(module, mode="parts")
    with torch.no_grad():
        assert sqnr_db(module.net.eval()(IMAGES), qat.quantized(IMAGES)) > 30
    qat.save(tmp_path / "model.int8")
    again = load_quantized(tmp_path / "model.int8", network=Parts())
    assert torch.equal(again(IMAGES), qat.quantized(IMAGES))


class Named(Rooted):
    """The attribute is a string, which chooses what runs."""

    def __init__(self, act: str = "relu") -> None:
        super().__init__(1.0)
        self.act = act

    def fade(self, epoch: int) -> None:
        self.act = "silu"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(getattr(F, self.act)(x))


def test_a_file_sets_no_string_and_asks_for_a_network_that_has_it(tmp_path: Path) -> None:
    module = Learner(Named())
    qat = _fit(module, mode="eager")
    with torch.no_grad():
        assert sqnr_db(module.net.eval()(IMAGES), qat.quantized(IMAGES)) > 30
    qat.save(tmp_path / "model.int8")
    with pytest.raises(ArtifactError, match=r"Training changed 'act' .* to 'silu'"):
        load_quantized(tmp_path / "model.int8", network=Named())
    again = load_quantized(tmp_path / "model.int8", network=Named("silu"))
    assert torch.equal(again(IMAGES), qat.quantized(IMAGES))


@pytest.mark.parametrize("mode", ["fx", "pt2e", "auto"])
def test_a_graph_refuses_an_attribute_that_training_changes(mode: str) -> None:
    with pytest.raises(NetworkError, match=r"'alpha' that forward reads is the constant 0\.0\. It is now 1\.0"):
        _fit(Learner(Rooted()), mode=mode)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize(("network", "name"), [(Default, "factor"), (InTraining, "share")])
def test_a_default_of_the_class_and_what_only_training_reads_are_watched(
    network: type[Rooted], name: str, mode: str
) -> None:
    with pytest.raises(NetworkError, match=f"'{name}' that forward reads is the constant"):
        _fit(Learner(network()), mode=mode)


def test_a_change_of_the_class_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Default()
    prepared = _prepared(network, "fx")
    prepared(IMAGES)
    monkeypatch.setattr(Default, "factor", 3.0)
    with pytest.raises(NetworkError, match=r"'factor' that forward reads is the constant 1\.0\. It is now 3\.0"):
        prepared(IMAGES)


def test_a_graph_refuses_an_attribute_of_the_lightning_module_whose_own_forward_it_is() -> None:
    with pytest.raises(NetworkError, match=r"'alpha' that forward reads is the constant 1\.0\. It is now 2\.0"):
        _fit(OwnForward(), mode="fx")


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_buffer_that_is_changed_in_place_is_followed(mode: str) -> None:
    module = Learner(Rooted(buffer=True))
    qat = _fit(module, mode=mode)
    assert not torch.equal(module.net.more.weight, Rooted().more.weight)
    with torch.no_grad():
        assert sqnr_db(module.net.eval()(IMAGES), qat.quantized(IMAGES)) > 30


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_what_forward_does_not_read_or_changes_itself_may_change(mode: str) -> None:
    qat = _fit(Learner(Counting()), mode=mode)
    assert qat.quantized is not None


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("holds", ["network", "submodule", "the network before", "its submodule"])
def test_a_change_is_seen_wherever_code_writes_it(holds: str, mode: str) -> None:
    network = Fading()
    gate, given = network.gate, copy.deepcopy(IMAGES)
    prepared = _prepared(network, mode)
    before = prepared(given)
    writes = {
        "network": lambda: setattr(prepared, "scales", {"head": (2.0, 1.0)}),
        "submodule": lambda: setattr(prepared.gate, "share", 1.0),
        "the network before": lambda: network.scales.update(head=(2.0, 1.0)),
        "its submodule": lambda: setattr(gate, "share", 1.0),
    }
    writes[holds]()
    with pytest.raises(NetworkError, match="that forward reads is the constant"):
        prepared(given)
    undo = {"network": lambda: delattr(prepared, "scales"), "submodule": lambda: delattr(prepared.gate, "share")}
    undo.get(holds, lambda: (network.scales.update(head=(1.0, 1.0)), setattr(gate, "share", 0.0)))()
    assert prepared(given).shape == before.shape


def test_a_borrowed_container_that_is_changed_is_seen() -> None:
    prepared = _prepared(Fading(), "fx")
    prepared.scales["head"] = (3.0, 1.0)
    with pytest.raises(NetworkError, match=r"'scales' that forward reads"):
        prepared(IMAGES)


def test_a_module_that_a_graph_calls_as_a_whole_follows_its_attributes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.1), nn.Conv2d(8, 8, 3))
    prepared = _prepared(network, "fx")
    prepared.get_submodule("1").p = 0.9
    prepared.train()(IMAGES)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_conversion_does_not_ask_code_that_changed_the_network_before(mode: str) -> None:
    network = Rooted()
    prepared = _prepared(network, mode)
    prepared.train()(IMAGES).sum().backward()
    network.alpha = 1.0
    assert get_mode(mode).convert(cpu_copy(prepared), Example((IMAGES,))).checks
