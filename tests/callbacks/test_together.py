"""The features of Lightning in one table: each row, in every mode, works or raises a clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch import callbacks as others
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qat_lightning import Scheme
from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import CLASSES, MODES, Lit, Net, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_insert import BuiltInConfigureModel, OwnForward

IMAGES = dataset()[:32][0]


class CalledByName(OwnForward):
    """Its own forward is called with keywords in one step, and without in another."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self(x=batch[0]), batch[1])


class Manual(Lit):
    """Steps manually; the example comes from validation, because recording it must not take a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()


class SeveralOptimizers(Manual):
    """A network for features, and another for the rest."""

    def configure_optimizers(self) -> Any:
        features = set(self.net.features.parameters())
        rest = [parameter for parameter in self.parameters() if parameter not in features]
        return [torch.optim.SGD(list(features), lr=0.05, momentum=0.9), torch.optim.SGD(rest, lr=0.05, momentum=0.9)]


class TwoNetworks(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x)


class WithBackbone(OwnForward):
    """The structure that `BackboneFinetuning` requires."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        del self.conv, self.norm

    def embed(self, x: Tensor) -> Tensor:
        return self.backbone(x).flatten(1)

    def configure_optimizers(self) -> Any:
        training = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(training, lr=0.05, momentum=0.9)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.features, optimizer)


class Reloading(Lit):
    reloads = 0

    def train_dataloader(self) -> Any:
        self.reloads += 1
        return loader()


def averaging() -> Any:
    if not hasattr(others, "EMAWeightAveraging"):
        pytest.skip("this release of Lightning has no WeightAveraging")
    return others.EMAWeightAveraging(decay=0.9)


def compiled(module: Any) -> Any:
    torch._dynamo.reset()
    if isinstance(module, Lit):
        # Metrics count in Python numbers, for each of which it would be compiled anew.
        module._evaluate = torch.compiler.disable(module._evaluate)  # type: ignore[method-assign]
    return torch.compile(module, backend="eager")


@dataclass
class Row:
    """One feature.

    Attributes:
        name: Its name in the table of ``docs/compatibility.md``.
        module: Creates the LightningModule.
        callbacks: Creates the other callbacks.
        trainer: Settings of the Trainer.
        qat: Settings of our callback.
        refused: The expected error message, by mode.
        accuracy: The accuracy that the int8 network has to reach.
    """

    name: str
    module: Callable[[], Any] = Lit
    callbacks: Callable[[], list[Any]] = list
    trainer: dict[str, Any] = field(default_factory=dict)
    qat: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    accuracy: float = 0.9


GRAPH_MODES = ("fx", "pt2e")
ROWS = [
    Row("EMAWeightAveraging", callbacks=lambda: [averaging()]),
    Row("StochasticWeightAveraging", callbacks=lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)]),
    Row("EarlyStopping", callbacks=lambda: [EarlyStopping("val/loss", patience=1)]),
    Row("BackboneFinetuning", WithBackbone, lambda: [BackboneFinetuning(1, verbose=False)]),
    Row("BaseFinetuning", callbacks=lambda: [Unfreezing()]),
    Row("GradientAccumulationScheduler", callbacks=lambda: [GradientAccumulationScheduler({0: 1, 2: 2})]),
    *(Row(f"profiler {name}", trainer={"profiler": name}) for name in ("simple", "advanced")),
    Row("ModelSummary", callbacks=lambda: [ModelSummary(2), RichModelSummary(2)]),
    Row(
        "ModelPruning",
        callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.2)],
        refused=dict.fromkeys(GRAPH_MODES, "ModelPruning does not support .* use mode='eager'"),
    ),
    Row("gradient_clip_val", trainer={"gradient_clip_val": 0.5}),
    Row("accumulate_grad_batches", trainer={"accumulate_grad_batches": 2, "max_epochs": 5}),
    Row("manual optimization", Manual),
    Row("several optimizers", SeveralOptimizers),
    Row("several networks", TwoNetworks, qat={"module": ["net", "other"]}),
    Row("own forward", CalledByName),
    Row("configure_model", BuiltInConfigureModel),
    Row("overfit_batches", trainer={"overfit_batches": 2, "max_epochs": 8}),
    Row("limit_train_batches", trainer={"limit_train_batches": 0.5, "max_epochs": 6}),
    Row("inference_mode=False", trainer={"inference_mode": False}),
    Row("deterministic", trainer={"deterministic": True}),
    Row("detect_anomaly", trainer={"detect_anomaly": True}),
    Row("precision bf16-mixed", trainer={"precision": "bf16-mixed"}),
    Row("precision bf16-true", trainer={"precision": "bf16-true", "max_epochs": 5}),
    Row("precision 16-true", trainer={"precision": "16-true", "max_epochs": 5}),
    Row("precision 64-true", trainer={"precision": "64-true"}),
    Row("precision 64-true, configure_model", BuiltInConfigureModel, trainer={"precision": "64-true"}),
    Row("reload_dataloaders_every_n_epochs", Reloading, trainer={"reload_dataloaders_every_n_epochs": 1}),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
@pytest.mark.parametrize("mode", MODES)
def test_row(mode: str, row: Row) -> None:
    """It learns its task, int8 has the tested weights, and ranges are float32 and finite."""
    torch.manual_seed(0)
    module, callback = row.module(), qat(mode, **{"start": 1} | row.qat)
    fitting = trainer(callback, *row.callbacks(), **{"max_epochs": 4} | row.trainer)
    train = {} if isinstance(module, Reloading) else {"train_dataloaders": loader()}
    if mode in row.refused:
        with pytest.raises((ConfigurationError, NetworkError), match=row.refused[mode]):
            fitting.fit(module, **train, val_dataloaders=loader())
        return
    fitting.fit(module, **train, val_dataloaders=loader())
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] >= row.accuracy
    assert callback.fidelity["agreement"] > 0.95
    lit = fitting.lightning_module
    assert callback.phase.fake_quant
    _same_weights(callback, lit)
    _tidy_state(lit, fitting.precision)
    if isinstance(module, Reloading):
        assert module.reloads >= 4


def _same_weights(callback: QuantizationAwareTraining, lit: Any) -> None:
    """The network converted at the end of the fit has the LightningModule's final weights."""
    quantized = callback.quantized if isinstance(callback.quantized, dict) else {"": callback.quantized}
    outputs = [network(IMAGES) for network in quantized.values()]
    callback.convert()
    again = callback.quantized if isinstance(callback.quantized, dict) else {"": callback.quantized}
    for one, network in zip(outputs, again.values(), strict=True):
        assert torch.equal(one, network(IMAGES))


def _tidy_state(lit: Any, precision: str | None) -> None:
    found = [fq for _, fq in fake_quantizers(lit) if fq.source == "moving_average" and fq.seen]
    assert found
    for fq in found:
        assert fq.fake_quant_enabled is True
        assert fq.observer_enabled is True
        assert fq.min_val.dtype == fq.max_val.dtype == torch.float32
        assert fq.batches.dtype == torch.int64
        assert fq.batches > 0
        assert fq.min_val.isfinite()
        assert fq.max_val.isfinite()
        _, zero_point = fq.calculate_qparams()
        assert fq.quant_min <= zero_point <= fq.quant_max
    weights = {parameter.dtype for parameter in lit.parameters()}
    trained = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    assert weights == {trained.get(precision or "", torch.float32)}


@pytest.mark.parametrize("mode", MODES)
def test_the_average_is_tested_from_a_checkpoint(mode: str, tmp_path: Path) -> None:
    """The averaged network in the checkpoint is a copy with hooks, whose keys have another prefix."""
    average, saving = averaging(), ModelCheckpoint(tmp_path, monitor="val/loss")
    callback, module = qat(mode), Lit()
    fitting = trainer(callback, average, saving, max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    fitting.test(module, loader(), ckpt_path="best", verbose=False)
    assert saving.best_model_path in callback.quantized.source
    saved = torch.load(saving.best_model_path, weights_only=True)
    assert not torch.equal(saved["state_dict"]["net.head.weight"], saved["current_model_state"]["net.head.weight"])
    assert torch.equal(saved["state_dict"]["net.head.weight"], state(module)["net.head.weight"])
    _same_weights(callback, module)
    counts = [value for key, value in saved["state_dict"].items() if key.endswith("batches")]
    assert counts
    assert {count.dtype for count in counts} == {torch.int64}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_evaluates_the_average_of_a_checkpoint(stage: str, tmp_path: Path) -> None:
    """With the fit's Trainer and with a new one."""
    average, saving = averaging(), ModelCheckpoint(tmp_path, monitor="val/loss")
    callback = PostTrainingQuantization(calibration_dataloader=loader())
    module = Lit()
    fitting = trainer(average, callback, saving, max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    getattr(fitting, stage)(module, loader(), ckpt_path="best")
    saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("average", [averaging, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)])
@pytest.mark.parametrize("behind", [True, False])
def test_what_training_ends_with_is_quantized(average: Callable[[], Any], behind: bool) -> None:
    """Also if a callback after ours writes its average into the network."""
    torch.manual_seed(0)
    callback, module = PostTrainingQuantization(), Lit()
    callbacks = [callback, average()] if behind else [average(), callback]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(*callbacks, max_epochs=3).fit(module, loader())
    twice = behind and average is averaging  # the other one writes its average before the last epoch
    assert twice == any("belongs before PostTrainingQuantization" in str(warning.message) for warning in said)
    outputs = callback.quantized(IMAGES)
    alone = PostTrainingQuantization(calibration_dataloader=loader())
    trainer(alone).test(module, loader(), verbose=False)
    assert torch.equal(outputs, alone.quantized(IMAGES))


@pytest.mark.parametrize("make", [qat, PostTrainingQuantization])
@pytest.mark.slow
def test_a_profiler_that_hooks_every_layer(make: Callable[[], Any], tmp_path: Path) -> None:
    """In a fit and in a test; hooks can be neither copied nor traced."""
    module, callback = Lit(), make()
    settings = {"profiler": PyTorchProfiler(dirpath=tmp_path, filename="profile"), "max_epochs": 1}
    trainer(callback, **settings).fit(module, loader())
    trainer(callback, **settings).test(module, loader(), verbose=False)
    assert callback.quantized is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_backbone_that_was_unfrozen_is_so_after_a_resume(mode: str, tmp_path: Path) -> None:
    ended = []
    for checkpoint in (None, tmp_path / "epoch=1.ckpt"):
        torch.manual_seed(0)
        module, saving = WithBackbone(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        callbacks = [qat(mode), BackboneFinetuning(1, verbose=False), saving]
        trainer(*callbacks, max_epochs=3, enable_checkpointing=True).fit(module, loader(), ckpt_path=checkpoint)
        ended.append(state(module))
    assert_same_state(*ended)


def test_an_average_that_would_miss_the_preparation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="EMAWeightAveraging comes before QuantizationAwareTraining"):
        trainer(averaging(), qat()).fit(Lit(), loader())


class WithAverage(Lit):
    """Averages its network itself, in a copy from before the preparation."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mean = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5), **settings)
        self.expected: dict[str, Tensor] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        values = self.net.state_dict()
        now = {key: values[key].double() for key in self.mean.module.state_dict() if "batches" not in key}
        self.expected = {key: (self.expected.get(key, value) + value) / 2 for key, value in now.items()}
        self.mean.update_parameters(self.net)


@pytest.mark.parametrize("settings", [{}, {"scheme": Scheme(learned_step="lsq")}])
@pytest.mark.parametrize("mode", MODES)
def test_an_average_in_the_module_that_cannot_be_updated_is_refused(mode: str, settings: Any) -> None:
    module = WithAverage(use_buffers=bool(settings))
    before = state(module)
    with pytest.raises(ConfigurationError, match=r"'mean' is an AveragedModel of 'net'.*EMAWeightAveraging"):
        trainer(qat(mode, module="net", **settings)).fit(module, loader())
    assert type(module.net) is Net
    assert_same_state(state(module), before)


@pytest.mark.parametrize(("kind", "use_buffers"), [("static", True), ("weight_only", True), ("weight_only", False)])
@pytest.mark.parametrize("mode", MODES)
def test_an_average_in_the_module_that_can_be_updated_averages_by_name(mode: str, kind: Any, use_buffers: bool) -> None:
    module, settings = WithAverage(use_buffers=use_buffers), {} if kind == "static" else {"kind": kind}
    trainer(qat(mode, module="net", **settings), max_steps=3).fit(module, loader())
    averaged = module.mean.module.state_dict()
    for key, value in module.expected.items():
        if use_buffers or "running" not in key:  # the last ones are copied instead
            torch.testing.assert_close(averaged[key].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_compiled_training_is_training(mode: str) -> None:
    """A compiled LightningModule follows the schedule, and ends like the uncompiled one."""
    ended = []
    for compile in (False, True):
        torch.manual_seed(0)
        module, callback = Lit(), qat(mode, start={"step": 1}, freeze_observers={"step": 3})
        fitting = trainer(callback, max_epochs=1)
        fitting.fit(compiled(module) if compile else module, loader())
        fitting.test(module, loader(), verbose=False)
        assert callback.fidelity["agreement"] > 0.95
        ended.append((module, callback.quantized(IMAGES)))
    for key, value in ended[0][0].state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ended[1][0].state_dict()[key], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ended[1][1], ended[0][1], rtol=0.0, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_fast_dev_run(mode: str) -> None:
    callback = qat(mode)
    trainer(callback, fast_dev_run=2).fit(Lit(), loader(), loader())
    assert callback.quantized is not None


@pytest.mark.parametrize("mode", MODES)
def test_no_batches(mode: str) -> None:
    callback = qat(mode)
    trainer(callback, limit_train_batches=0).fit(Lit(), loader(), loader())
    assert callback.quantized is None


@pytest.mark.parametrize("mode", MODES)
def test_barebones(mode: str) -> None:
    callback = qat(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback]).fit(Lit(), loader())
    assert callback.quantized is not None


def test_auto() -> None:
    """In a Trainer it reports the chosen mode, and the recipe in the checkpoint has it."""
    torch.manual_seed(0)
    module, callback = Lit(), qat("auto", start=1)
    fitting = trainer(callback, max_epochs=3)
    fitting.fit(module, loader(), loader())
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] > 0.9
    assert callback.quantized.recipe.mode == "fx"
    again = trainer(qat("fx")).test(module, loader(), verbose=False)
    assert again == [metrics]


class Sized(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()


@pytest.mark.slow
@pytest.mark.parametrize("find", ["LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.parametrize("mode", MODES)
def test_tuning_before_the_fit_reaches_nothing(mode: str, find: str, tmp_path: Path) -> None:
    """Their trial steps are undone, including schedule points reached in them."""
    tuner = (
        LearningRateFinder(num_training_steps=6, attr_name="lr")
        if find == "LearningRateFinder"
        else BatchSizeFinder(max_trials=2, steps_per_trial=3)
    )
    module, callback = Lit(), qat(mode, start={"step": 3})
    module.lr = 0.01  # type: ignore[assignment]
    trainer(callback, tuner, default_root_dir=tmp_path, max_epochs=1).fit(module, datamodule=Sized())
    assert callback.float_step == 3
    assert callback.quantized is not None


@pytest.mark.parametrize("make", [qat, PostTrainingQuantization])
def test_the_other_package_is_refused_in_one_line(make: Callable[[], Any]) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fitting = other.Trainer(callbacks=[make()], accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(
        ConfigurationError, match=r"^This Trainer comes from pytorch_lightning, .* `import lightning.pytorch as pl`\.$"
    ):
        fitting.fit(Other(), loader())


def test_a_second_callback_that_quantizes_the_same_network_is_refused() -> None:
    class Mine(QuantizationAwareTraining):
        pass

    run = trainer(qat("fx"), Mine(mode="fx"), max_epochs=1)
    with pytest.raises(ConfigurationError, match="'net' already has fake-quantization from QuantizationAwareTraining"):
        run.fit(Lit(), loader())
    assert run.global_step == 0
