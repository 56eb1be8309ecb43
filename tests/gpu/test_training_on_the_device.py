"""Fits on a GPU with int8 networks on the CPU; with ``--device cpu`` everything runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, QuantizationMonitor, load_quantized
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, dataset, loader, qat, trainer
from tests.callbacks.test_compile import assert_alike
from tests.callbacks.test_resume import STEPS, end, every_step, fit
from tests.callbacks.two_processes import read_both, run_two

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
IMAGES = dataset()[:64][0]
SCHEDULE: dict[str, Any] = {"start": {"step": 2}, "freeze_observers": {"step": 20}, "freeze_batchnorm": {"step": 20}}


def trained(
    callback: Any, accelerator: str, *others: Any, make: Callable[[], Lit] = Lit, **settings: Any
) -> tuple[Any, Lit]:
    """A Trainer that has fitted a module for 8 epochs of 4 batches, with the module."""
    torch.manual_seed(0)
    module = make()
    fitting = trainer(callback, *others, accelerator=accelerator, **{"max_epochs": 8} | settings)
    fitting.fit(module, loader())
    return fitting, module


def assert_int8_on_the_cpu_is_what_was_trained(
    fitting: Any, module: Lit, callback: Any, least_db: float = 30.0
) -> None:
    """Int8 on the CPU has learned the task, and agrees with fake-quant on the device."""
    int8 = callback.quantized
    assert {tensor.device.type for tensor in int8.state_dict().values() if isinstance(tensor, Tensor)} <= {"cpu"}
    assert fitting.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    callback.use_variant("fake_quant")
    trained = torch.cat(fitting.predict(module, loader())).float()
    assert sqnr_db(trained, int8(IMAGES)) > least_db


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
def test_int8_agrees_with_what_was_trained(mode: str, precision: str, accelerator: str, tmp_path: Path) -> None:
    callback = qat(mode, **SCHEDULE)
    fitting, module = trained(callback, accelerator, precision=precision)
    assert_int8_on_the_cpu_is_what_was_trained(fitting, module, callback)
    callback.save(tmp_path / "model.int8")
    assert torch.equal(load_quantized(tmp_path / "model.int8", network=Net())(IMAGES), callback.quantized(IMAGES))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_bit_by_bit_where_the_whole_one_ends(
    mode: str, precision: str, accelerator: str, tmp_path: Path
) -> None:
    """From a checkpoint within an epoch, with fake-quantization enabled and ranges not frozen."""
    settings = {"accelerator": accelerator, "precision": precision, "enable_checkpointing": True, "deterministic": True}
    whole = end(fit(mode, every_step(tmp_path), **settings))
    resumed = fit(mode, ckpt_path=tmp_path / "step=5.ckpt", seed=1, **settings | {"enable_checkpointing": False})
    assert_same_state(whole, end(resumed))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_the_device_goes_on_on_the_cpu(mode: str, accelerator: str, tmp_path: Path) -> None:
    fit(mode, every_step(tmp_path), accelerator=accelerator, enable_checkpointing=True)
    fitting, _, callback = fit(mode, ckpt_path=tmp_path / "step=5.ckpt")
    assert fitting.global_step == STEPS
    assert callback.quantized(IMAGES).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_networks_in_channels_last(mode: str, accelerator: str) -> None:
    def make() -> Lit:
        module = Lit()
        module.net.to(memory_format=torch.channels_last)
        return module

    callback = qat(mode, **SCHEDULE)
    fitting, module = trained(callback, accelerator, make=make)
    assert_int8_on_the_cpu_is_what_was_trained(fitting, module, callback)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_train_as_plain_ones(mode: str, accelerator: str) -> None:
    """With the device's code generator, over every switch of the schedule."""
    schedule = {"start": {"step": 1}, "freeze_observers": {"step": 3}, "freeze_batchnorm": {"step": 5}}
    networks = []
    for compiled in (False, True):
        callback = qat(mode, compile=compiled, **schedule)
        _, module = trained(callback, accelerator, make=lambda: Lit(lr=0.01), max_epochs=2)
        networks.append((module.cpu(), callback.quantized(IMAGES)))
    (plain, expected), (module, int8) = networks
    assert_alike(plain, module, tolerance=5e-3)
    torch.testing.assert_close(int8, expected, rtol=0.0, atol=0.05)


@pytest.mark.parametrize("scheme", [Scheme(learned_step="lsq"), Scheme(weight_bits=4)], ids=["lsq", "4 bits"])
@pytest.mark.parametrize("mode", MODES)
def test_other_schemes(mode: str, scheme: Scheme, accelerator: str) -> None:
    callback = qat(mode, scheme=scheme, **SCHEDULE)
    fitting, module = trained(callback, accelerator)
    assert_int8_on_the_cpu_is_what_was_trained(fitting, module, callback)


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("mode", MODES)
def test_kinds_without_calibration(mode: str, kind: Any, accelerator: str) -> None:
    callback = QuantizationAwareTraining(mode=mode, kind=kind, start={"step": 2})
    fitting, module = trained(callback, accelerator)
    assert_int8_on_the_cpu_is_what_was_trained(fitting, module, callback)


@pytest.mark.parametrize("mode", MODES)
def test_static_quantization_is_calibrated_on_the_device(mode: str, accelerator: str) -> None:
    callback = PostTrainingQuantization(mode=mode)
    fitting, module = trained(callback, accelerator)
    assert_int8_on_the_cpu_is_what_was_trained(fitting, module, callback)


def test_the_monitor_measures_on_the_device(accelerator: str) -> None:
    monitor = QuantizationMonitor(every_n_steps=1)
    trained(qat(**SCHEDULE), accelerator, monitor, max_epochs=1)
    assert {"features.0", "head"} <= {row.layer for row in monitor.layers}


def test_two_ranks_end_alike(accelerator: str, tmp_path: Path) -> None:
    """With NCCL and BatchNorm over both processes; with ``--device cpu`` on gloo."""
    if accelerator == "gpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = read_both(run_two("tests.gpu.two_ranks", tmp_path, accelerator))
    assert first == second
    for found in first.values():
        assert found["steps"] == 8
        assert found["communication"] == ("nccl" if accelerator == "gpu" else "gloo")
