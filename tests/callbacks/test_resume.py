"""A run resumed from any checkpoint ends, bit by bit, like the uninterrupted run."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qat_lightning.callbacks.parts.checkpoint_io import read_float_state
from qat_lightning.callbacks.parts.checkpoint_weights import read_weights
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import CheckpointFileError, CheckpointMismatchError
from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, dataset, loader, qat, ranges, state, trainer

STEPS = 12  # 3 epochs of 4 batches
SCHEDULE: dict[str, Any] = {
    "start": {"step": 3},
    "freeze_observers": {"fraction": 0.5},
    "freeze_batchnorm": {"step": 9},
}


class Decaying(Lit):
    """The learning rate depends on the step, so that a lost step has an effect."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def resumable() -> Any:
    return resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)


def fit(
    mode: str, *callbacks: Any, seed: int = 0, ckpt_path: Path | None = None, train: Any = None, **settings: Any
) -> tuple[Trainer, Decaying, QuantizationAwareTraining]:
    seed_everything(seed, verbose=False)
    module, callback = Decaying(), qat(mode, **SCHEDULE)
    fitting = trainer(callback, *callbacks, **{"max_epochs": 3} | settings)
    fitting.fit(module, train or resumable(), loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


def end(run: tuple[Trainer, Decaying, QuantizationAwareTraining]) -> dict[str, Any]:
    """The final state: weights, ranges, statistics, the optimizer, int8 outputs."""
    fitting, module, callback = run
    assert fitting.global_step == STEPS
    ended = state(module)
    for index, values in fitting.optimizers[0].state_dict()["state"].items():
        ended |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    ended["int8"] = callback.quantized(dataset()[:32][0])
    kept = callback.float_weights("net")
    assert kept
    ended |= {f"float.{key}": value for key, value in kept.items()}
    return ended


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.fixture(scope="module", params=MODES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """An uninterrupted run, and a checkpoint of each of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    run = fit(request.param, every_step(folder), enable_checkpointing=True)
    return request.param, folder, end(run)


# start at 3, ranges stop at 6, BatchNorm at 9; epochs end at 4 and 8
@pytest.mark.parametrize("step", [1, 4, 6, 9, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 8, 11))])
def test_resume_at_any_step(whole: tuple[str, Path, dict[str, Any]], step: int) -> None:
    mode, folder, expected = whole
    assert_same_state(end(fit(mode, seed=7, ckpt_path=folder / f"step={step}.ckpt")), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epoch", [0, 1])
def test_resume_with_a_plain_loader_at_the_end_of_an_epoch(mode: str, epoch: int, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    expected = end(fit(mode, saving, train=loader(), enable_checkpointing=True))
    checkpoint = tmp_path / f"epoch={epoch}.ckpt"
    assert_same_state(end(fit(mode, seed=7, train=loader(), ckpt_path=checkpoint)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_loader_within_an_epoch_is_warned_of(mode: str, tmp_path: Path) -> None:
    """Lightning reports it, and only there: the loader's requirements for exact resume."""
    fit(mode, every_step(tmp_path), train=loader(), enable_checkpointing=True, max_steps=5)
    with pytest.warns(UserWarning, match=r"dataloader is not resumable.*`state_dict` / `load_state_dict`"):
        fit(mode, seed=7, train=loader(), ckpt_path=tmp_path / "step=5.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        fit(mode, seed=7, train=loader(), ckpt_path=tmp_path / "step=4.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resume_under_accumulation(mode: str, tmp_path: Path) -> None:
    settings = {"max_epochs": 6, "accumulate_grad_batches": 2}
    saving = every_step(tmp_path)
    expected = end(fit(mode, saving, enable_checkpointing=True, **settings))
    for step in (2, 5, 7):
        resumed = fit(mode, seed=7, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert_same_state(end(resumed), expected)


def test_checkpoints_hold_tensors_and_plain_values_only(whole: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, _ = whole
    for path in folder.glob("*.ckpt"):
        torch.load(path, weights_only=True)


def _elsewhere(checkpoints: dict[str, Path], out: Path) -> None:
    found: dict[str, Any] = {}
    for mode, folder in checkpoints.items():
        run = fit(mode, seed=7, ckpt_path=folder / "step=5.ckpt")
        found[mode] = {"end": end(run)}
        for stage in ("test", "validate"):
            callback = qat(mode, **SCHEDULE)
            evaluate = getattr(trainer(callback), stage)
            (metrics,) = evaluate(Decaying(), loader(), ckpt_path=str(folder / f"step={STEPS}.ckpt"), verbose=False)
            found[mode][stage] = metrics | callback.fidelity
    torch.save(found, out)


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path: Path) -> None:
    """Resumed, tested and validated in another process from the last checkpoint, with equal results."""
    expected: dict[str, Any] = {}
    for mode in MODES:
        fitting, module, callback = run = fit(mode, every_step(tmp_path / mode), enable_checkpointing=True)
        expected[mode] = {"end": end(run)}
        (metrics,) = fitting.test(module, loader(), verbose=False)
        expected[mode]["test"] = metrics | callback.fidelity
        (expected[mode]["validate"],) = fitting.validate(module, loader(), verbose=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_elsewhere, args=({mode: tmp_path / mode for mode in MODES}, tmp_path / "found.pt")
    )
    child.start()
    child.join(200)
    assert child.exitcode == 0
    found = torch.load(tmp_path / "found.pt")
    for mode in MODES:
        assert_same_state(found[mode].pop("end"), expected[mode].pop("end"))
        assert found[mode] == expected[mode]
        assert found[mode]["test"]["agreement"] == 1.0


def test_test_from_a_checkpoint_runs_its_int8_network(whole: tuple[str, Path, dict[str, Any]]) -> None:
    mode, folder, expected = whole
    module, callback = Decaying(), qat(mode)
    trainer(callback).test(module, loader(), ckpt_path=str(folder / f"step={STEPS}.ckpt"), verbose=False)
    assert torch.equal(callback.quantized(dataset()[:32][0]), expected["int8"])
    assert f"step={STEPS}.ckpt" in callback.quantized.source
    assert callback.variants == ("float", "fake_quant", "int8")


def test_resume_from_weights_only(whole: tuple[str, Path, dict[str, Any]], tmp_path: Path) -> None:
    """Without the callback's state, the schedule follows from the step."""
    mode, _, _ = whole
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True, save_on_train_epoch_end=True)
    _, module, _ = fit(mode, saving, enable_checkpointing=True, max_epochs=1)
    again, callback = Decaying(), qat(mode, **SCHEDULE)
    again_trainer = trainer(callback)
    again_trainer.validate(again, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert_same_state(state(again), state(module))
    again_trainer.fit(again, loader())
    assert callback.quantized is not None


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    seed_everything(0, verbose=False)
    saving = ModelCheckpoint(folder, filename="float", save_on_train_epoch_end=True)
    trainer(saving, max_epochs=1, enable_checkpointing=True).fit(Decaying(), loader())
    return folder / "float.ckpt"


@pytest.mark.parametrize("mode", MODES)
def test_a_float_checkpoint_starts_a_run(mode: str, float_checkpoint: Path) -> None:
    saved = torch.load(float_checkpoint, weights_only=True)["state_dict"]
    module, callback = Decaying(), qat(mode)
    first: dict[str, Any] = {}
    original = module.on_train_start
    module.on_train_start = lambda: (first.update(state(module)), original())[1]  # type: ignore[method-assign]
    trainer(callback, max_epochs=3).fit(module, loader(), ckpt_path=str(float_checkpoint))
    assert_same_state({key: first[key] for key in saved}, saved)
    assert callback.quantized is not None
    # start=0 of the quantized part: the float weights are those of the checkpoint
    assert callback.variants == ("float", "fake_quant", "int8")


@pytest.mark.parametrize("mode", MODES)
def test_a_float_state_dict_loads_before_the_fit_and_between_fits(mode: str, float_checkpoint: Path) -> None:
    saved = torch.load(float_checkpoint, weights_only=True)["state_dict"]
    module, callback = Decaying(), qat(mode)
    module.load_state_dict(saved)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert callback.quantized is not None


class Remembering(Lit):
    """Its hyperparameters contain a module, as in many Hydra projects."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"part": Net()})


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classes")
    saving = ModelCheckpoint(folder, filename="first", save_on_train_epoch_end=True)
    trainer(qat("eager"), saving, max_epochs=1, enable_checkpointing=True).fit(Remembering(), loader())
    return str(folder / "first.ckpt")


def test_a_checkpoint_with_classes_keeps_what_was_decided(with_classes: str) -> None:
    """The mode is known before the weights are restored, although `torch.load` reads the file only if trusted."""
    if "weights_only" not in inspect.signature(Trainer.fit).parameters:
        pytest.skip("this release of Lightning always unpickles")
    callback = qat("auto")
    trainer(callback, max_epochs=2).fit(Remembering(), loader(), ckpt_path=with_classes, weights_only=False)
    assert callback.chosen_modes == {"net": "eager"}


def test_a_checkpoint_with_classes_is_refused_with_what_to_do(with_classes: str) -> None:
    if "weights_only" not in inspect.signature(Trainer.fit).parameters:
        pytest.skip("this release of Lightning always unpickles")
    with pytest.raises(CheckpointFileError, match=r"holds tests.callbacks.lit.Net, .* pass weights_only=False beside"):
        trainer(qat("eager"), max_epochs=2).fit(Remembering(), loader(), ckpt_path=with_classes)


def test_the_float_weights_are_read_beside_classes(with_classes: str) -> None:
    callback = qat("eager", float_checkpoint=with_classes)
    trainer(callback).fit(Remembering(), loader())
    found = read_weights(Path(with_classes))
    assert found is not None
    before = torch.load(with_classes, weights_only=False)["state_dict"]
    assert {name for name, _ in Remembering().named_parameters()} <= found.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())


class Runs:
    """Unpickles as a call that would be noticed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_is_run_for_its_weights(tmp_path: Path) -> None:
    noticed, file = tmp_path / "noticed", tmp_path / "some.ckpt"
    weights = {"w": torch.arange(3.0), "half": torch.ones(2, dtype=torch.bfloat16), "p": nn.Parameter(torch.ones(1))}
    torch.save({"state_dict": weights, "hyper_parameters": {"runs": Runs(noticed)}, "epoch": 3}, file)
    found = read_float_state(file)
    assert not noticed.exists()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    torch.save({"state_dict": weights | {"runs": Runs(noticed)}}, file)
    with pytest.raises(CheckpointFileError, match="mkdir"):
        read_float_state(file)
    assert not noticed.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "eager"}, "mode: 'eager' here, 'fx' there"),
        ({"backend": "fbgemm"}, "backend: 'fbgemm' here, 'x86' there"),
        ({"exclude": ["net.head"]}, "exclude: ('net.head',) here, () there"),
        ({"module": "net.features"}, "'net' there, 'net.features' here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_settings_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    fit("fx", every_step(tmp_path), enable_checkpointing=True, max_steps=2)
    module, callback = Decaying(), qat(**{"mode": "fx"} | settings)
    before = state(module)
    with pytest.raises(CheckpointMismatchError) as caught:
        trainer(callback).fit(module, loader(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert said in str(caught.value)
    now = state(module)
    assert_same_state({key: now[key] for key in before}, before)


def test_a_checkpoint_of_another_network_is_refused_by_its_keys(tmp_path: Path) -> None:
    fit("fx", every_step(tmp_path), enable_checkpointing=True, max_steps=2)
    module = Decaying(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    with pytest.raises(RuntimeError, match=r"net\.head\.weight"):
        trainer(qat()).fit(module, loader(), ckpt_path=str(tmp_path / "step=2.ckpt"))


@pytest.mark.parametrize("mode", MODES)
def test_the_ranges_of_a_checkpoint_are_the_ones_in_use(mode: str, tmp_path: Path) -> None:
    """Loads strictly with fake-quantization enabled: no first step without observed ranges."""
    _, module, _ = fit(mode, every_step(tmp_path), enable_checkpointing=True, max_steps=5)
    again = Decaying()
    trainer(qat(mode)).validate(again, loader(), ckpt_path=str(tmp_path / "step=5.ckpt"), verbose=False)
    assert_same_state(ranges(again), ranges(module))
