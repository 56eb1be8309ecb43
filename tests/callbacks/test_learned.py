"""Learned scales in a Trainer: optimized, resumed, averaged, and refused if no optimizer has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from qat_lightning import Scheme
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.modes.prepared import fake_quantizers
from tests.callbacks.lit import MODES, Lit, assert_same_state, loader, qat, state, trainer

LSQ = Scheme(weight_bits=4, learned_step="lsq+")


def ratios(module: Lit) -> dict[str, Any]:
    return {key: value for key, value in state(module).items() if key.endswith("log_ratio")}


@pytest.mark.parametrize("mode", MODES)
def test_scales_learn_once_rounding_is_on_and_int8_has_them(mode: str) -> None:
    torch.manual_seed(0)
    module, callback = Lit(), qat(mode, scheme=LSQ, start={"step": 4})
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    assert not any(bool(value.any()) for value in ratios(module).values())
    run = trainer(callback, max_epochs=4)
    run.fit(module, loader())
    assert sum(bool(value.any()) for value in ratios(module).values()) >= 3
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9
    assert callback.fidelity["agreement"] >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [2, 6])
def test_a_run_resumes_where_it_was(mode: str, at: int, tmp_path: Path) -> None:
    def fit(steps: int, path: str | None = None) -> tuple[Lit, ModelCheckpoint]:
        torch.manual_seed(0)
        module, saved = Lit(), ModelCheckpoint(tmp_path / str(steps), save_last=True)
        callback = qat(mode, scheme=LSQ, start={"step": 4})
        run = trainer(callback, saved, max_epochs=steps // 2, enable_checkpointing=True)
        run.fit(module, loader(32), ckpt_path=path)
        return module, saved

    whole, _ = fit(8)
    _, saved = fit(at)
    resumed, _ = fit(8, saved.last_model_path)
    assert_same_state(state(whole), state(resumed))


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[] if mode == "fx" else pytest.mark.slow) for mode in MODES])
def test_scales_learn_from_their_own_point_on_also_in_a_run_that_is_resumed(mode: str, tmp_path: Path) -> None:
    def fit(steps: int, path: str | None = None) -> tuple[Lit, ModelCheckpoint]:
        torch.manual_seed(0)
        module, saved = Lit(), ModelCheckpoint(tmp_path / str(steps), save_last=True)
        callback = qat(mode, scheme=LSQ, start={"step": 2}, learn_scales={"step": 5})
        run = trainer(callback, saved, max_epochs=steps // 2, enable_checkpointing=True)
        run.fit(module, loader(32), ckpt_path=path)
        return module, saved

    early, saved = fit(4)
    assert not any(bool(value) for key, value in state(early).items() if key.endswith("learning"))
    whole, _ = fit(8)
    assert any(bool(value.any()) for value in ratios(whole).values())
    resumed, _ = fit(8, saved.last_model_path)
    assert_same_state(state(whole), state(resumed))


def test_a_point_for_scales_that_do_not_learn_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"learn_scales=0.1 sets when scales start to learn, and no scale is learned"
    ):
        qat("fx", learn_scales=0.1)


def test_large_rates_of_plain_sgd_leave_the_network_alive() -> None:
    torch.manual_seed(0)
    module, callback = Lit(lr=2.0), qat("fx", scheme=LSQ)
    trainer(callback, max_epochs=6).fit(module, loader())
    scales = [fq.calculate_qparams()[0] for _, fq in fake_quantizers(callback.prepared)]
    assert all(bool(torch.isfinite(scale).all()) for scale in scales)
    for _, fq in fake_quantizers(callback.prepared):
        assert fq.step is not None
        ratio = fq.calculate_qparams()[0] / fq.step.base_scale
        assert float(ratio.max()) <= (fq.quant_max - fq.quant_min) // 2 + 1e-3


def test_weights_are_averaged_with_their_scales() -> None:
    torch.manual_seed(0)
    module, callback = Lit(), qat("fx", scheme=LSQ)
    run = trainer(callback, EMAWeightAveraging(decay=0.5), max_epochs=6)
    run.fit(module, loader())
    assert run.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9


def test_weight_decay_does_not_pull_scales_to_zero() -> None:
    class Decaying(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=10.0)

    torch.manual_seed(0)
    module, callback = Decaying(), qat("fx", scheme=LSQ)
    trainer(callback, max_epochs=6).fit(module, loader())
    assert max(float(value.abs().max()) for value in ratios(module).values()) < 1.0


def test_optimizers_without_the_scales_are_refused_before_the_first_step() -> None:
    class Without(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net.head.weight], lr=0.1)

    run = trainer(qat("fx", scheme=LSQ))
    with pytest.raises(ConfigurationError, match=r"Pass self.parameters\(\)"):
        run.fit(Without(), loader())
    assert run.global_step == 0


def test_a_checkpoint_of_another_scheme_is_refused_by_its_field(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path)
    trainer(qat("fx"), saved, enable_checkpointing=True, max_epochs=1).fit(Lit(), loader())
    with pytest.raises(CheckpointMismatchError, match=r"scheme\.learned_step: 'lsq' here, 'none' there"):
        trainer(qat("fx", scheme=Scheme(learned_step="lsq"))).fit(Lit(), loader(), ckpt_path=saved.best_model_path)
