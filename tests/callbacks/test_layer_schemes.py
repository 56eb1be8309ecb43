"""Per-layer overrides in whole fits: trained, resumed, refused, calibrated, logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import PostTrainingQuantization, Scheme, load_quantized
from qat_lightning.artifact import artifact_size_mb
from qat_lightning.callbacks.parts.settings_log import settings_of_callback
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.modes.places import find_places
from tests.callbacks.lit import MODES, Lit, Net, assert_same_state, dataset, loader, qat, state, trainer
from tests.configs.conftest import composed  # noqa: F401 (a fixture)

MIXED: dict[str, Any] = {"net.head": {"weight_bits": 4}, "net.features": {"weight_bits": 6}}
SCHEDULE: dict[str, Any] = {"start": {"step": 2}, "freeze_observers": {"step": 6}}


def fit(mode: str, *callbacks: Any, seed: int = 0, ckpt_path: Path | None = None, **settings: Any) -> Any:
    seed_everything(seed, verbose=False)
    module, callback = Lit(), qat(mode, **SCHEDULE | {"scheme": Scheme(overrides=MIXED)} | settings)
    fitting = trainer(callback, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks))
    data = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
    fitting.fit(module, data, loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return module, callback


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_resumes_bit_by_bit_from_any_phase(mode: str, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, callback = fit(mode, steps)
    largest = {p.layer: p.fq.quant_max for p in find_places(module.net) if p.what == "weight"}
    assert largest == {"features.0": 31, "head": 7}
    images = dataset()[:32][0]
    for step in (1, 5):
        resumed, again = fit(mode, seed=7, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_state(state(resumed), state(module))
        assert torch.equal(again.quantized(images), callback.quantized(images))
    callback.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=Net() if mode == "eager" else None)
    assert torch.equal(loaded(images), callback.quantized(images))


def test_a_checkpoint_of_other_overrides_is_refused_with_both_named(tmp_path: Path) -> None:
    fit("fx", ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    for scheme, here in (
        (Scheme(), "{} here"),
        (Scheme(overrides={"net.head": {"weight_bits": 3}}), "{'net.head': {'weight_bits': 3}} here"),
    ):
        with pytest.raises(CheckpointMismatchError) as caught:
            fit("fx", ckpt_path=tmp_path / "step=1.ckpt", scheme=scheme)
        assert f"scheme.overrides: {here}, {MIXED!r} there" in str(caught.value)


def test_a_checkpoint_of_before_there_were_overrides_goes_on_as_it_began(tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, _ = fit("fx", steps, scheme=Scheme(weight_bits=4))
    entry = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]["net._quantization._extra_state"]
    assert "overrides" not in bytes(entry.tolist()).decode()
    resumed, _ = fit("fx", seed=7, ckpt_path=tmp_path / "step=3.ckpt", scheme=Scheme(weight_bits=4))
    assert_same_state(state(resumed), state(module))


@pytest.mark.parametrize("method", ["qat", "ptq"])
def test_a_pattern_without_a_layer_is_an_error_before_the_first_step(method: str) -> None:
    scheme = Scheme(overrides={"net.haed": {"weight_bits": 4}})
    callback = qat(scheme=scheme) if method == "qat" else PostTrainingQuantization(scheme=scheme)
    module = Lit()
    fitting = trainer(callback)
    with pytest.raises(ConfigurationError, match=r"scheme.overrides\['net.haed'\] matches no layer.*'net\.head'"):
        fitting.fit(module, loader(), loader())
    assert fitting.global_step == 0


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_calibration_and_the_other_kinds_have_them(kind: Any) -> None:
    sizes = []
    for overrides in ({}, {"net.head": {"weight_bits": 4}}):
        callback = PostTrainingQuantization(scheme=Scheme(overrides=overrides), kind=kind)
        trainer(callback).fit(Lit(), loader(), loader())
        assert {row.name: row.quantized for row in callback.quantized.coverage}["head"]
        sizes.append(artifact_size_mb(callback.quantized))
    assert sizes[1] < sizes[0]


def test_both_of_several_networks_are_named_from_the_module() -> None:
    overrides = {"net.features.*": {"weight_bits": 5}, "net.head": {"weight_bits": 3}}
    callback = qat(module=["net.features", "net.head"], scheme=Scheme(overrides=overrides))
    module = Lit()
    trainer(callback).fit(module, loader(), loader())
    bits = {p.fq.quant_max for part in (module.net.features, module.net.head) for p in find_places(part)}
    assert bits == {255, 15, 3}


def test_a_mode_that_is_chosen_has_them() -> None:
    callback = qat("auto", scheme=Scheme(overrides=MIXED))
    module = Lit()
    trainer(callback).fit(module, loader(), loader())
    assert {p.fq.quant_max for p in find_places(module.net) if p.what == "weight"} == {31, 7}


def test_they_are_in_the_log_of_settings() -> None:
    found = settings_of_callback(qat(scheme=Scheme(overrides=MIXED | {"net.norm": "float"})))
    assert found["quantization/scheme.overrides.net.head.weight_bits"] == 4
    assert found["quantization/scheme.overrides.net.norm"] == "float"


def test_hydra_gives_them(composed: Any) -> None:  # noqa: F811
    words = "quantization.scheme.overrides={net.head:{weight_bits:8},net.blocks.*:{weight_bits:4},net.stem:float}"
    callback = instantiate(composed("method=qat", words).quantization)
    assert callback.scheme.overrides == {
        "net.head": {"weight_bits": 8},
        "net.blocks.*": {"weight_bits": 4},
        "net.stem": "float",
    }
