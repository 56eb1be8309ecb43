"""Each recipe in each mode in a real fit: it trains, converts, resumes, and loads float checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning import (
    AdaRound,
    BatchNormReestimation,
    Distillation,
    PostTrainingQuantization,
    Scheme,
    float_state_dict,
)
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError
from qat_lightning.recipes.layers import rounded_layers
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, dataset, loader, qat, state, trainer
from tests.callbacks.test_insert import OwnForward
from tests.support.nightly import nightly_except

IMAGES = dataset()[:32][0]


class Mobile(nn.Module):
    """An inverted residual with ReLU6 and BatchNorm, a convolution with a bias, and a separate BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm1d(72)
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.project(self.depthwise(self.expand(x))).flatten(1)))


RECIPES: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "distillation": (lambda: [Distillation(features=["net.project"])], {}),
    "batchnorm_reestimation": (lambda: [BatchNormReestimation(2)], {}),
    "equalization": (list, {"equalization": "exact"}),
    "equalization_relu6": (list, {"equalization": "replace_relu6"}),
    "fold": (list, {"batchnorm": "fold"}),
    "bias_correction": (list, {"bias_correction_batches": 2}),
    "all": (
        lambda: [Distillation(), BatchNormReestimation(2)],
        {"equalization": "replace_relu6", "batchnorm": "fold", "bias_correction_batches": 2},
    ),
}


def rows(*names: str) -> list[Any]:
    """Every mode with every recipe; by default those that differ most."""
    return [
        pytest.param(mode, name, id=f"{mode}-{name}", marks=[] if mode == "fx" or name == "all" else pytest.mark.slow)
        for mode in MODES
        for name in names
    ]


def fit(mode: str, name: str, *others: Any, net: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    callbacks, arguments = RECIPES[name]
    module = Lit(copy.deepcopy(net) if net is not None else Mobile(), lr=0.02)
    callback = qat(mode, start={"step": 4}, freeze_observers={"step": 8}, **arguments)
    fitting = trainer(callback, *callbacks(), *others, **{"max_epochs": 4} | settings)
    fitting.fit(module, loader(), loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return fitting, module, callback


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), rows(*RECIPES))
def test_a_fit_and_its_resumption(mode: str, name: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    net = Mobile()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, module, callback = fit(mode, name, saving, net=net, enable_checkpointing=True)
    (metrics,) = whole.test(module, loader(), verbose=False)
    # What a network learns from that began to train four steps ago is another matter.
    assert metrics["test/acc"] > 0.5 or name == "distillation"
    assert callback.fidelity["agreement"] >= 0.97
    assert callback.variants == ("float", "fake_quant", "int8")
    callback.use_variant("float")
    whole.test(module, loader(), verbose=False)
    seed_everything(3, verbose=False)
    _, again, other = fit(mode, name, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same_state(state(again), state(module))
    assert torch.equal(other.quantized(IMAGES), callback.quantized(IMAGES))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_with_batchnorm_folded_goes_back_into_the_float_model(mode: str) -> None:
    _, module, callback = fit(mode, "fold")
    assert "net.expand.0.bias" in module.state_dict()
    assert "net.expand.1.running_var" not in module.state_dict()
    plain = Lit(Mobile())
    plain.load_state_dict(float_state_dict({"state_dict": module.state_dict()}))
    callback.use_variant("fake_quant")
    for fq in (f for f in module.modules() if hasattr(f, "fake_quant_enabled")):
        fq.fake_quant_enabled = False
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(IMAGES), module.eval()(IMAGES), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("mode", "name"), rows("equalization", "fold", "all"))
def test_a_float_checkpoint_starts_the_run(mode: str, name: str, tmp_path: Path) -> None:
    """A float checkpoint's weights are reworked like the LightningModule's, and the outputs stay the same."""
    seed_everything(0, verbose=False)
    net = Mobile()
    net(IMAGES)  # statistics
    float_run = trainer(max_epochs=1)
    source = Lit(net)
    float_run.fit(source, loader())
    float_run.save_checkpoint(tmp_path / "float.ckpt")
    expected = source.eval()(IMAGES).detach()
    module, callback = Lit(Mobile()), qat(mode, start={"step": 99}, **RECIPES[name][1])
    trainer(callback).validate(module, loader(), ckpt_path=str(tmp_path / "float.ckpt"), verbose=False)
    torch.testing.assert_close(module.eval()(IMAGES).detach(), expected, atol=1e-3, rtol=1e-3)
    # And a fit goes on from it.
    module, callback = Lit(Mobile()), qat(mode, start={"step": 6}, **RECIPES[name][1])
    fitting = trainer(callback, max_epochs=3)
    fitting.fit(module, loader(), loader(), ckpt_path=str(tmp_path / "float.ckpt"))
    assert callback.quantized is not None


def test_a_checkpoint_of_the_other_setting_is_refused(tmp_path: Path) -> None:
    fused, _, _ = fit("fx", "distillation", max_epochs=1)
    fused.save_checkpoint(tmp_path / "fused.ckpt")
    with pytest.raises(CheckpointMismatchError, match="batchnorm: 'fold' here, 'fused' there"):
        fit("fx", "fold", ckpt_path=tmp_path / "fused.ckpt")
    with pytest.raises(CheckpointMismatchError, match="equalization: 'exact' here, 'none' there"):
        fit("fx", "equalization", ckpt_path=tmp_path / "fused.ckpt")


@pytest.mark.parametrize("name", ["equalization", "fold"])
@pytest.mark.slow
def test_float_checkpoint_as_the_variant_to_compare_with(name: str, tmp_path: Path) -> None:
    best = Lit(Mobile())
    torch.save({"state_dict": best.state_dict()}, tmp_path / "float.ckpt")
    module = Lit(Mobile())
    callback = qat("fx", float_checkpoint=tmp_path / "float.ckpt", **RECIPES[name][1])
    trainer(callback).fit(module, loader(), loader())
    with torch.no_grad():
        outputs = callback.network("float")(IMAGES)
        torch.testing.assert_close(outputs, best.net.eval()(IMAGES), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"batchnorm": "fold"}, {"equalization": "exact"}], ids=["fold", "equalization"])
@pytest.mark.parametrize("mode", MODES)
def test_layers_on_the_lightning_module_itself(mode: str, settings: dict[str, Any]) -> None:
    module, callback = OwnForward(), qat(mode, **settings)
    fitting = trainer(callback)
    fitting.fit(module, loader(), loader())
    (metrics,) = fitting.test(module, loader(), verbose=False)
    assert metrics["test/acc"] > 0.5
    assert callback.fidelity["agreement"] >= 0.97


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    for settings, message in (
        ({"equalization": "all"}, "equalization='all' is unknown: use one of none, exact, replace_relu6"),
        ({"equalization": True}, "equalization=True is unknown"),
        ({"batchnorm": "folded"}, "batchnorm='folded' is unknown: use one of fused, fold"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            qat("fx", **settings)
    with pytest.raises(ConfigurationError, match="kind='dynamic' does not use"):
        PostTrainingQuantization(kind="dynamic", bias_correction=True)
    with pytest.raises(ConfigurationError, match=r"adaround=100 is not valid: give a qat_lightning.AdaRound"):
        PostTrainingQuantization(adaround=100)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"adaround= needs calibration data"):
        PostTrainingQuantization(kind="weight_only", adaround=AdaRound())
    module = Lit(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    before = state(module)
    with pytest.raises(ConfigurationError, match="finds no BatchNorm in Sequential"):
        trainer(qat("fx", batchnorm="fold")).fit(module, loader())
    assert_same_state(state(module), before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_recipes_of_post_training_quantization(mode: str) -> None:
    """Few bits per tensor: each recipe reduces the error of the outputs, and the float network is unchanged."""
    seed_everything(0, verbose=False)
    module = Lit(Mobile(), lr=0.02)
    trainer(max_epochs=8).fit(module, loader())
    with torch.no_grad():
        module.net.expand[1].weight[0] *= 6  # type: ignore[index,union-attr]
        module.net.depthwise[0].weight[0] /= 6  # type: ignore[index,union-attr]
    before = state(module)
    module.eval()
    reference = module.net(IMAGES).detach()
    errors = {}
    scheme = Scheme(weight_bits=5, weight_granularity="per_tensor")
    for name, settings in {
        "plain": {},
        "equalization": {"equalization": "replace_relu6"},
        "bias_correction": {"bias_correction": True},
        "adaround": {"adaround": AdaRound(iterations=200)},
        "both": {"adaround": AdaRound(iterations=200), "bias_correction": True},
    }.items():
        callback = PostTrainingQuantization(mode=mode, scheme=scheme, **settings)  # type: ignore[arg-type]
        evaluating = trainer(callback)
        evaluating.test(WithTraining(module), verbose=False)
        outputs = callback.prepared.eval()(IMAGES).detach()
        errors[name] = float((outputs - reference).norm() / reference.norm())
        assert callback.fidelity["agreement"] >= 0.97
    assert_same_state(state(module), before)
    assert errors["bias_correction"] < errors["plain"], errors
    assert errors["equalization"] < errors["plain"], errors
    assert errors["adaround"] < errors["plain"], errors
    assert errors["both"] < errors["plain"], errors


class WithTraining(Lit):
    """The same network, with its own loaders."""

    def __init__(self, of: Lit) -> None:
        super().__init__(of.net)

    def train_dataloader(self) -> Any:
        return loader()

    def test_dataloader(self) -> Any:
        return loader()


class _Biases(Callback):
    """Record the bias of the layer with one before each batch, and the number of batches."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(pl_module.net.head.bias.detach().clone())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [0, 4])
def test_biases_are_corrected_once_when_fake_quantization_is_enabled(mode: str, start: int) -> None:
    """With a learning rate of 0 only the correction changes biases; float variant and teacher keep the old ones."""
    net, biases, distillation = Mobile(), _Biases(), Distillation()
    callback = qat(
        mode, start={"step": start}, bias_correction_batches=3, scheme=Scheme(3, weight_granularity="per_tensor")
    )
    before = net.head.bias.detach().clone()
    # Last, so that they are seen when the callbacks before have done their work.
    trainer(callback, distillation, biases, max_epochs=3).fit(Lit(net, lr=0.0), loader())
    assert [torch.equal(bias, before) for bias in biases.seen] == [step < start for step in range(len(biases.seen))]
    assert all(torch.equal(bias, biases.seen[-1]) for bias in biases.seen[start:])
    assert torch.equal(callback.float_weights("net")["head.bias"], before)
    assert "float" in callback.variants


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", [Scheme(3), Scheme(3, learned_step="lsq")], ids=["fixed", "learned"])
def test_correcting_biases_in_a_fit_changes_no_rounded_weight(mode: str, scheme: Scheme) -> None:
    """The range of few bits is chosen once: it stays known when the buffers of the batches read for it are restored."""

    def rounded(**arguments: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Lit(Mobile(), lr=0.0)
        callback = qat(mode, scheme=scheme, rehearse=False, convert_on_fit_end=False, **arguments)
        trainer(callback, max_epochs=1).fit(model, loader())
        return {layer.name: layer.rounded() for layer in rounded_layers(model.net)}

    plain, corrected = rounded(), rounded(bias_correction_batches=2)
    assert plain
    for name, weight in plain.items():
        assert weight.any(), name
        # BatchNorm in training sees slightly other values.
        torch.testing.assert_close(corrected[name], weight, rtol=0.01, atol=1e-3)


def test_correcting_biases_does_not_disturb_workers_that_persist() -> None:
    """Their loader would restart its epoch."""
    batches: list[Tensor] = []

    class Noting(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled():
                batches.append(batch[0])
            return super().training_step(batch, batch_idx)

    data = DataLoader(dataset(), 8, num_workers=1, persistent_workers=True)
    trainer(qat("fx", start={"step": 3}, bias_correction_batches=2), max_epochs=1).fit(Noting(), data)
    assert torch.equal(torch.cat(batches), dataset().tensors[0])


@pytest.mark.parametrize("batches", [-1, 1.5, True, "8"])
def test_a_number_of_batches_that_is_none_is_refused(batches: Any) -> None:
    with pytest.raises(ConfigurationError, match="bias_correction_batches="):
        qat("fx", bias_correction_batches=batches)
