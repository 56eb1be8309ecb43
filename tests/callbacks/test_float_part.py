"""Checkpoints with quantization in a LightningModule without the callback, and float ones in a module with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning.callbacks.parts.checkpoints import LoadsQuantizedCheckpoints, float_state_dict
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_insert import OwnForward

IMAGES = dataset()[:32][0]


class Child(LoadsQuantizedCheckpoints, Lit):
    """The network is a child."""


class Own(LoadsQuantizedCheckpoints, OwnForward):
    """The layers are direct attributes."""


class Both(LoadsQuantizedCheckpoints, Lit):
    """Two networks."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x)


def checkpoint_of(
    mode: str, make: Callable[..., Any], folder: Path, **settings: Any
) -> tuple[Path, Any, QuantizationAwareTraining]:
    torch.manual_seed(0)
    module, callback = make(lr=0.04), qat(mode, start=1, **settings)
    saving = ModelCheckpoint(folder, filename="last")
    trainer(callback, saving, enable_checkpointing=True).fit(module, loader())
    return folder / "last.ckpt", module, callback


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "settings"),
    [(Child, {}), (Own, {}), (Both, {"module": ["net", "other"]})],
    ids=["child", "own", "several"],
)
@pytest.mark.parametrize("mode", MODES)
def test_load_from_checkpoint(mode: str, make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    path, trained, callback = checkpoint_of(mode, make, tmp_path, **settings)
    module = make.load_from_checkpoint(path)
    assert module.hparams["lr"] == 0.04
    # Strictly, and nothing but the float part.
    plain = make()
    plain.load_state_dict(float_state_dict(path), strict=True)
    assert_same_state(state(module), state(plain))
    kept = state(trained)
    assert_same_state(state(module), {key: kept[key] for key in state(module)})
    assert set(make.load_from_checkpoint(path, lr=0.1).hparams.values()) >= {0.1}
    # It trains on without the callback, and with another one.
    trainer(max_epochs=1).fit(module, loader())
    other = make.load_from_checkpoint(path)
    trainer(qat("fx", **settings)).fit(other, loader())
    # With the callback, the same class resumes as ever.
    again = qat(mode, start=1, **settings)
    resumed = make(lr=0.04)
    trainer(again).test(resumed, loader(), ckpt_path=str(path), verbose=False)
    for name, one, two in _pairs(again.quantized, callback.quantized):
        inputs = IMAGES
        assert torch.equal(one(inputs), two(inputs)), name


def _pairs(left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    return [(name, left[name], right[name]) for name in left] if isinstance(left, dict) else [("", left, right)]


@pytest.mark.parametrize("mode", MODES)
def test_float_state_dict_of_whatever_was_saved(mode: str, tmp_path: Path) -> None:
    """A path, a checkpoint, or its ``state_dict``; for a float run this is everything."""
    path, trained, _ = checkpoint_of(mode, Child, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    expected = float_state_dict(path)
    for given in (str(path), checkpoint, checkpoint["state_dict"], trained.state_dict()):
        assert_same_state(float_state_dict(given), expected)
    assert "net._quantization._extra_state" in checkpoint["state_dict"]  # not taken out of what was given
    assert_same_state(float_state_dict(expected), expected)


@pytest.mark.parametrize("mode", MODES)
def test_weights_only_checkpoints(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Child(), qat(mode)
    fitting = trainer(callback)
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_same_state(state(Child.load_from_checkpoint(tmp_path / "weights.ckpt")), float_state_dict(state(module)))
    expected = fitting.test(module, loader(), verbose=False)
    fresh = trainer(qat(mode)).test(Child(), loader(), ckpt_path=str(tmp_path / "weights.ckpt"), verbose=False)
    assert fresh == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_float_checkpoint_is_tested_and_fitted(mode: str, tmp_path: Path) -> None:
    """By ``ckpt_path``: of a fit with all state, of weights only, and of an evaluation."""
    torch.manual_seed(0)
    plain = Lit()
    fitting = trainer(max_epochs=1)
    fitting.fit(plain, loader())
    fitting.save_checkpoint(tmp_path / "float.ckpt")
    saved = state(plain)
    module = Lit()
    callback = qat(mode)
    # The epochs of the checkpoint count: there is nothing left to do.
    with pytest.warns(UserWarning, match="The fit ran no training step"):
        trainer(callback, max_epochs=1).fit(module, loader(), ckpt_path=str(tmp_path / "float.ckpt"))
    assert callback.quantized is None
    now = state(module)
    assert_same_state({key: now[key] for key in saved}, saved)
    for run in ("validate", "test"):
        module = Lit()
        (metrics,) = getattr(trainer(qat(mode)), run)(
            module, loader(), ckpt_path=str(tmp_path / "float.ckpt"), verbose=False
        )
        (expected,) = getattr(trainer(), run)(plain, loader(), verbose=False)
        assert metrics == pytest.approx(expected, rel=1e-4)


class Counting(nn.Module):
    """Has extra state that is not a tensor."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(64, 8), {"start": start}

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x.flatten(1)))

    def get_extra_state(self) -> dict[str, int]:
        return self.count

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = dict(state)


class OfCounting(Counting):
    """Contains another LightningModule."""

    def __init__(self, start: int = 0) -> None:
        super().__init__(start)
        self.inner, self.head = Counting(start + 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x) + self.inner(x))


@pytest.mark.parametrize("mode", MODES)
def test_extra_state_that_is_no_tensor(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Child(OfCounting(5)), qat(mode, start=1)
    fitting = trainer(callback)
    fitting.fit(module, loader())
    callback.use_variant("float")
    fitting.test(module, loader(), verbose=False)
    saved = {"net._extra_state": {"start": 5}, "net.inner._extra_state": {"start": 6}}
    assert_same_state({key: state(module)[key] for key in saved}, saved)
    assert callback.present_float("net").inner.count == {"start": 6}
    fitting.save_checkpoint(tmp_path / "counting.ckpt")
    # Into a float module, and into a prepared one.
    plain = Child.load_from_checkpoint(tmp_path / "counting.ckpt", net=OfCounting())
    assert (plain.net.count, plain.net.inner.count) == ({"start": 5}, {"start": 6})
    other = Child(OfCounting())
    trainer(qat(mode, start=1)).test(other, loader(), ckpt_path=str(tmp_path / "counting.ckpt"), verbose=False)
    now = other.state_dict()
    assert {key: now[key] for key in saved} == saved
    del now["net._extra_state"]
    with pytest.raises(RuntimeError, match=r"net\._extra_state"):
        other.load_state_dict(now)


@pytest.mark.parametrize("mode", MODES)
def test_bias_correction_with_extra_state_that_is_no_tensor(mode: str) -> None:
    callback = PostTrainingQuantization(mode=mode, bias_correction=True)
    fitting = trainer(callback)
    module = Child(OfCounting(5))
    fitting.fit(module, loader())
    fitting.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] > 0.9
