"""Weight ranges chosen by the error of each layer's output: never worse, in every mode, and in whole fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining, Scheme
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.layers import rounded_layers
from qat_lightning.recipes.sequential_mse import RangeSearch, clipping, sequential_mse
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import Lit, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_recipes import WithTraining
from tests.recipes.test_bias_correction import MODES, prepare
from tests.support.networks import CASES

CASE = {case.name: case for case in CASES}
IMAGES = dataset()[:32][0]


@settings(max_examples=12, deadline=None)
@given(bits=st.integers(2, 8), per_channel=st.booleans(), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_a_layer_has_the_best_of_all_candidates_and_keeps_its_weight(
    bits: int, per_channel: bool, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(12, 6))
    x = torch.randn(64, 12) * torch.logspace(-2, 1, 12)  # inputs that count differently
    with torch.no_grad():
        network[0].weight[2] = 0  # a dead channel
        network[0].weight[1, 0] = 3  # an outlier where inputs are small
    scheme = Scheme(
        weight_bits=bits,
        weight_granularity="per_channel" if per_channel else "per_tensor",
        weight_symmetric=symmetric,
        weight_observer="mse",
    )
    prepared = get_mode("eager").prepare(network, Example((x,)), Recipe("eager", "x86", scheme, kind="static"))
    (layer,) = rounded_layers(prepared)
    weight, first = layer.folded(), layer.rounded()

    def error(rounded: Tensor) -> Tensor:
        by_channel = (x @ (rounded - weight).T).double().square().sum(0)
        return by_channel if per_channel else by_channel.sum()

    result = sequential_mse(prepared, [x])["0"]
    assert torch.equal(layer.folded(), weight)
    found = error(layer.rounded())
    assert (found <= error(first) * (1 + 1e-6)).all()
    low, high = layer.fq.grid.ends(weight)
    for share in (1.0, 0.8, 0.6, 0.4, 0.2):
        candidate = layer.fq.grid.round(weight, *layer.fq.grid.qparams(low * share, high * share))
        assert (found <= error(candidate) * 1.001 + 1e-9).all()
    assert result.after <= result.before
    assert 0 < result.share <= 1


@pytest.mark.parametrize("name", ["plain", "depthwise", "functional"])
@pytest.mark.parametrize("mode", MODES)
def test_networks_of_every_mode_come_nearer_and_convert(mode: str, name: str) -> None:
    prepared, batches = prepare(mode, CASE[name], bits=4)
    seen: list[str] = []
    results = sequential_mse(prepared, batches, progress=lambda n, of, name, result: seen.append(name))
    assert set(results) == {layer.name for layer in rounded_layers(prepared)} == set(seen)
    assert all(result.after <= result.before for result in results.values())
    assert any(result.after < 0.95 * result.before for result in results.values())
    before = {layer.name: layer.rounded() for layer in rounded_layers(prepared)}
    converted = get_mode(mode).convert(cpu_copy(prepared), batches[0])
    with torch.no_grad():
        expected, got = prepared(*batches[0].args), converted.network(*batches[0].args)
    assert float((expected - got).norm() / expected.norm()) < 0.1
    again, _ = prepare(mode, CASE[name], bits=4)
    again.load_state_dict(prepared.state_dict())
    assert all(torch.equal(layer.rounded(), before[layer.name]) for layer in rounded_layers(again))


def fit(mode: str, *callbacks: Any, seed: int = 0, ckpt_path: Path | None = None) -> Any:
    seed_everything(seed, verbose=False)
    callback = qat(mode, scheme=Scheme(weight_bits=3), start={"step": 3}, sequential_mse_batches=2)
    module = Lit()
    fitting = trainer(callback, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks))
    data = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
    fitting.fit(module, data, loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return module, callback


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_begins_with_these_ranges_and_resumes_bit_by_bit(mode: str, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, callback = fit(mode, steps)
    clips = {key: value for key, value in module.state_dict().items() if key.endswith("clip")}
    assert len(clips) == 2
    before = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    chosen = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    for key, clip in clips.items():
        assert not torch.equal(before[key], clip), "chosen when fake-quantization is enabled"
        assert torch.equal(clip, chosen[key]), "chosen once"
    for step in (2, 5):
        resumed, again = fit(mode, seed=7, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_state(state(resumed), state(module))
        assert torch.equal(again.quantized(IMAGES), callback.quantized(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_post_training_quantization_comes_nearer_to_float(mode: str) -> None:
    torch.manual_seed(0)
    module = Lit()
    with torch.no_grad():
        module.net.features[0].weight[:, :, 0, 0] *= 20  # type: ignore[index,union-attr]
    before = state(module)
    module.eval()
    reference = module.net(IMAGES).detach()
    errors = {}
    for name, arguments in {"plain": {}, "searched": {"sequential_mse": True}}.items():
        callback = PostTrainingQuantization(mode, scheme=Scheme(weight_bits=3, weight_observer="mse"), **arguments)  # type: ignore[arg-type]
        trainer(callback).test(WithTraining(module), verbose=False)
        assert callback.fidelity["agreement"] >= 0.97
        outputs = callback.prepared.eval()(IMAGES).detach()
        errors[name] = float((outputs - reference).norm() / reference.norm())
    assert_same_state(state(module), before)
    assert errors["searched"] < errors["plain"]


def test_without_data_and_for_the_whole_range_it_is_refused() -> None:
    prepared, batches = prepare("eager", CASE["plain"], bits=8)
    with pytest.raises(ConversionError, match="at least one batch"):
        sequential_mse(prepared, [])
    with pytest.raises(ConfigurationError, match=r"'conv' was prepared.*Scheme\(weight_observer='mse'\)"):
        sequential_mse(prepared, batches)


@pytest.mark.parametrize("make", [PostTrainingQuantization, QuantizationAwareTraining])
def test_settings_that_exclude_it_are_refused_at_construction(make: Any) -> None:
    on = {"sequential_mse": True} if make is PostTrainingQuantization else {"sequential_mse_batches": 2}
    assert make(**on).scheme.weight_observer == "mse"
    with pytest.raises(ConfigurationError, match=r"scheme.weight_observer='min_max' asks for all of it"):
        make(scheme=Scheme(weight_observer="min_max"), **on)
    with pytest.raises(ConfigurationError, match=r"scheme\.overrides\['net\.\*'\]\.weight_observer='min_max'"):
        make(scheme=Scheme(overrides={"net.*": {"weight_observer": "min_max"}}), **on)
    with pytest.raises(ConfigurationError, match=r"sequential_mse.*kind='dynamic'"):
        make(kind="dynamic", **on)
    with pytest.raises(ConfigurationError, match=r"give a qat_lightning.Scheme"):
        make(scheme="w4", **on)


def test_the_result_is_a_plain_value() -> None:
    assert RangeSearch(0.2, 0.1, 0.5) == RangeSearch(before=0.2, after=0.1, share=0.5)
    assert clipping(None) == Scheme(weight_observer="mse")
