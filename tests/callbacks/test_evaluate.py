"""Which variant validate, test and predict run, side effects, and which weights the int8 network has."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.modes.eager.mode import EagerMode
from qat_lightning.modes.prepared import fake_quantizers
from qat_lightning.run.evaluate import evaluate_variants
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import (
    CLASSES,
    MODES,
    Lit,
    Net,
    assert_same_state,
    dataset,
    loader,
    qat,
    ranges,
    state,
    statistics,
    trainer,
)

IMAGES = dataset()[:32][0]


class Snapshot(Callback):
    """Records the outputs of the network before each step."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.outputs[trainer.global_step] = pl_module(IMAGES)
        pl_module.train()


def quiet_loader() -> Any:
    """A loader that does not use the global random generator."""
    return loader(generator=torch.Generator())


class Fitted:
    """A fit with all its parts."""

    def __init__(self, mode: str, **settings: Any) -> None:
        torch.manual_seed(0)
        self.snapshot = Snapshot()
        self.module = Lit()
        self.callback = qat(mode, **{"start": {"step": 5}, "freeze_observers": {"step": 7}} | settings)
        # The snapshot first: it sees the step before fake-quantization is enabled.
        self.trainer = trainer(self.snapshot, self.callback)
        self.trainer.fit(self.module, loader(), loader())

    def outputs(self) -> Tensor:
        """Outputs of ``trainer.predict``."""
        predicted = self.trainer.predict(self.module, loader(32, batch_size=16))
        return torch.cat(predicted)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=MODES)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    return Fitted(request.param)


def test_test_and_predict_run_int8_and_validate_runs_fake_quant(fitted: Fitted) -> None:
    ran: dict[str, Any] = {}

    class Look(Lit):
        def on_validation_epoch_start(self) -> None:
            ran["validate"] = self.net

        def on_test_epoch_start(self) -> None:
            ran["test"] = self.net

        def on_predict_epoch_start(self) -> None:
            ran["predict"] = self.net

    before, fitted.module.__class__ = fitted.module.__class__, Look
    try:
        fitted.trainer.validate(fitted.module, loader(), verbose=False)
        fitted.trainer.test(fitted.module, loader(), verbose=False)
        predicted = fitted.outputs()
    finally:
        fitted.module.__class__ = before
    assert ran["validate"] is fitted.callback.prepared
    for stage in ("test", "predict"):
        assert isinstance(ran[stage], Stand)
        assert ran[stage].__dict__["_network"] is fitted.callback.quantized
    assert isinstance(fitted.callback.quantized, QuantizedNetwork)
    assert torch.equal(predicted, fitted.callback.quantized(IMAGES))
    assert fitted.module.net is fitted.callback.prepared


@pytest.mark.parametrize("variant", ["float", "fake_quant", "int8"])
def test_a_variant_is_used_in_every_stage(fitted: Fitted, variant: str) -> None:
    fitted.callback.use_variant(variant)
    try:
        (test,) = fitted.trainer.test(fitted.module, loader(), verbose=False)
        (validate,) = fitted.trainer.validate(fitted.module, loader(), verbose=False)
        predicted = fitted.outputs()
    finally:
        fitted.callback.use_variant(None)
    assert test["test/loss"] == validate["val/loss"]
    network = fitted.callback.network(variant)
    assert torch.equal(predicted, network(IMAGES))
    assert not network.training


def test_float_is_the_network_as_it_was_when_rounding_came_on(fitted: Fitted) -> None:
    assert torch.equal(fitted.callback.network("float")(IMAGES), fitted.snapshot.outputs[5])
    assert not torch.equal(fitted.callback.network("fake_quant")(IMAGES), fitted.snapshot.outputs[5])


def test_int8_is_close_to_fake_quant(fitted: Fitted) -> None:
    fitted.trainer.test(fitted.module, loader(), verbose=False)
    assert fitted.callback.fidelity["agreement"] == 1.0
    assert fitted.callback.fidelity["sqnr_db"] > 50
    expected, actual = (fitted.callback.network(name)(IMAGES) for name in ("fake_quant", "int8"))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.02 if onednn_is_exact() else 0.1)


def test_evaluating_moves_nothing(fitted: Fitted) -> None:
    """No parameter, range, statistic, flag or random state changes, in any stage and variant."""
    before, phase = state(fitted.module), fitted.callback.phase
    flags = [(fq.fake_quant_enabled, fq.observer_enabled) for _, fq in fake_quantizers(fitted.module)]
    engine, random = torch.backends.quantized.engine, torch.get_rng_state()
    for variant in ("float", "fake_quant", "int8", None):
        fitted.callback.use_variant(variant)
        fitted.trainer.validate(fitted.module, quiet_loader(), verbose=False)
        fitted.trainer.test(fitted.module, quiet_loader(), verbose=False)
        fitted.trainer.predict(fitted.module, quiet_loader())
    assert_same_state(state(fitted.module), before)
    assert fitted.callback.phase == phase
    assert [(fq.fake_quant_enabled, fq.observer_enabled) for _, fq in fake_quantizers(fitted.module)] == flags
    assert torch.backends.quantized.engine == engine
    assert torch.equal(torch.get_rng_state(), random)


def test_nothing_stays_on_the_lightning_module(fitted: Fitted) -> None:
    fitted.trainer.test(fitted.module, loader(), verbose=False)
    assert not fitted.module._load_state_dict_pre_hooks
    assert not [name for name in vars(fitted.module) if callable(vars(fitted.module)[name]) and name[0] != "_"]
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"):
        assert not getattr(fitted.module, hooks)


class Fails(Lit):
    """Its test fails in the second batch."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if batch_idx == 1:
            raise ValueError("no such batch")


@pytest.mark.parametrize("mode", MODES)
def test_a_test_that_fails_leaves_the_prepared_network_in_place(mode: str) -> None:
    module, callback = Fails(), qat(mode)
    fitting = trainer(callback)
    fitting.fit(module, loader())
    prepared, before = module.net, state(module)
    with pytest.raises(ValueError, match="no such batch"):
        fitting.test(module, loader(), verbose=False)
    assert module.net is prepared is callback.prepared
    assert "forward" not in vars(module)
    assert not module._load_state_dict_pre_hooks
    assert_same_state(state(module), before)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert any(not torch.equal(before[k], v) for k, v in state(module).items() if isinstance(v, Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_validating_and_testing_between_fits_changes_no_fit(mode: str) -> None:
    """Two fits with evaluations before, between and during them end like fits without."""
    ended = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        module, callback = Lit(), qat(mode, start=1)
        module.net.drop.p = 0.2
        for _ in range(2):
            if evaluate:
                trainer(callback).validate(module, quiet_loader(), verbose=False)
                trainer(callback).test(module, quiet_loader(), verbose=False)
            validation = quiet_loader() if evaluate else None
            sanity = {"num_sanity_val_steps": 2, "val_check_interval": 2} if evaluate else {}
            trainer(callback, **sanity).fit(module, loader(shuffle=True), validation)
        if evaluate:
            trainer(callback).predict(module, quiet_loader())
        ended.append((state(module), callback.quantized(IMAGES)))
    assert_same_state(ended[0][0], ended[1][0])
    assert torch.equal(ended[0][1], ended[1][1])


BRIGHT = DataLoader(TensorDataset(9.0 * IMAGES, torch.zeros(32, dtype=torch.long)), batch_size=16)
"""Wider than anything that training sees."""


def widest(module: nn.Module) -> float:
    return max(float(fq.max_val) for _, fq in fake_quantizers(module) if fq.source == "moving_average" and fq.seen)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ranges_move_in_the_stages_that_are_asked_for(mode: str) -> None:
    """Only ranges are updated, until they freeze, and never in the sanity check."""
    ends = {}
    for stages in (("train",), ("train", "validate")):
        torch.manual_seed(0)
        module, callback = Lit(), qat(mode, observe_stages=stages, freeze_observers=1)
        fitting = trainer(callback, max_epochs=1)
        fitting.fit(module, loader(), BRIGHT)
        ends[stages] = widest(module), statistics(module)
        assert not any(fq.observe_in_evaluation for _, fq in fake_quantizers(module))
        first = widest(module)
        trainer(callback, max_epochs=2, num_sanity_val_steps=2, limit_val_batches=0.0).fit(module, loader(), BRIGHT)
        before = ranges(module)
        trainer(callback).validate(module, BRIGHT, verbose=False)
        moved = any(not torch.equal(value, before[key]) for key, value in ranges(module).items())
        assert first > 0
        assert moved == (callback.phase.observers and "validate" in stages)
    narrow, wide = ends.values()
    assert wide[0] > 1.5 * narrow[0]
    assert_same_state(wide[1], narrow[1])


@pytest.mark.parametrize("mode", MODES)
def test_ranges_move_in_a_test_of_fake_quant(mode: str) -> None:
    module, callback = Lit(), qat(mode, observe_stages=["train", "test", "predict"])
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    int8, before = callback.quantized, ranges(module)
    fitting.test(module, BRIGHT, verbose=False)  # int8: its ranges are what they are
    fitting.validate(module, BRIGHT, verbose=False)
    assert_same_state(ranges(module), before)
    assert callback.quantized is int8
    callback.use_variant("fake_quant")
    fitting.predict(module, BRIGHT)
    predicted = widest(module)
    fitting.test(module, BRIGHT, verbose=False)
    assert widest(module) > predicted > max(float(value) for value in before.values() if value.isfinite())
    assert not torch.equal(callback.network("int8")(IMAGES), int8(IMAGES))


@pytest.mark.parametrize("stages", ["train", ["validate"], ["train", "sanity"], [1], 3])
def test_stages_that_are_none_are_refused(stages: Any) -> None:
    with pytest.raises(ConfigurationError, match="observe_stages"):
        qat(observe_stages=stages)


@pytest.mark.parametrize("mode", MODES)
def test_a_further_fit_converts_anew(mode: str) -> None:
    fitted = Fitted(mode)
    first = fitted.callback.quantized
    assert "the fit that ended at step 8" in first.source
    trainer(fitted.callback, max_epochs=1).fit(fitted.module, loader())
    assert fitted.callback.quantized is not first
    assert not torch.equal(first(IMAGES), fitted.callback.quantized(IMAGES))
    fitted.trainer.test(fitted.module, loader(), verbose=False)
    assert torch.equal(fitted.callback.network("int8")(IMAGES), fitted.callback.quantized(IMAGES))


@pytest.mark.parametrize("mode", MODES)
def test_the_best_checkpoint_is_tested_as_int8(mode: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", filename="worst-{epoch}")
    module, callback = Lit(lr=0.02), qat(mode)
    fitting = trainer(callback, saving, max_epochs=3, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    last = callback.quantized
    (metrics,) = fitting.test(module, loader(), ckpt_path="best", verbose=False)
    assert callback.quantized is not last
    assert saving.best_model_path in callback.quantized.source
    again = qat(mode)
    (expected,) = trainer(again).test(Lit(), loader(), ckpt_path=saving.best_model_path, verbose=False)
    assert metrics == expected
    saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(module.state_dict()["net.head.weight"], saved["net.head.weight"])


def test_there_is_no_float_variant_without_a_float_phase() -> None:
    module, callback = Lit(), qat(start=0)
    assert callback.variants == ()
    fitting = trainer(callback)
    fitting.fit(module, loader())
    assert callback.variants == ("fake_quant", "int8")
    with pytest.raises(ConfigurationError, match="float_checkpoint"):
        callback.use_variant("float")
    with pytest.raises(ConfigurationError, match="float_checkpoint"):
        callback.network("float")
    callback.use_variant("int8")


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="float, fake_quant, int8"):
        qat().use_variant("int4")


def test_a_variant_chosen_early_that_does_not_come_is_refused_when_tested() -> None:
    module, callback = Lit(), qat(start=0)
    callback.use_variant("float")
    fitting = trainer(callback)
    fitting.fit(module, loader())
    prepared = module.net
    with pytest.raises(ConfigurationError, match="There is no variant 'float' to test"):
        fitting.test(module, loader(), verbose=False)
    assert module.net is prepared


@pytest.mark.parametrize("mode", MODES)
def test_a_float_checkpoint_is_the_float_variant(mode: str, tmp_path: Path) -> None:
    plain = Lit()
    fitting = trainer(max_epochs=1)
    fitting.fit(plain, loader())
    fitting.save_checkpoint(tmp_path / "float.ckpt")
    plain.eval()
    callback = qat(mode, float_checkpoint=str(tmp_path / "float.ckpt"))
    trainer(callback).fit(Lit(), loader())
    assert torch.equal(callback.network("float")(IMAGES), plain(IMAGES))


def test_a_float_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"net.head.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigurationError, match="lacks"):
        trainer(qat(float_checkpoint=str(tmp_path / "other.ckpt"))).fit(Lit(), loader())
    with pytest.raises(ConfigurationError, match="is not a file"):
        qat(float_checkpoint=str(tmp_path / "none.ckpt"))


def test_without_conversion_tests_run_fake_quant() -> None:
    module, callback = Lit(), qat(convert_on_fit_end=False)
    fitting = trainer(callback)
    fitting.fit(module, loader())
    assert callback.quantized is None
    (test,) = fitting.test(module, loader(), verbose=False)
    (validate,) = fitting.validate(module, loader(), verbose=False)
    assert test["test/loss"] == validate["val/loss"]
    assert callback.fidelity == {}
    with pytest.raises(ConfigurationError, match="convert_on_fit_end=False"):
        callback.use_variant("int8")
    with pytest.raises(ConversionError, match="convert_on_fit_end=True"):
        callback.save("nowhere")


def test_testing_what_was_never_fitted_says_so() -> None:
    module, callback = Lit(), qat()
    with pytest.warns(UserWarning, match="no range was observed"):
        trainer(callback).test(module, loader(), verbose=False)


def test_what_is_asked_before_the_fit() -> None:
    callback = qat()
    assert callback.prepared is None
    assert callback.quantized is None
    with pytest.raises(ConfigurationError, match="no example inputs yet"):
        _ = callback.example_inputs_
    with pytest.raises(ConfigurationError, match="nothing was fitted"):
        callback.network("int8")


def _zeroed(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("mode", MODES)
def test_copies_stand_on_their_own(mode: str) -> None:
    """Copies of LightningModule and callback compute the same, and share nothing with the originals."""
    fitted = Fitted(mode)
    expected = fitted.callback.quantized(IMAGES)
    module, callback = copy.deepcopy(fitted.module), copy.deepcopy(fitted.callback)
    fitted.module.eval()
    assert torch.equal(module.eval()(IMAGES), fitted.module(IMAGES))
    assert torch.equal(callback.quantized(IMAGES), expected)
    assert torch.equal(callback.network("float")(IMAGES), fitted.callback.network("float")(IMAGES))
    (metrics,) = fitted.trainer.test(fitted.module, loader(), verbose=False)
    # The copied callback goes on with the original module, with the copied one, and the original callback with that.
    assert trainer(callback).test(fitted.module, loader(), verbose=False) == [metrics]
    assert trainer(callback).test(module, loader(), verbose=False) == [metrics]
    assert trainer(fitted.callback).test(module, loader(), verbose=False) == [metrics]
    trainer(callback, max_epochs=1).fit(module, loader())
    _zeroed(module)
    assert not torch.equal(fitted.module(IMAGES), module(IMAGES))


def test_a_prepared_network_is_not_taken_over_with_other_settings() -> None:
    fitted = Fitted("fx")
    with pytest.raises(ConfigurationError, match=r"backend: 'qnnpack' here, 'x86' there"):
        trainer(qat("fx", backend="qnnpack")).fit(fitted.module, loader())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_callback_serves_one_module_after_another(mode: str) -> None:
    """The second run is like one with a new callback: no reached points, and no float weights remain."""
    callback = qat(mode, start=1)
    trainer(callback).fit(Lit(), loader())
    torch.manual_seed(1)
    second = Lit()
    trainer(callback, max_epochs=1).fit(second, loader())
    assert callback.prepared is second.net
    assert not callback.phase.fake_quant
    assert "float" not in callback.variants
    torch.manual_seed(1)
    alone = Lit()
    trainer(qat(mode, start=1), max_epochs=1).fit(alone, loader())
    assert_same_state(state(second), state(alone))


class MonteCarlo(Lit):
    """Measures in a test how far outputs with dropout are apart."""

    def __init__(self) -> None:
        super().__init__(Net(dropout=0.5))
        self.spread: list[float] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        for part in self.net.modules():
            if isinstance(part, nn.Dropout):
                part.train()
        self.spread.append(float(torch.stack([self(batch[0]) for _ in range(4)]).var(0).mean()))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_a_test_is_that_of_fake_quant(mode: str) -> None:
    """Int8 networks have none."""
    module, callback = MonteCarlo(), qat(mode)
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    for variant in ("int8", "fake_quant"):
        callback.use_variant(variant)
        module.spread.clear()
        run.test(module, loader(), verbose=False)
        assert (min(module.spread) > 0) == (variant == "fake_quant")


class Ensemble(Lit):
    """Two networks whose scores are added."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_several_networks_are_tested_together(mode: str) -> None:
    module, callback = Ensemble(), qat(mode, module=["net", "other"], start=1)
    fitting = trainer(callback)
    fitting.fit(module, loader(), loader())
    assert set(callback.prepared) == set(callback.quantized) == {"net", "other"}
    fitting.test(module, loader(), verbose=False)
    predicted = torch.cat(fitting.predict(module, loader(32, batch_size=16)))  # type: ignore[arg-type]
    assert torch.equal(predicted, callback.quantized["net"](IMAGES) + callback.quantized["other"](IMAGES))
    assert module.other is callback.prepared["other"]
    with pytest.raises(ConversionError, match=r"qat\.quantized\['name'\]\.save"):
        callback.save("nowhere")


class OnlyOneInTraining(Ensemble):
    """The other network is used in evaluations only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_network_that_training_never_runs_stays_float(mode: str) -> None:
    module = OnlyOneInTraining()
    callback = qat(mode, module=["net", "other"], example_inputs={"net": IMAGES, "other": IMAGES})
    before = state(module.other)
    fitting = trainer(callback)
    with pytest.warns(UserWarning, match="'other' stayed float: training never ran it"):
        fitting.fit(module, loader())
    assert set(callback.quantized) == {"net"}
    predicted = torch.cat(fitting.predict(module, loader(32, batch_size=16)))  # type: ignore[arg-type]
    plain = Ensemble().other
    plain.load_state_dict(before)
    with torch.no_grad():
        torch.testing.assert_close(predicted, callback.quantized["net"](IMAGES) + plain.eval()(IMAGES))
    assert module.other is callback.prepared["other"]


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_the_global_engine_is_as_it_was(mode: str, tmp_path: Path) -> None:
    """Tests, saving and loading after a fit, for another LightningModule."""
    engine = torch.backends.quantized.engine
    other = "qnnpack" if engine != "qnnpack" else "fbgemm"
    module, callback = Lit(), qat(mode, backend=other)
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    fitting.test(module, loader(), verbose=False)
    callback.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8", Net())(IMAGES), callback.quantized(IMAGES))
    assert torch.backends.quantized.engine == engine


def test_the_int8_network_is_of_the_weights_that_were_loaded_last(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    callback, module = qat("eager"), Lit()
    run = trainer(callback, saving, max_epochs=3, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    last = callback.quantized(IMAGES)
    run.validate(module, loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), verbose=False)
    found = callback.quantized
    assert found.source == f"checkpoint {tmp_path / 'epoch=1.ckpt'}"
    assert not torch.equal(found(IMAGES), last)
    assert torch.equal(found(IMAGES), callback.convert()(IMAGES))


def test_a_conversion_that_fails_leaves_no_network_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, module = qat("eager"), Lit()
    run = trainer(callback, max_epochs=2)
    run.fit(module, loader(), loader())
    assert callback.quantized is not None

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConversionError("no kernel on this day")

    monkeypatch.setattr(EagerMode, "convert", fails)
    run.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match="no kernel on this day"):
        run.fit(module, loader(), loader())
    assert callback.quantized is None
    with pytest.raises(ConversionError, match=r"to save: ConversionError: .*no kernel on this day"):
        callback.save(tmp_path / "a.int8")
    assert not (tmp_path / "a.int8").exists()


def test_the_table_of_what_is_int8_names_layers_as_settings_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overrides = {"net.head": {"weight_bits": 4}}
    module, callback = Lit(), qat("fx", scheme=Scheme(overrides=overrides))
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    evaluate_variants(run, module, dataloaders=loader())
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"int8 Conv2d 1 [\d.]+% net\.features\.0", shown)
    assert re.search(r"int8 \(int4 weights\) Linear 1 [\d.]+% net\.head", shown)
