"""Errors during a fit: training state and the last good checkpoint survive, and there is a message."""

from __future__ import annotations

import errno
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning.artifact import load_quantized
from qat_lightning.errors import ArtifactError, QuantizationError
from qat_lightning.modes.prepared import fake_quantizers, is_prepared
from tests.callbacks.lit import (
    CLASSES,
    MODES,
    Lit,
    Net,
    assert_same_state,
    dataset,
    loader,
    qat,
    state,
    trainer,
)

pytestmark = pytest.mark.usefixtures("without_compiler")


class Spoilt(Lit):
    """One batch has a non-finite value; its step is skipped, as a careful user would do."""

    def __init__(self, value: float, at: set[int], net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.value, self.at, self.seen = value, at, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        images, labels = batch
        self.seen += 1
        if self.seen - 1 in self.at:
            images = images.clone()
            images[0, 0, 3, 3] = self.value
            with torch.no_grad():
                self.net.features(images) if not is_prepared(self.net) else self.net(images)
            return None
        return super().training_step((images, labels), batch_idx)


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if "NaN or infinite" in str(one.message)]


# Activations


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_batch_that_is_not_finite_is_left_out_of_the_ranges_and_said_once(mode: str, value: float) -> None:
    class NoStatistics(Net):
        """Without BatchNorm, which a batch with NaN breaks in float training too."""

        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU())
            self.norm = nn.Identity()  # type: ignore[assignment]

    module, callback = Spoilt(value, {2, 5, 6}, NoStatistics()), qat(mode, start=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=3).fit(module, loader())
    seen = [fq.range() for _, fq in fake_quantizers(module.net) if fq.source == "moving_average" and fq.seen]
    assert len(seen) >= 2
    assert all(-100 < float(low) <= float(high) < 100 for low, high in seen)
    said = _said(caught)
    # Three batches in two epochs, and one warning for each place; the input is in the first.
    assert len(said) == 1, said
    assert "'net'" in said[0]
    assert "input" in said[0]
    assert "layer '" in said[0]
    assert torch.isfinite(callback.quantized(dataset()[:8][0])).all()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_said_where_all_is_finite(mode: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(qat(mode), max_epochs=1).fit(Lit(), loader())
    assert not _said(caught)


@pytest.mark.parametrize("mode", MODES)
def test_constant_activations(mode: str) -> None:
    data = TensorDataset(torch.zeros(32, 1, 8, 8), torch.arange(32) % CLASSES)
    module, callback = Lit(), qat(mode, start={"step": 1})
    trainer(callback).fit(module, DataLoader(data, batch_size=8))
    for value in module.state_dict().values():
        assert not isinstance(value, Tensor) or torch.isfinite(value.double()).all()
    prepared = callback.network("fake_quant")
    assert torch.isfinite(prepared(data[:4][0])).all()
    assert torch.isfinite(callback.quantized(data[:4][0])).all()


class Spatial(nn.Module):
    """BatchNorm has several values to average, even in a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_one(mode: str) -> None:
    module, callback = Lit(Spatial()), qat(mode, start={"step": 2})
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader(8, batch_size=1), loader(4, batch_size=1))
    fitting.test(module, loader(4, batch_size=1), verbose=False)
    assert callback.fidelity["agreement"] == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_batchnorm_weights_of_exactly_zero(mode: str) -> None:
    """As many residual networks are initialized; one of the weights never trains."""

    class Zero(Spatial):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.bn.weight)
            nn.init.ones_(self.bn.bias)  # or ReLU would let no gradient through

    module, callback = Lit(Zero()), qat(mode, start={"step": 1})
    stuck: list[Any] = []
    module.net.bn.weight.register_hook(lambda grad: stuck.append(1) or grad.index_fill(0, torch.tensor([0]), 0.0))
    fitting = trainer(callback)
    fitting.fit(module, loader())
    weight = module.state_dict()["net.bn.weight"]
    assert stuck
    assert weight[0] == 0
    assert (weight[1:] != 0).all()
    assert all(torch.isfinite(value.double()).all() for value in module.state_dict().values() if torch.is_tensor(value))
    fitting.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] == 1.0


class Skips(nn.Module):
    """A layer that training never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, CLASSES)
        self.spare = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_never_reached_stays_float_and_is_reported(mode: str) -> None:
    module, callback = Lit(Skips()), qat(mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=1).fit(module, loader())
    row = next(row for row in callback.quantized.coverage if row.name.endswith("spare"))
    assert not row.quantized
    assert row.reason
    assert any("spare" in str(one.message) and "stayed float" in str(one.message) for one in caught)
    assert torch.isfinite(callback.quantized(dataset()[:8][0])).all()


# Data


def _empty() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0).long()), batch_size=4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["empty", "limit", "no validation"])
def test_no_batches(mode: str, how: str) -> None:
    """No step was trained: nothing is converted, and nothing has changed."""
    module, callback = Lit(), qat(mode, example_inputs=dataset()[:4][0])
    before = state(module)
    settings = {"limit_train_batches": 0} if how == "limit" else {}
    train = loader() if how == "limit" else _empty()
    trainer(callback, **settings).fit(module, train, None if how == "no validation" else loader())
    now = state(module)
    assert_same_state({key: now[key] for key in before}, before)
    assert callback.quantized is None
    assert not any(fq.seen for _, fq in fake_quantizers(module.net) if fq.source == "moving_average")


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_loader_gives_no_example(mode: str) -> None:
    module = Lit()
    before = state(module)
    with pytest.raises(QuantizationError, match="example_inputs"):
        trainer(qat(mode)).fit(module, _empty())
    assert_same_state(state(module), before)


# Interruptions


class At(Callback):
    """Does something in a hook, once."""

    def __init__(self, hook: str, step: int, do: Callable[[], Any]) -> None:
        self.hook, self.step, self.do = hook, step, do

    def _perhaps(self, hook: str, step: int) -> None:
        if hook == self.hook and step == self.step:
            self.do()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._perhaps("train", trainer.global_step)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self._perhaps("validation", trainer.global_step)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _fail() -> None:
    raise RuntimeError("the data set is broken")


@pytest.fixture
def _signals() -> Iterator[None]:
    """Lightning ignores SIGINT after an interruption."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def _saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("hook", "do", "raised"),
    [("train", _interrupt, SystemExit), ("train", _fail, RuntimeError), ("validation", _fail, RuntimeError)],
    ids=["interrupted", "step fails", "validation fails"],
)
@pytest.mark.slow
def test_the_fit_goes_on_after_an_interruption(
    mode: str, hook: str, do: Callable[[], None], raised: type[BaseException], tmp_path: Path, caplog: Any
) -> None:
    """With the same objects, from the last checkpoint."""
    module, callback = Lit(), qat(mode, start={"step": 2})
    at = At(hook, 4, do)
    caplog.set_level("INFO", "lightning.pytorch")
    with pytest.raises(raised):
        trainer(callback, at, _saving(tmp_path), enable_checkpointing=True).fit(module, loader(), loader())
    assert "interrupted at step 4" in caplog.text
    assert is_prepared(module.net)
    assert callback.prepared is module.net
    assert not {"forward", "configure_model", "log", "log_dict"} & set(module.__dict__)
    assert not module._load_state_dict_pre_hooks
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # The callback that interrupts comes before the one that saves.
    assert last["global_step"] == (4 if hook == "validation" else 3)
    trainer(callback, _saving(tmp_path), enable_checkpointing=True, max_epochs=3).fit(
        module, loader(), loader(), ckpt_path="last"
    )
    assert callback.quantized is not None


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_a_test_leaves_the_prepared_network(mode: str) -> None:
    class Fails(Lit):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            super().test_step(batch, batch_idx)
            raise RuntimeError("no more")

    module, callback = Fails(), qat(mode)
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    before = state(module)
    with pytest.raises(RuntimeError, match="no more"):
        fitting.test(module, loader(), verbose=False)
    assert is_prepared(module.net)
    assert_same_state(state(module), before)


# A full disk


class FullDisk:
    """Accepts a number of bytes, and then reports that no space is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        opened = Path.open
        disk = self

        def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            if "w" in mode:
                file = _Limited(file, disk)
            return file

        monkeypatch.setattr(Path, "open", open_)


class _Limited:
    def __init__(self, file: Any, disk: FullDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        if self.disk.room is not None and len(data) > self.disk.room:
            self.file.write(bytes(data)[: self.disk.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_while_a_checkpoint_is_saved(mode: str, disk: FullDisk, tmp_path: Path) -> None:
    module, callback = Lit(), qat(mode, start={"step": 2})
    full = At("train", 5, lambda: setattr(disk, "room", 5000))
    with pytest.raises(OSError, match=r"No space left on device: a checkpoint of .* MB was not written") as caught:
        trainer(callback, full, _saving(tmp_path), enable_checkpointing=True).fit(module, loader(), loader())
    assert caught.value.errno == errno.ENOSPC
    # Nothing but whole checkpoints of the step before.
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ckpt", ".ckpt"]
    for path in tmp_path.iterdir():
        assert torch.load(path, weights_only=True)["global_step"] == 4
    # The training has made its fifth step, and is all there.
    assert is_prepared(module.net)
    disk.room = None
    trainer(callback, _saving(tmp_path), enable_checkpointing=True).fit(module, loader(), loader(), ckpt_path="last")
    assert callback.quantized is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_while_the_int8_network_is_saved(mode: str, disk: FullDisk, tmp_path: Path) -> None:
    module, callback = Lit(), qat(mode)
    trainer(callback, max_epochs=1).fit(module, loader())
    path = tmp_path / "network.int8"
    callback.save(path)
    good, before = path.read_bytes(), state(module)
    disk.room = 1000
    with pytest.raises(ArtifactError, match="No space left on device"):
        callback.save(path)
    with pytest.raises(ArtifactError, match="No space left on device"):
        callback.save(tmp_path / "other.int8")
    assert [file.name for file in tmp_path.iterdir()] == ["network.int8"]
    assert path.read_bytes() == good
    assert_same_state(state(module), before)
    images = dataset()[:8][0]
    network = Net() if mode == "eager" else None
    assert torch.equal(load_quantized(path, network=network)(images), callback.quantized(images))


def test_saving_is_lightnings_own_again_after_the_fit(tmp_path: Path) -> None:
    fitting = trainer(qat(), _saving(tmp_path), enable_checkpointing=True)
    before = fitting.strategy.checkpoint_io
    fitting.fit(Lit(), loader())
    assert fitting.strategy.checkpoint_io is before
