"""Distillation in real fits: modes, types of steps, checkpoints, and no remaining state."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from qat_lightning import Distillation
from qat_lightning.errors import ConfigurationError
from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_insert import OwnForward
from tests.callbacks.test_together import Manual, TwoNetworks

START = {"start": {"step": 2}}


class Logged(Callback):
    """Records what each batch logged."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        value = trainer.callback_metrics.get("quant/distillation_loss")
        self.losses.append(None if value is None else float(value))


class DictStep(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}


class Skipping(Lit):
    """Skips every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


def fit(module: Any, *callbacks: Any, **settings: Any) -> Any:
    fitting = trainer(*callbacks, **settings)
    fitting.fit(module, loader(), loader())
    return fitting


@pytest.mark.parametrize("make", [Lit, OwnForward, DictStep])
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_learns_from_the_weights_when_rounding_came_on(mode: str, make: Any) -> None:
    seed_everything(0, verbose=False)
    module, callback, logged = make(), qat(mode, **START), Logged()
    distillation = Distillation(temperature=2.0)
    keys: list[str] = []
    fit(module, callback, distillation, logged)
    keys = list(module.state_dict())
    # Before rounding there is no teacher; afterwards the student is near it, and not equal.
    assert logged.losses[:2] == [None, None]
    assert all(loss is not None and 0 < loss < 2 for loss in logged.losses[2:])
    assert callback.quantized is not None
    assert not any("teacher" in key for key in keys)
    assert "training_step" not in module.__dict__
    assert distillation.state_dict() == {"weights": {}}  # the quantization callback keeps them
    assert not distillation._distillers


@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_sum_of_both_losses(mode: str) -> None:
    """One step from the same weights, compared with the loss written by hand."""

    class ByHand(Lit):
        def __init__(self, teacher: nn.Module) -> None:
            super().__init__()
            self.__dict__["teacher"] = teacher

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            with torch.no_grad():
                wanted = self.__dict__["teacher"](batch[0])
            soft = F.kl_div((scores / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
            return 0.25 * F.cross_entropy(scores, batch[1]) + 0.5 * 9 * soft

    seed_everything(0, verbose=False)
    net = Net()
    ours, theirs = Lit(copy.deepcopy(net)), ByHand(copy.deepcopy(net).eval())
    theirs.net = copy.deepcopy(net)
    fit(ours, qat(mode), Distillation(temperature=3.0, weight=0.5, task_weight=0.25), max_steps=2)
    fit(theirs, qat(mode), max_steps=2)
    wanted = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("mode", MODES)
def test_features(mode: str) -> None:
    seed_everything(0, verbose=False)
    module, logged = Lit(), Logged()
    distillation = Distillation(weight=0, features=["net.features"])
    callback = qat(mode, **START)
    fit(module, callback, distillation, logged)
    # Far at first: the statistics that the teacher normalizes with are those of two steps.
    losses = [loss for loss in logged.losses if loss is not None]
    assert len(losses) == 6
    assert 0 < losses[-1] < 0.5 * losses[0]
    assert not any(inner._forward_hooks for inner in module.net.modules() if inner is not module.net)
    assert callback.quantized is not None


def test_the_order_of_the_callbacks_plays_no_part() -> None:
    ends = []
    for first in (True, False):
        seed_everything(0, verbose=False)
        module = Lit()
        callbacks = [qat("fx", **START), Distillation()]
        fit(module, *(callbacks if first else callbacks[::-1]))
        ends.append(state(module))
    assert_same_state(*ends)


def test_a_batch_that_is_left_out_stays_left_out() -> None:
    logged = Logged()
    fit(Skipping(), qat("eager"), Distillation(), logged)
    assert logged.losses[0] is None
    assert logged.losses[-1] is not None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("mode", ["eager", "fx", pytest.param("pt2e", marks=pytest.mark.slow)])
def test_precisions(mode: str, precision: str) -> None:
    logged = Logged()
    fit(Lit(), qat(mode, **START), Distillation(features=["net.features"]), logged, precision=precision)
    assert all(loss is not None and loss > 0 for loss in logged.losses[2:])


def test_several_networks() -> None:
    both, one = Logged(), Logged()
    settings = {"module": ["net", "other"], **START}
    seed_everything(0, verbose=False)
    fit(TwoNetworks(), qat("fx", **settings), Distillation(features=["net.features"]), both)
    seed_everything(0, verbose=False)
    fit(TwoNetworks(), qat("fx", **settings), Distillation(module="other"), one)
    assert both.losses[-1] is not None
    assert one.losses[-1] is not None
    assert both.losses[-1] > one.losses[-1]


def test_float_checkpoint_is_the_teacher(tmp_path: Path) -> None:
    teacher = Lit()
    nn.init.zeros_(teacher.net.head.weight)
    nn.init.constant_(teacher.net.head.bias, 0.0)
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "float.ckpt")
    module = Lit(lr=0.5)
    callback = qat("fx", float_checkpoint=tmp_path / "float.ckpt")
    fit(module, callback, Distillation(task_weight=0, temperature=1.0), max_epochs=15)
    # The teacher finds all classes equally likely; so does, then, who learns from it alone.
    scores = callback.prepared.eval()(dataset()[:32][0]).softmax(1)
    assert (scores - 0.25).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("start", [{"start": 0}, START], ids=["from the first step", "later"])
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_same_teacher(mode: str, start: dict[str, Any], tmp_path: Path) -> None:
    def run(seed: int, *callbacks: Any, **settings: Any) -> dict[str, Any]:
        seed_everything(seed, verbose=False)
        module = Lit()
        fitting = trainer(qat(mode, **start), Distillation(), *callbacks, max_epochs=3, **settings)
        fitting.fit(module, loader(), loader(), ckpt_path=ckpt)
        return state(module)

    ckpt = None
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run(0, saving, enable_checkpointing=True)
    for epoch in (0, 1):
        ckpt = str(tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(run(7), whole)
    checkpoint = torch.load(ckpt, weights_only=True)
    kept = [s for key, s in checkpoint["callbacks"].items() if key.startswith("Distillation")]
    # The teacher is in a checkpoint once.
    assert bool(kept[0]["weights"]) == (start["start"] == 0)
    assert not any("teacher" in key for key in checkpoint["state_dict"])


def test_a_run_without_a_teacher_to_go_on_with_is_refused(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Lit(), qat("fx"), saving, enable_checkpointing=True)
    with pytest.raises(ConfigurationError, match="no float weights of 'net' to learn from"):
        trainer(qat("fx"), Distillation(), max_epochs=3).fit(Lit(), loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))


def test_it_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Lit(), qat("fx"), Distillation(), logger=logger, log_every_n_steps=1)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "quant/distillation_loss" in header
    fit(Lit(), qat("fx"), Distillation(), barebones=True, logger=None, enable_checkpointing=None)


def test_what_cannot_be_is_refused_before_anything_is_trained() -> None:
    module = Lit()
    before = state(module)

    def refused(message: str, distillation: Distillation, module: Any = module, *callbacks: Any) -> None:
        with pytest.raises(ConfigurationError, match=message):
            fit(module, *(callbacks or (qat("fx"),)), distillation)
        assert "training_step" not in module.__dict__

    refused("needs exactly one QuantizationAwareTraining, and the Trainer has 0", Distillation(), Lit(), Logged())
    refused("add qat_lightning.recipes.distillation", Distillation(), Manual())
    refused("'nte' of Distillation is not quantized", Distillation(module="nte"))
    refused(
        "'features' is in none of the networks 'net'.* LightningModule, like 'net.features'",
        Distillation(features=["features"]),
    )
    refused("features='blocks' finds no list of repeated blocks in Net", Distillation(features="blocks"))
    refused(
        "'net.featurs' is no module of the network. Features can be 'net.features', ",
        Distillation(features=["net.featurs"]),
    )
    refused("'logits' is not a tensor of scores", Distillation(outputs=["logits"]))
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"task_weight": True}, "task_weight=True"),
        ({"feature_weight": 0}, "feature_weight=0"),
        ({"loss": "mae"}, "one of kl, mse"),
        ({"features": "net.layer"}, "features='net.layer'"),
        ({"outputs": [1]}, "outputs="),
        ({"class_axis": "last"}, "class_axis='last'"),
        ({"features": "stages"}, "features='stages'"),
        ({"weight": 0}, "nothing to learn"),
    ],
)
def test_malformed_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Distillation(**settings)


def test_copies_and_pickles_after_a_fit() -> None:
    module, distillation = Lit(), Distillation()
    fit(module, qat("fx"), distillation)
    assert pickle.loads(pickle.dumps(distillation)).settings == distillation.settings
    assert copy.deepcopy(distillation)._weights.keys() == {"net"}


@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, {"features": ["net.features"], "weight": 0.0}], ids=["outputs", "features"])
def test_a_compiled_step(settings: dict[str, Any]) -> None:
    logged = Logged()
    seed_everything(0, verbose=False)
    module = Lit()
    fit(torch.compile(module, backend="eager"), qat("fx", **START), Distillation(**settings), logged)
    compiled = list(logged.losses)
    plain = Logged()
    seed_everything(0, verbose=False)
    fit(Lit(), qat("fx", **START), Distillation(**settings), plain)
    assert compiled[2:] == pytest.approx(plain.losses[2:], rel=1e-3, abs=1e-5)


def test_a_fit_that_breaks_leaves_nothing() -> None:
    class Breaking(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module = Breaking()
    distillation = Distillation(features=["net.features"])
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, qat("eager"), distillation)
    assert "training_step" not in module.__dict__
    assert "forward" not in module.net.__dict__
    assert not any(inner._forward_hooks for inner in module.net.features.modules())
