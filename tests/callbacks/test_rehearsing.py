"""A rehearsal in a fit: what it finds before training, what checkpoints store, and that it never fails a fit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from lightning.pytorch import Callback
from torch import Tensor, nn

import qat_lightning.rehearsal.auto as decision_module
from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, QuantizedModelExport, load_quantized
from qat_lightning.callbacks.parts.calibration_source import CalibrationSource
from qat_lightning.errors import ConfigurationError, ConversionError, QuantizationError
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, loader, qat, state, trainer


class Kernels:
    """The kernel of the last linear layer, optionally halving its outputs."""

    wrong = False


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Kernels]]:
    plain = nnq.Linear.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        y = plain(self, x)
        if not Kernels.wrong:
            return y
        return torch.quantize_per_tensor(y.dequantize() / 2, y.q_scale(), y.q_zero_point(), y.dtype)

    monkeypatch.setattr(nnq.Linear, "forward", forward)
    Kernels.wrong = False
    yield Kernels
    Kernels.wrong = False


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rehearsed modes."""
    seen: list[str] = []
    plain = decision_module.rehearse

    def rehearse(network: nn.Module, example: Any, recipe: Any, **settings: Any) -> Any:
        seen.append(recipe.mode)
        return plain(network, example, recipe, **settings)

    monkeypatch.setattr(decision_module, "rehearse", rehearse)
    return seen


def _float(callback: Any) -> list[str]:
    return [row.name for row in callback.quantized.coverage if not row.quantized]


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_without_faults_is_bit_equal_with_and_without_a_rehearsal(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    states = []
    for rehearse in (True, False):
        torch.manual_seed(1)
        module = Lit(Net(dropout=0.3))
        trainer(qat(mode, rehearse=rehearse), max_epochs=1).fit(module, loader(shuffle=True))
        states.append(state(module))
    assert_same_state(*states)


def test_a_fault_is_known_before_the_first_step_and_costs_its_layer_only(kernels: type[Kernels]) -> None:
    kernels.wrong = True
    module, callback = Lit(), qat("fx")
    with pytest.warns(UserWarning, match=r"1 of 2 layers will stay float: net\.head \(Linear\): in int8 it differs"):
        trainer(callback, max_epochs=1).fit(module, loader())
    assert _float(callback) == ["head"]
    assert prepared_state(callback.prepared).left_float.keys() == {"head"}
    trainer(callback).test(module, loader(), verbose=False)
    assert callback.fidelity["sqnr_db"] > 40


def test_a_fault_is_refused_before_the_first_step_where_that_is_asked_for(kernels: type[Kernels]) -> None:
    kernels.wrong = True
    module = Lit()
    run = trainer(qat("fx", on_fault="error"), max_epochs=1)
    with pytest.raises(ConversionError, match=r"net\.head: in int8 it differs.*tried on this network"):
        run.fit(module, loader())
    assert run.global_step == 0
    assert isinstance(module.net, Net)  # nothing was replaced


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fault_that_comes_with_the_trained_values_is_left_float_in_both_networks(
    mode: str, kernels: type[Kernels]
) -> None:
    module, callback = Lit(), qat(mode)
    run = trainer(callback, max_epochs=1)

    class Later(Callback):
        def on_train_end(self, *args: Any) -> None:
            kernels.wrong = True

    run.callbacks.append(Later())
    with pytest.warns(UserWarning, match=r"1 of 2 layers stayed float: net\.head \(Linear\)"):
        run.fit(module, loader())
    assert _float(callback) == ["head"]
    x = next(iter(loader()))[0]
    with torch.no_grad():
        assert sqnr_db(callback.network("fake_quant")(x), callback.quantized(x)) > 40


def test_what_nothing_can_convert_costs_no_fit_and_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Lit(), qat("fx", rehearse=False)
    monkeypatch.setattr(type(get_mode("fx")), "convert", lambda *args: 1 / 0)
    run = trainer(callback, max_epochs=1)
    with pytest.warns(UserWarning, match="There is no int8 network of the fit that ended at step"):
        run.fit(module, loader())
    assert callback.quantized is None
    assert callback.variants == ("fake_quant",)
    assert run.test(module, loader(), verbose=False)
    with pytest.raises(ConfigurationError, match="ZeroDivisionError"):
        callback.use_variant("int8")
    monkeypatch.undo()
    assert callback.convert() is callback.quantized is not None
    assert "int8" in callback.variants


@pytest.mark.parametrize("mode", ["fx", "auto"])
def test_a_resumed_fit_takes_what_was_decided_from_its_checkpoint(
    mode: str, tmp_path: Path, kernels: type[Kernels], rehearsals: list[str]
) -> None:
    kernels.wrong = True
    first = qat("eager" if mode == "auto" else mode)
    run = trainer(first, max_epochs=1)
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    kernels.wrong = False
    rehearsals.clear()
    module, again = Lit(), qat(mode)
    trainer(again, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert rehearsals == []
    assert prepared_state(again.prepared).recipe.mode == ("eager" if mode == "auto" else mode)
    assert _float(again) == ["head"]


def test_post_training_keeps_what_was_decided_in_the_checkpoints_of_its_fit(
    tmp_path: Path, kernels: type[Kernels], rehearsals: list[str]
) -> None:
    kernels.wrong = True
    first = PostTrainingQuantization(mode="fx")
    run = trainer(first, max_epochs=1)
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    kernels.wrong = False
    rehearsals.clear()
    again = PostTrainingQuantization(mode="fx")
    trainer(again, max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert rehearsals == []
    assert _float(again) == _float(first) == ["head"]


@pytest.mark.parametrize(
    "stage", ["test", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("validate", "predict"))]
)
def test_without_a_fit_a_network_is_rehearsed_before_it_is_calibrated(
    stage: str, kernels: type[Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures after calibration and its recipes are found before them, or the layers stay float."""
    calibrations: list[tuple[int, Any]] = []
    plain = CalibrationSource.calibrate
    monkeypatch.setattr(
        CalibrationSource,
        "calibrate",
        lambda self, *args, **kwargs: calibrations.append(plain(self, *args, **kwargs)) or calibrations[-1],
    )
    kernels.wrong = True
    ptq = PostTrainingQuantization(calibration_dataloader=loader(), on_fault="error")
    with pytest.raises(ConversionError, match="1 parts of Net cannot be int8"):
        getattr(trainer(ptq), stage)(Lit(), loader())
    assert calibrations == []
    ptq = PostTrainingQuantization(calibration_dataloader=loader())
    run = trainer(ptq)
    getattr(run, stage)(Lit(), loader())
    assert [batches for batches, _ in calibrations] == [4]
    assert ptq.convert() is ptq.quantized
    assert _float(ptq) == ["head"]


@pytest.mark.slow
def test_without_a_fit_formats_are_tried_before_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        QuantizedModelExport, "on_rehearsal", lambda *args: said.append("formats") or ["a format takes half of it"]
    )
    plain = CalibrationSource.calibrate
    monkeypatch.setattr(
        CalibrationSource,
        "calibrate",
        lambda self, *args, **kwargs: said.append("calibration") or plain(self, *args, **kwargs),
    )
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path))
    run = trainer(PostTrainingQuantization(calibration_dataloader=loader()), export)
    with pytest.warns(UserWarning, match="a format takes half of it"):
        run.test(Lit(), loader(), verbose=False)
    assert said == ["formats", "calibration"]
    assert export.results["torchscript"].passed


@pytest.mark.parametrize("source", ["ckpt_path", "float_checkpoint"])
def test_a_rehearsal_has_the_weights_that_are_known(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module = trainer(max_epochs=1), Lit()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    wanted = module.net.head.weight.detach().clone()
    seen: list[Tensor] = []
    plain = decision_module.rehearse

    def rehearse(network: Any, *args: Any, **settings: Any) -> Any:
        seen.append(network.head.weight.detach().clone())
        return plain(network, *args, **settings)

    monkeypatch.setattr(decision_module, "rehearse", rehearse)
    settings = {"float_checkpoint": tmp_path / "float.ckpt"} if source == "float_checkpoint" else {}
    ckpt = tmp_path / "float.ckpt" if source == "ckpt_path" else None
    trainer(qat("fx", **settings), max_epochs=2).fit(Lit(), loader(), ckpt_path=ckpt)
    (found,) = seen
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_the_copy_of_a_rehearsal_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    flow = type(get_mode("fx"))
    plain = flow.prepare

    def prepare(self: Any, network: nn.Module, *args: Any, **settings: Any) -> Any:
        prepared = plain(self, network, *args, **settings)
        copies.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(flow, "prepare", prepare)
    callback = qat("fx")
    trainer(callback, max_epochs=1).fit(Lit(), loader())
    gc.collect()
    assert [copy() is not None for copy in copies] == [False, True]


@pytest.mark.slow
def test_formats_are_tried_before_the_training(tmp_path: Path) -> None:
    said: list[str] = []
    export = QuantizedModelExport(["torchscript"], dirpath=str(tmp_path))
    plain = export.on_rehearsal

    def on_rehearsal(run: Any, slot: str, quantized: Any, reference: Any) -> list[str]:
        said.append(f"{slot} at step {run.global_step}")
        return plain(run, slot, quantized, reference)

    export.on_rehearsal = on_rehearsal  # type: ignore[method-assign]
    trainer(qat("fx"), export, max_epochs=1).fit(Lit(), loader())
    assert said == ["net at step 0"]
    assert export.results["torchscript"].passed


@pytest.mark.nightly
def test_what_a_runtime_will_run_in_float_is_said_before_the_training(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    module = Lit(net=nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 10)))
    export = QuantizedModelExport(["onnx"], dirpath=str(tmp_path))
    with pytest.warns(UserWarning, match="runs 1 of 2 layers in float.*mode='fx'"):
        trainer(qat("pt2e"), export, max_epochs=1).fit(module, loader())


def test_converting_again_leaves_more_float() -> None:
    module, callback = Lit(), qat("fx")
    trainer(callback, max_epochs=1).fit(module, loader())
    assert _float(callback) == []
    assert callback.convert(exclude=["net.features*"]) is callback.quantized
    assert _float(callback) == ["features.0"]
    assert callback.quantized.recipe.left_float == (("net.features.0", "excluded"),)
    with pytest.raises(ConfigurationError, match="matches no int8 layer"):
        callback.convert(exclude=["net.features*"])


def test_converting_again_takes_the_present_weights(tmp_path: Path) -> None:
    module, callback = Lit(), qat("fx")
    trainer(callback, max_epochs=1).fit(module, loader())
    x = next(iter(loader()))[0]
    before = callback.quantized(x)
    with torch.no_grad():
        callback.prepared.head.bias.add_(1.0)
    assert not torch.equal(callback.convert()(x), before)
    callback.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8")(x), callback.quantized(x))


def test_there_is_nothing_to_convert_before_a_fit() -> None:
    with pytest.raises(ConversionError, match=r"run trainer\.fit"):
        QuantizationAwareTraining().convert()


@pytest.mark.parametrize("setting", [{"on_fault": "ignore"}, {"rehearse": "yes"}, {"on_fault": None}])
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    for callback in (QuantizationAwareTraining, PostTrainingQuantization):
        with pytest.raises(QuantizationError):
            callback(**setting)
