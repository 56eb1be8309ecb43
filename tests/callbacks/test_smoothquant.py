"""SmoothQuant in real fits of a transformer, trained and calibrated, in each mode and kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization, float_state_dict, load_quantized
from qat_lightning.demos.networks.vision_transformer import SmallViT
from qat_lightning.errors import CheckpointMismatchError
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_recipes import WithTraining

IMAGES = dataset()[:32][0]


def vit() -> nn.Module:
    """A transformer with channels of very different sizes after each norm, as in language models."""
    torch.manual_seed(0)
    net = SmallViT(CLASSES, 1, 8, 4, 16, 1, 2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::4] *= 20
    return net


def fit(mode: str, *others: Any, net: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    module = Lit(copy.deepcopy(net) if net is not None else vit(), lr=0.01)
    callback = qat(mode, smoothquant=0.5, start={"step": 4}, **settings)
    fitting = trainer(callback, *others, max_epochs=2, enable_checkpointing=bool(others))
    fitting.fit(module, loader(), loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


CHOICES = [
    pytest.param("eager", "dynamic"),
    *(pytest.param(mode, "static", marks=pytest.mark.slow) for mode in MODES),
    *(pytest.param(mode, "dynamic", marks=pytest.mark.slow) for mode in MODES if mode != "eager"),
]


@pytest.mark.parametrize(("mode", "kind"), CHOICES)
def test_a_fit_its_resumption_and_its_file(mode: str, kind: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, module, callback = fit(mode, saving, kind=kind)
    whole.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] >= 0.97
    assert callback.variants == ("float", "fake_quant", "int8")
    seed_everything(3, verbose=False)
    _, again, other = fit(
        mode, ckpt_path=tmp_path / "epoch=0.ckpt", net=SmallViT(CLASSES, 1, 8, 4, 16, 1, 2), kind=kind
    )
    assert_same_state(state(again), state(module))
    assert torch.equal(other.quantized(IMAGES), callback.quantized(IMAGES))
    callback.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", None if mode == "pt2e" else vit())
    assert torch.equal(loaded(IMAGES), callback.quantized(IMAGES))


def test_the_float_network_is_the_same_function(tmp_path: Path) -> None:
    """The float variant, loading float checkpoints, and extracting float weights."""
    net = vit()
    with torch.no_grad():
        expected = net.eval()(IMAGES)
    torch.save({"state_dict": Lit(net).state_dict()}, tmp_path / "float.ckpt")
    module, callback = (
        Lit(copy.deepcopy(net), lr=0.0),
        qat("fx", smoothquant=0.5, float_checkpoint=tmp_path / "float.ckpt"),
    )
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    plain = SmallViT(CLASSES, 1, 8, 4, 16, 1, 2)
    Lit(plain).load_state_dict(float_state_dict({"state_dict": module.state_dict()}))
    with torch.no_grad():
        for network in (callback.network("float"), plain.eval()):
            torch.testing.assert_close(network(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.norm.weight, net.norm.weight)
    fitting.save_checkpoint(tmp_path / "smoothed.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"smoothquant: None here, 0\.5 there"):
        trainer(qat("fx"), max_epochs=2).fit(Lit(net), loader(), ckpt_path=str(tmp_path / "smoothed.ckpt"))


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_post_training_quantization_leaves_the_float_network_as_it_is(kind: Any) -> None:
    module = WithTraining(Lit(vit()))
    before = state(module)
    distances: dict[Any, float] = {}
    for strength in (None, 0.5):
        callback = PostTrainingQuantization(mode="fx", kind=kind, smoothquant=strength)
        trainer(callback).test(module, verbose=False)
        with torch.no_grad():
            expected: Tensor = module.net.eval()(IMAGES)
            distances[strength] = float((callback.quantized(IMAGES) - expected).norm() / expected.norm())
        assert callback.fidelity["agreement"] >= 0.97
    assert_same_state(state(module), before)
    assert distances[0.5] < distances[None], distances
