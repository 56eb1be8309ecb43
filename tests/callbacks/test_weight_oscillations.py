"""Oscillating weights in a Trainer: frozen, dampened, counted, resumed, and without overhead if not used."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qat_lightning import QuantizationMonitor, Scheme, WeightOscillations
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes import compiling
from qat_lightning.recipes.oscillation import OscillationTracker, rounded_weights
from tests.callbacks.lit import MODES, Lit, assert_same_state, loader, qat, state, trainer
from tests.callbacks.test_recipes import IMAGES, Mobile

THREE_BITS = Scheme(weight_bits=3)
SCHEMES = {
    "per channel": THREE_BITS,
    "per tensor": Scheme(weight_bits=3, weight_granularity="per_tensor", weight_observer="min_max"),
    "learned": Scheme(weight_bits=3, learned_step="lsq"),
}
EAGERLY: dict[str, Any] = {"freezing": 0.05, "momentum": 0.1}
"""Freezes within a fit of a few steps: after one reversal."""


class Restless(Lit):
    """Trains with weight decay and momentum on labels that change between steps, so that weights oscillate."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images, (labels + self.trainer.global_step // 2) % 4), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class Integers(Callback):
    """The integers of all weights after each batch, and which are frozen."""

    def __init__(self, oscillations: WeightOscillations, callback: Any) -> None:
        self.oscillations, self.quantization = oscillations, callback
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        states = self.oscillations.state_dict()["weights"]
        (network,) = self.quantization.prepared_networks.values()
        found = {}
        for weight in rounded_weights(network):
            known = states.get(f"net/{weight.name}")
            if known is not None:
                found[weight.name] = weight.on_grid().integers, known["frozen"].clone()
        self.seen.append(found)


def fit(mode: str, oscillations: WeightOscillations | None, *others: Any, net: Any = None, **settings: Any) -> Any:
    module = Restless(copy.deepcopy(net) if net is not None else Mobile())
    arguments = settings.pop("arguments", {})
    callback = qat(mode, **{"scheme": THREE_BITS, "start": {"step": 2}, "rehearse": False} | arguments)
    made = [other(callback) if callable(other) and not isinstance(other, Callback) else other for other in others]
    fitting = trainer(callback, *([oscillations] if oscillations else []), *made, **{"max_epochs": 4} | settings)
    ckpt_path = settings.get("ckpt_path")
    fitting.fit(module, loader(), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return fitting, module, callback


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[] if mode == "fx" else pytest.mark.slow) for mode in MODES])
def test_a_frozen_weight_stays_at_its_integer_whatever_the_optimizer_does(mode: str, scheme: str) -> None:
    """With Adam, weight decay, changing scales and BatchNorm folded in."""
    seed_everything(0, verbose=False)
    oscillations = WeightOscillations(**EAGERLY)
    _, module, callback = fit(
        mode, oscillations, lambda qat: Integers(oscillations, qat), arguments={"scheme": SCHEMES[scheme]}, max_epochs=5
    )
    noted = next(c for c in module.trainer.callbacks if isinstance(c, Integers))
    frozen = 0
    for before, after in zip(noted.seen, noted.seen[1:], strict=False):
        for name, (integers, held) in before.items():
            assert torch.equal(after[name][0][held], integers[held]), name
            assert bool((after[name][1] | ~held).all()), "frozen for good"
            frozen += int(held.sum())
    assert frozen > 50
    assert callback.quantized is not None
    shares = oscillations.shares()
    assert set(shares) >= {"expand.0", "depthwise.0", "project.0", "head"}
    assert all(0 <= share <= 1 for both in shares.values() for share in both)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_where_it_was(mode: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    net = Mobile()
    settings: dict[str, Any] = {"freezing": (0.3, 0.02), "dampening": (0.0, 0.5), "momentum": 0.1}
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = WeightOscillations(**settings)
    _, module, callback = fit(mode, whole, saving, net=net, enable_checkpointing=True)
    seed_everything(3, verbose=False)
    resumed = WeightOscillations(**settings)
    _, again, other = fit_from(mode, resumed, tmp_path / "epoch=1.ckpt")
    assert_same_state(state(again), state(module))
    assert torch.equal(other.quantized(IMAGES), callback.quantized(IMAGES))
    assert whole.shares() == resumed.shares()
    for name, tensors in whole.state_dict()["weights"].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, resumed.state_dict()["weights"][name][key]), (name, key)


def fit_from(mode: str, oscillations: WeightOscillations, path: Path) -> Any:
    module, callback = Restless(Mobile()), qat(mode, scheme=THREE_BITS, start={"step": 2}, rehearse=False)
    fitting = trainer(callback, oscillations, max_epochs=4)
    fitting.fit(module, loader(), ckpt_path=str(path))
    return fitting, module, callback


def test_only_counting_changes_nothing() -> None:
    seed_everything(0, verbose=False)
    net = Mobile()
    _, plain, _ = fit("fx", None, net=net)
    counting = WeightOscillations(freezing=None, momentum=0.1)
    _, counted, _ = fit("fx", counting, net=net)
    assert_same_state(state(plain), state(counted))
    assert max(oscillating for oscillating, _ in counting.shares().values()) > 0
    assert all(frozen == 0 for _, frozen in counting.shares().values())


def test_dampening_is_the_gradient_of_its_loss() -> None:
    """Compared with autograd on the paper's equation, with BatchNorm's factor and a clipped grid."""
    seed_everything(0, verbose=False)
    callback = qat("fx", scheme=THREE_BITS)
    trainer(callback, max_epochs=1, limit_train_batches=2).fit(Restless(Mobile()), loader())
    (network,) = callback.prepared_networks.values()
    tracker = OscillationTracker()
    tracker.look_at({"net": network})
    wanted, losses = {}, []
    for _, weight in tracker.weights:
        grid = weight.on_grid()
        leaf = weight.weight().clone().requires_grad_()
        factor = torch.where(grid.seen == 0, 1.0, grid.seen / torch.where(leaf == 0, 1.0, leaf)).detach()
        limited = (leaf * factor).clamp(min=grid.low * grid.scale, max=grid.high * grid.scale)
        loss = 0.3 * ((grid.integers * grid.scale - limited) / factor).square().sum()
        losses.append(loss.detach())
        (wanted[weight.name],) = torch.autograd.grad(loss, leaf)
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    total = tracker.dampen(0.3)
    assert total is not None
    torch.testing.assert_close(total, torch.stack(losses).sum(), rtol=1e-3, atol=1e-6)
    for _, weight in tracker.weights:
        torch.testing.assert_close(weight.parameter.grad, wanted[weight.name], rtol=1e-3, atol=1e-5)


def test_dampened_weights_end_nearer_to_their_integers() -> None:
    def distance(strength: Any) -> float:
        seed_everything(0, verbose=False)
        _, _, callback = fit("fx", WeightOscillations(freezing=None, dampening=strength), net=None, max_epochs=6)
        (network,) = callback.prepared_networks.values()
        off = [weight.on_grid() for weight in rounded_weights(network)]
        return float(torch.cat([(grid.off_center() / grid.scale).flatten() for grid in off]).abs().mean())

    assert distance((0.0, 100.0)) < 0.8 * distance(None)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}], ids=["amp", "clipping"])
def test_with_mixed_precision_and_clipping(settings: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    oscillations = WeightOscillations(**EAGERLY, dampening=0.1)
    _, module, _ = fit("fx", oscillations, lambda qat: Integers(oscillations, qat), **settings)
    noted = next(c for c in module.trainer.callbacks if isinstance(c, Integers))
    assert sum(int(held.sum()) for _, held in noted.seen[-1].values()) > 0
    for before, after in zip(noted.seen, noted.seen[1:], strict=False):
        for name, (integers, held) in before.items():
            assert torch.equal(after[name][0][held], integers[held])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_freeze_as_plain_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same number of graphs: code between two steps is not compiled."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", graphs)
    seed_everything(0, verbose=False)
    net = Mobile()
    plain, compiled = WeightOscillations(**EAGERLY), WeightOscillations(**EAGERLY)
    fit(mode, plain, net=net, arguments={"start": {"step": 1}}, max_epochs=2)
    assert graphs.frame_count == 0
    fit(mode, compiled, net=net, arguments={"start": {"step": 1}, "compile": True}, max_epochs=2)
    assert graphs.frame_count == 1, "with rounding, whatever is frozen"
    for layer, (oscillating, frozen) in plain.shares().items():
        assert compiled.shares()[layer] == pytest.approx((oscillating, frozen), abs=0.2)
    assert any(frozen for _, frozen in compiled.shares().values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_kinds_without_fixed_ranges(kind: Any, granularity: Any) -> None:
    seed_everything(0, verbose=False)
    size = 16 if granularity == "per_group" else 0
    scheme = Scheme(weight_bits=3, weight_granularity=granularity, weight_group_size=size)
    oscillations = WeightOscillations(**EAGERLY)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    arguments = {"scheme": scheme, "kind": kind}
    _, module, _ = fit("eager", oscillations, lambda qat: Integers(oscillations, qat), net=net, arguments=arguments)
    noted = next(c for c in module.trainer.callbacks if isinstance(c, Integers))
    assert sum(int(held.sum()) for _, held in noted.seen[-1].values()) > 0
    for before, after in zip(noted.seen, noted.seen[1:], strict=False):
        for name, (integers, held) in before.items():
            assert torch.equal(after[name][0][held], integers[held])


def test_the_monitor_shows_the_shares_of_each_layer(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    oscillations, monitor = WeightOscillations(**EAGERLY), QuantizationMonitor(every_n_steps=1)
    fit("fx", oscillations, monitor)
    shares = oscillations.shares()
    rows = {row.layer: row for row in monitor.layers}
    assert {
        layer: (row.oscillating_share, row.frozen_share) for layer, row in rows.items() if layer in shares
    } == shares
    assert rows["x"].oscillating_share is None


def test_the_callback_pickles_with_its_state() -> None:
    seed_everything(0, verbose=False)
    oscillations = WeightOscillations(**EAGERLY)
    fit("fx", oscillations)
    copied = pickle.loads(pickle.dumps(oscillations))
    assert copied.state_dict()["weights"].keys() == oscillations.state_dict()["weights"].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freezing": 2.0}, "freezing=2.0 is not valid: give a number from 0 to 1"),
        ({"dampening": [0.1, -1]}, r"dampening=\[0.1, -1\] is not valid"),
        ({"momentum": 1.0}, "momentum=1.0 is not valid"),
        ({"momentum": 0}, "momentum=0 is not valid"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WeightOscillations(**settings)


def test_a_curve_needs_a_plan_with_an_end_before_the_first_step() -> None:
    fitting = trainer(qat("fx"), WeightOscillations(), max_epochs=-1)
    with pytest.raises(ConfigurationError, match=r"freezing=\(0.1, 0.01\) spans the planned training"):
        fitting.fit(Lit(), loader())
    assert fitting.global_step == 0


def test_without_quantization_it_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="WeightOscillations needs exactly one QuantizationAwareTraining"):
        trainer(WeightOscillations()).fit(Lit(), loader())
