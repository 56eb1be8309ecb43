"""Rotation in real fits of a transformer, trained and calibrated, in each mode and kind."""

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


def fresh() -> nn.Module:
    return SmallViT(CLASSES, 1, 8, 4, 16, 1, 2)


def vit() -> nn.Module:
    """A transformer with two outlier channels in the residual stream, as in language models."""
    torch.manual_seed(0)
    net = fresh()
    with torch.no_grad():
        net.get_parameter("positions")[..., [2, 9]] += torch.tensor([40.0, -60.0])
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return net


def fit(mode: str, *others: Any, net: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    module = Lit(copy.deepcopy(net) if net is not None else vit(), lr=0.01)
    callback = qat(mode, rotation=True, start={"step": 4}, **settings)
    fitting = trainer(callback, *others, max_epochs=2, enable_checkpointing=bool(others))
    fitting.fit(module, loader(), loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


CHOICES = [
    pytest.param("eager", "dynamic"),
    *(pytest.param(mode, "static", marks=pytest.mark.slow) for mode in MODES),
    *(
        pytest.param(mode, kind, marks=pytest.mark.slow)
        for mode in MODES
        for kind in ("dynamic", "weight_only")
        if (mode, kind) != ("eager", "dynamic")
    ),
]


@pytest.mark.parametrize(("mode", "kind"), CHOICES)
def test_a_fit_its_resumption_and_its_file(mode: str, kind: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, module, callback = fit(mode, saving, kind=kind)
    whole.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] >= 0.97
    seed_everything(3, verbose=False)
    _, again, other = fit(mode, ckpt_path=tmp_path / "epoch=0.ckpt", net=fresh(), kind=kind)
    assert_same_state(state(again), state(module))
    assert torch.equal(other.quantized(IMAGES), callback.quantized(IMAGES))
    callback.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", None if mode == "pt2e" else vit())
    assert torch.equal(loaded(IMAGES), callback.quantized(IMAGES))


@pytest.mark.slow
def test_the_float_network_is_the_same_function(tmp_path: Path) -> None:
    """The float variant, loading float checkpoints, and extracting float weights."""
    net = vit()
    with torch.no_grad():
        expected = net.eval()(IMAGES)
    torch.save({"state_dict": Lit(net).state_dict()}, tmp_path / "float.ckpt")
    module = Lit(copy.deepcopy(net), lr=0.0)
    callback = qat("fx", rotation=True, float_checkpoint=tmp_path / "float.ckpt")
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader())
    plain = fresh()
    Lit(plain).load_state_dict(float_state_dict({"state_dict": module.state_dict()}))
    with torch.no_grad():
        for network in (callback.network("float"), plain.eval()):
            torch.testing.assert_close(network(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(plain.get_parameter("positions"), net.get_parameter("positions"))
    fitting.save_checkpoint(tmp_path / "rotated.ckpt")
    with pytest.raises(CheckpointMismatchError, match="rotation: False here, True there"):
        trainer(qat("fx"), max_epochs=2).fit(Lit(net), loader(), ckpt_path=str(tmp_path / "rotated.ckpt"))


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_post_training_quantization_leaves_the_float_network_as_it_is(kind: Any) -> None:
    module = WithTraining(Lit(vit()))
    before = state(module)
    distances: dict[bool, float] = {}
    for rotation in (False, True):
        callback = PostTrainingQuantization(mode="fx", kind=kind, rotation=rotation)
        trainer(callback).test(module, verbose=False)
        with torch.no_grad():
            expected: Tensor = module.net.eval()(IMAGES)
            distances[rotation] = float((callback.quantized(IMAGES) - expected).norm() / expected.norm())
    assert_same_state(state(module), before)
    assert distances[True] < distances[False], distances
