"""Observers `percentile` and `histogram_mse` in training: fits, resume, compiled, two processes, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import QuantizationAwareTraining, Scheme
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.ddp_chosen_ranges import BATCH, observer
from tests.callbacks.lit import MODES, Lit, assert_same_state, dataset, loader, qat, ranges, state, trainer
from tests.callbacks.test_compile import assert_alike, fitted, graphs  # noqa: F401 (a fixture)
from tests.callbacks.two_processes import read_both, run_two

OBSERVERS = ["histogram_mse", "percentile"]
IMAGES = dataset()[:32][0]


def scheme(observer: Any) -> Scheme:
    return Scheme(activation_observer=observer, activation_percentile=99.0)


def fit(
    mode: str, observer: Any, *callbacks: Any, seed: int = 0, ckpt_path: Path | None = None, **settings: Any
) -> Any:
    seed_everything(seed, verbose=False)
    callback = qat(mode, scheme=scheme(observer), start={"step": 2}, freeze_observers={"step": 6})
    module = Lit()
    fitting = trainer(callback, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks), **settings)
    data = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
    fitting.fit(module, data, loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return module, callback


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_freezes_its_ranges_and_resumes_bit_by_bit(mode: str, observer: str, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, callback = fit(mode, observer, steps)
    found = {"histogram_mse": "batch_mse", "percentile": "batch_percentile"}[observer]
    quantizers = [fq for _, fq in fake_quantizers(module) if fq.observed]
    assert {fq.source for fq in quantizers} == {found}
    assert {int(fq.batches) for fq in quantizers} == {6}, "until they froze"
    for step in (1, 5):
        resumed, again = fit(mode, observer, seed=7, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_state(state(resumed), state(module))
        assert torch.equal(again.quantized(IMAGES), callback.quantized(IMAGES))


@pytest.mark.nightly
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_choose_the_same_ranges(mode: str, observer: str, graphs: Any) -> None:  # noqa: F811
    _, expected = fitted(mode, Lit, compile=False, scheme=scheme(observer))
    _, module = fitted(mode, Lit, compile=True, scheme=scheme(observer))
    assert graphs.frame_count == 4, "as for the other observers"
    assert_alike(expected, module)


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_in_mixed_precision_keeps_its_ranges_in_float32(mode: str) -> None:
    module, callback = fit(mode, "histogram_mse", precision="bf16-mixed")
    assert all(end.dtype == torch.float32 for name, end in ranges(module).items() if name.endswith("_val"))
    assert all(bool(fq.seen) for _, fq in fake_quantizers(module) if fq.observed)
    assert callback.quantized is not None


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return read_both(run_two("tests.callbacks.ddp_chosen_ranges", tmp_path_factory.mktemp("two")))


@pytest.mark.nightly
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_alike(mode: str, observer: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = (found[f"{mode} {observer}"] for found in both)
    assert first == second


@pytest.mark.nightly
@pytest.mark.parametrize("source", ["batch_mse", "batch_percentile"])
def test_two_processes_choose_what_one_does_from_both_halves(source: str, both: tuple[dict[str, Any], ...]) -> None:
    first, second = (found["halves"][source] for found in both)
    assert first == second
    fq, expected = observer(source), []
    for batch in (BATCH, torch.ones(1), torch.full((3,), torch.nan)):
        fq(batch)
        expected.append([float(value) for value in (*fq.range(), fq.batches)])
    assert first == expected


def test_what_is_for_calibration_alone_is_refused_with_what_is_there_for_training() -> None:
    with pytest.raises(ConfigurationError, match=r"'histogram_kl' takes too long.*use 'histogram_mse', 'percentile'"):
        QuantizationAwareTraining(scheme=Scheme(activation_observer="histogram_kl"))
