"""Post-training quantization: what it does not change, when it quantizes, and which variant runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from qat_lightning import (
    AdaRound,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Scheme,
    evaluate_variants,
    load_quantized,
)
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.errors import ConfigurationError, ConversionError, NetworkError
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, loader, state, trainer


class Data(LightningDataModule):
    """Data that is available only after ``setup`` of its stage."""

    def setup(self, stage: str) -> None:
        setattr(self, stage, loader())

    def train_dataloader(self) -> Any:
        return self.fit

    def test_dataloader(self) -> Any:
        return self.test


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def _fit(mode: str, **settings: Any) -> tuple[Lit, PostTrainingQuantization, Any]:
    torch.manual_seed(0)
    module, ptq = Lit(), PostTrainingQuantization(mode=mode, **settings)
    run = trainer(ptq)
    run.fit(module, loader(), loader())
    return module, ptq, run


def test_a_fit_ends_in_int8_and_is_a_float_fit(mode: str) -> None:
    module, ptq, run = _fit(mode)
    torch.manual_seed(0)
    alone = Lit()
    trainer().fit(alone, loader(), loader())
    assert_same_state(state(alone), state(module))
    assert type(module.net) is type(alone.net)
    results = run.test(module, loader(), verbose=False)
    assert results[0]["test/acc"] > 0.9
    assert ptq.fidelity["agreement"] >= 0.995
    assert ptq.quantized.recipe.kind == "static"
    assert sum(row.quantized for row in ptq.quantized.coverage) == 2
    assert_same_state(state(alone), state(module))


def test_without_a_fit_the_training_data_of_a_datamodule_calibrates(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = ModelCheckpoint(tmp_path)
    float_run, module = trainer(saved, enable_checkpointing=True), Lit()
    float_run.fit(module, loader())
    ptq = PostTrainingQuantization(mode=mode, calibration_batches=2)
    results = trainer(ptq).test(Lit(), datamodule=Data(), ckpt_path=saved.best_model_path, verbose=False)
    assert results[0]["test/acc"] > 0.9
    assert ptq.quantized.source == f"checkpoint {saved.best_model_path}"
    batches = [int(fq.batches) for _, fq in fake_quantizers(ptq.prepared) if fq.observed and fq.seen]
    assert batches
    assert set(batches) == {2}


def test_other_weights_are_quantized_anew_and_the_same_are_not(mode: str) -> None:
    module, ptq, run = _fit(mode, calibration_dataloader=loader())
    before = ptq.quantized
    run.test(module, loader(), verbose=False)
    assert ptq.quantized is before
    with torch.no_grad():
        module.net.head.bias[0] += 100.0
    results = run.test(module, loader(), verbose=False)
    assert ptq.quantized is not before
    assert results[0]["test/acc"] == 0.25


def test_each_variant_runs_where_it_should() -> None:
    module, ptq, run = _fit("fx")
    ran: dict[str, Any] = {}

    def look(stage: str, module: Any) -> None:
        ran[stage] = module.net

    for stage in ("validation", "test"):
        step = getattr(Lit, f"{stage}_step")
        setattr(
            module, f"{stage}_step", lambda *args, stage=stage, step=step: (look(stage, module), step(module, *args))[1]
        )
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    assert ran["validation"].__dict__["_network"] is ptq.prepared
    assert ran["test"].__dict__["_network"] is ptq.quantized
    ptq.use_variant("float")
    run.test(module, loader(), verbose=False)
    assert not isinstance(ran["test"], Stand)
    assert not isinstance(module.net, Stand)


def test_validating_during_the_fit_runs_float() -> None:
    seen = []

    class Watched(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(type(self.net))

    module = Watched()
    trainer(PostTrainingQuantization()).fit(module, loader(), loader())
    assert set(seen) == {type(Lit().net)}


def test_metrics_and_logs_of_the_training_are_not_moved_by_calibration() -> None:
    class Counting(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            self.accuracy(scores, batch[1])
            self.log("train/acc", self.accuracy, on_epoch=True)
            return F.cross_entropy(scores, batch[1])

    counts = []
    for callbacks in ([], [PostTrainingQuantization()]):
        torch.manual_seed(0)
        module, run = Counting(), trainer(*callbacks)
        run.fit(module, loader())
        counts.append((module.accuracy._update_count, run.callback_metrics["train/acc_epoch"].item()))
    assert counts[0] == counts[1]


def test_manual_optimization_is_broken_off_before_its_optimizers_step() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    module, ptq = Manual(), PostTrainingQuantization()
    run = trainer(ptq, max_epochs=3)
    run.fit(module, loader(), loader())
    steps = run.global_step
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert run.global_step == steps


def test_own_forward_and_several_networks() -> None:
    class Own(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 4)
            del self.net

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.stem(x)).flatten(1))

    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.net(x))

    for module, named, quantized in ((Own(), None, 1), (Two(), ["net", "second"], 2)):
        ptq = PostTrainingQuantization(module=named)
        run = trainer(ptq, max_epochs=4)
        run.fit(module, loader())
        assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
        assert (len(ptq.quantized) if quantized > 1 else 1) == quantized
        assert all(not isinstance(inner, Stand) for inner in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["min_max", "moving_average", "histogram_kl", "percentile"])
def test_every_observer_reaches_the_accuracy(observer: Any) -> None:
    module, ptq, run = _fit("fx", scheme=Scheme(activation_observer=observer))
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert {fq.source for _, fq in fake_quantizers(ptq.prepared)} == {observer, "present"}


def test_a_simulated_scheme_tests_fake_quant_and_says_so() -> None:
    with pytest.warns(UserWarning, match="There is no int8 network: int8 kernels support activations of 8 bits"):
        module, ptq, run = _fit("fx", scheme=Scheme(activation_bits=6))
    assert ptq.variants == ("float", "fake_quant")
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.8
    with pytest.raises(ConfigurationError, match="support activations of 8 bits"):
        ptq.use_variant("int8")


def test_variants_are_compared_in_one_table() -> None:
    module, ptq, run = _fit("fx")
    summary = evaluate_variants(run, module, dataloaders=loader())
    assert {"float/test/acc", "fake_quant/test/acc", "int8/test/acc", "size_ratio", "speedup"} <= set(summary)
    assert summary["size_ratio"] > 1.5
    assert ptq.chosen_variant is None


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    module = Lit()
    with pytest.raises(ConfigurationError, match="calibration_dataloader="):
        trainer(PostTrainingQuantization()).test(module, loader(), verbose=False)
    with pytest.raises(ConfigurationError, match="calibration_batches=0"):
        PostTrainingQuantization(calibration_batches=0)
    with pytest.raises(ConfigurationError, match="kind='statisch' is unknown"):
        PostTrainingQuantization(kind="statisch")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="learned_step='lsq' needs fixed activation ranges and training"):
        PostTrainingQuantization(scheme=Scheme(learned_step="lsq"))
    with pytest.raises(ConfigurationError, match="is for calibration"):
        QuantizationAwareTraining(scheme=Scheme(activation_observer="histogram_kl"))
    with pytest.raises(ConversionError, match="no finite activation"):
        trainer(PostTrainingQuantization(calibration_dataloader=[])).test(module, loader(), verbose=False)


def test_a_network_that_cannot_be_quantized_does_not_cost_a_training() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, run = Plain(), trainer(PostTrainingQuantization(exclude=["net*"]))
    with pytest.raises((ConfigurationError, NetworkError), match="exclude"):
        run.fit(module, loader())
    assert run.global_step == 0


def test_after_quantization_aware_training_it_is_refused() -> None:
    module = Lit()
    trainer(QuantizationAwareTraining()).fit(module, loader())
    with pytest.raises(ConfigurationError, match="already has fake-quantization"):
        trainer(PostTrainingQuantization(calibration_dataloader=loader())).test(module, loader(), verbose=False)


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_kinds_without_calibration_need_only_test_data(mode: str, kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = ModelCheckpoint(tmp_path)
    trainer(saved, enable_checkpointing=True).fit(Lit(), loader())
    ptq = PostTrainingQuantization(mode=mode, kind=kind)
    run, module = trainer(ptq), Lit()
    results = run.test(module, loader(), ckpt_path=saved.best_model_path, verbose=False)
    assert results[0]["test/acc"] > 0.9
    assert ptq.variants == ("float", "int8")
    assert ptq.quantized.recipe.kind == kind
    assert any(row.quantized for row in ptq.quantized.coverage if row.name == "head")
    assert ptq.fidelity["agreement"] >= 0.98
    assert run.validate(module, loader(), verbose=False)[0]["val/acc"] == results[0]["test/acc"]
    with pytest.raises(ConfigurationError, match=f"kind='{kind}' has none"):
        ptq.use_variant("fake_quant")
    path = tmp_path / "int8"
    ptq.save(path)
    x = loader().dataset[:4][0]
    again = load_quantized(path, network=Lit().net if mode == "eager" else None)
    assert torch.equal(again(x), ptq.quantized(x))


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_auto_takes_a_mode_that_works(kind: Any) -> None:
    _, ptq, _ = _fit("auto", kind=kind)
    assert ptq.quantized.recipe.mode == "fx"
    assert ptq.quantized.recipe.kind == kind


def test_a_kind_that_the_pair_has_not_is_refused_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="use kind='dynamic' or kind='static', or backend='x86'"):
        PostTrainingQuantization(mode="pt2e", backend="xnnpack", kind="weight_only")


class Surrounded(Lit):
    """Layers before and after the network, and tensors created in a step, in the training's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.net(self.before(x)) + torch.ones(CLASSES))


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize(
    "precision",
    ["bf16-true", "bf16-mixed", *(pytest.param(one, marks=pytest.mark.slow) for one in ("16-true", "64-true"))],
)
def test_every_precision_of_training_is_quantized(precision: Any, kind: Any) -> None:
    """Quantizes float32 copies, whose inputs and outputs are cast to the surrounding precision."""
    torch.manual_seed(0)
    module, ptq = Surrounded(), PostTrainingQuantization(kind=kind, module="net")
    run = trainer(ptq, precision=precision, max_epochs=6)
    run.fit(module, loader(), loader())
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert ptq.fidelity["agreement"] > 0.95
    assert run.validate(module, loader(), verbose=False)[0]["val/acc"] > 0.9
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert {p.dtype for p in module.parameters()} == {wanted.get(precision, torch.float32)}
    if kind == "static":
        assert {p.dtype for p in ptq.network("fake_quant").parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [PostTrainingQuantization, QuantizationAwareTraining])
def test_int8_runs_between_layers_of_another_precision(make: Any) -> None:
    torch.manual_seed(0)
    module, callback = Surrounded(), make(module="net")
    run = trainer(callback, precision="bf16-true", max_epochs=6)
    run.fit(module, loader(), loader())
    found = run.predict(module, loader())
    assert {scores.dtype for scores in found} == {torch.bfloat16}
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9


def test_recipes_of_a_calibration_learn_in_float32() -> None:
    torch.manual_seed(0)
    ptq = PostTrainingQuantization(adaround=AdaRound(iterations=20), bias_correction=True, sequential_mse=True)
    run, module = trainer(ptq, precision="bf16-true", max_epochs=6), Lit()
    run.fit(module, loader())
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert ptq.fidelity["agreement"] > 0.95


@pytest.mark.parametrize(
    ("other", "holds"),
    [({}, True), ({"backend": "fbgemm"}, False), ({"scheme": Scheme(weight_bits=4)}, False), ({"mode": "fx"}, False)],
    ids=["the same settings", "another backend", "another scheme", "another mode"],
)
def test_a_decision_of_a_checkpoint_holds_for_the_same_settings_only(
    other: dict[str, Any], holds: bool, tmp_path: Path
) -> None:
    """What the rehearsal of other settings left float, and the mode that it chose, are of these settings."""
    settings = {"mode": "eager", "backend": "onednn", "calibration_batches": 2}
    saved = ModelCheckpoint(tmp_path)
    first = PostTrainingQuantization(**settings)
    run = trainer(first, saved, enable_checkpointing=True)
    run.fit(Lit(), loader(), loader())
    path = saved.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    (state_key,) = [key for key in checkpoint["callbacks"] if "PostTraining" in key]
    checkpoint["callbacks"][state_key]["net"]["left_float"] = {"head": "it could not be int8"}
    torch.save(checkpoint, path)
    ptq = PostTrainingQuantization(**settings | other)
    trainer(ptq).test(Lit(), datamodule=Data(), ckpt_path=path, verbose=False)
    assert ptq.chosen_modes == {"net": other.get("mode", "eager")}
    assert [row.name for row in ptq.quantized.coverage if not row.quantized] == (["head"] if holds else [])


def test_after_a_validation_alone_save_converts_what_it_calibrated(tmp_path: Path) -> None:
    module, ptq = Lit(), PostTrainingQuantization(calibration_batches=2, calibration_dataloader=loader())
    with pytest.raises(
        ConversionError, match=r"run trainer\.test, trainer\.predict or trainer\.fit with this callback"
    ):
        ptq.save(tmp_path / "model.int8")
    trainer(ptq).validate(module, loader(), verbose=False)
    ptq.save(tmp_path / "model.int8")
    assert load_quantized(tmp_path / "model.int8").recipe.kind == "static"
