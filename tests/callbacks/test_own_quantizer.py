"""A user's quantizer in a whole run: fit, resume, int8, file, two processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, load_quantized
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, assert_same_state, dataset, loader, ranges, state, trainer
from tests.callbacks.two_processes import read_both, run_two
from tests.support.quantizers import OwnQuantizer

PATH = "tests.support.quantizers.OwnQuantizer"
FORMS: dict[str, Any] = {
    "symmetric": {"_target_": PATH, "symmetric": True, "bias": True},
    "int16": "tests.support.quantizers.wide_quantizer",
    "instance": OwnQuantizer("uint8", per_channel=False),
}
SCHEDULE: dict[str, Any] = {"start": {"step": 3}, "freeze_observers": {"step": 6}, "freeze_batchnorm": {"step": 9}}
IMAGES = dataset()[:32][0]


def fit(
    backend: Any, *callbacks: Any, seed: int = 0, ckpt_path: Path | None = None, **settings: Any
) -> tuple[Trainer, Lit, QuantizationAwareTraining]:
    seed_everything(seed, verbose=False)
    module = Lit()
    callback = QuantizationAwareTraining("pt2e", copy.deepcopy(backend), **SCHEDULE)
    fitting = trainer(callback, *callbacks, **{"max_epochs": 3} | settings)
    train = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
    fitting.fit(module, train, loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


def end(run: tuple[Trainer, Lit, QuantizationAwareTraining]) -> dict[str, Any]:
    _, module, callback = run
    return state(module) | {"int8": callback.quantized(IMAGES)}


@pytest.fixture(scope="module", params=FORMS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """An uninterrupted run, and a checkpoint of each of its steps."""
    folder, backend = tmp_path_factory.mktemp("whole"), FORMS[request.param]
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    return backend, folder, fit(backend, saving, enable_checkpointing=True)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)])
def test_resume_is_bit_equal(whole: tuple[Any, Path, Any], step: int) -> None:
    backend, folder, run = whole
    assert_same_state(end(fit(backend, seed=7, ckpt_path=folder / f"step={step}.ckpt")), end(run))


def test_every_layer_is_verified_saved_and_loaded(whole: tuple[Any, Path, Any], tmp_path: Path) -> None:
    _, _, (fitting, module, callback) = whole
    quantized = callback.quantized
    assert all(row.quantized for row in quantized.coverage)
    assert min(check.sqnr_db for check in quantized.checks) >= 60
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] > 0.5
    assert callback.fidelity["agreement"] == 1.0
    callback.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8")
    assert torch.equal(loaded(IMAGES), quantized(IMAGES))
    assert (loaded.recipe.backend, loaded.recipe.mode) == (quantized.recipe.backend, "pt2e")
    assert not loaded.recipe.differences(quantized.recipe)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(IMAGES), quantized(IMAGES))


def test_checkpoints_hold_tensors_and_plain_values_only(whole: tuple[Any, Path, Any]) -> None:
    _, folder, _ = whole
    for path in folder.glob("*.ckpt"):
        torch.load(path, weights_only=True)


def test_a_checkpoint_is_tested_by_a_fresh_callback(whole: tuple[Any, Path, Any]) -> None:
    backend, folder, (_, _, first) = whole
    module, callback = Lit(), QuantizationAwareTraining("pt2e", copy.deepcopy(backend))
    trainer(callback).test(module, loader(), ckpt_path=str(folder / "step=12.ckpt"), verbose=False)
    assert torch.equal(callback.quantized(IMAGES), first.quantized(IMAGES))


def test_another_quantizer_is_refused_at_resume(whole: tuple[Any, Path, Any]) -> None:
    _, folder, _ = whole
    with pytest.raises(CheckpointMismatchError, match="quantizer: "):
        fit({"_target_": PATH, "dtype": "uint8"}, ckpt_path=folder / "step=5.ckpt")


def test_an_instance_with_other_grids_is_refused_at_resume(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_on_train_epoch_end=True)
    fit(OwnQuantizer("uint8"), saving, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(CheckpointMismatchError, match=r"other grids .*int8 .* here, uint8 .* there"):
        fit(OwnQuantizer("int8"), ckpt_path=tmp_path / "step=4.ckpt")


def test_calibration_takes_one_as_well() -> None:
    seed_everything(0, verbose=False)
    module = Lit()
    trainer(max_epochs=1).fit(module, loader())
    ptq = PostTrainingQuantization("pt2e", PATH, calibration_batches=4, calibration_dataloader=loader())
    (metrics,) = trainer(ptq).test(module, loader(), verbose=False)
    assert ptq.quantized is not None
    assert min(check.sqnr_db for check in ptq.quantized.checks) >= 60
    assert metrics["test/acc"] > 0.3


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("no_such_package.Quantizer", "cannot be imported: No module named 'no_such_package'"),
        ({"_target_": PATH, "bits": 3}, "give the arguments that it takes"),
        ("os.getcwd", "name a function that returns one"),
    ],
)
def test_what_cannot_be_made_fails_at_construction(backend: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        QuantizationAwareTraining("pt2e", backend)
    assert says in str(error.value)


def test_settings_can_be_changed_and_keep_the_quantizer() -> None:
    callback = QuantizationAwareTraining("pt2e", FORMS["symmetric"])
    callback.exclude = ["head"]
    assert callback.backend == FORMS["symmetric"]
    assert QuantizationAwareTraining("auto", OwnQuantizer).backend == PATH


def test_a_recipe_of_an_instance_asks_for_it_again() -> None:
    run = fit(FORMS["instance"], max_epochs=1)
    recipe = prepared_state(run[2].prepared).recipe
    assert Recipe.from_dict(recipe.to_dict()).quantizer.arguments is None  # type: ignore[union-attr]
    assert ranges(run[1])


@pytest.mark.nightly
def test_two_processes_end_alike(tmp_path: Path) -> None:
    first, second = read_both(run_two("tests.callbacks.ddp_own_quantizer", tmp_path))
    assert first == second
    assert all(found["fidelity"]["agreement"] == 1.0 for found in first.values())
