"""References to a network besides its name: whatever runs under the name runs under each of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from qat_lightning import PostTrainingQuantization
from qat_lightning.errors import NetworkError
from tests.callbacks.lit import Lit, Net, assert_same_state, dataset, loader, qat, state, trainer

IMAGES = dataset()[:32][0]


class Wrapper(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Sampler:
    """No module, as the helpers of diffusion models are."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Any:
        return self.net(x)


class Referring(Lit):
    """Runs its network through every reference, and logs the loss of each in tests."""

    def __init__(self, only: str = "") -> None:
        super().__init__()
        net = self.net
        self.alias = net
        self.wrapper = Wrapper(net)
        self.listed = [net]
        self.sampler = Sampler(net)
        self.closure = lambda x: net(x)
        self.only = only

    def ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        ways = {"net": self.net, "alias": self.alias, "wrapper": self.wrapper, "listed": self.listed[0]}
        return ways | {"sampler": self.sampler, "closure": self.closure}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ways = self.ways()
        called = [ways[self.only]] if self.only else ways.values()
        return torch.stack([F.cross_entropy(way(batch[0]), batch[1]) for way in called]).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        for name, way in self.ways().items():
            self.log(name, F.cross_entropy(way(batch[0]), batch[1]))


@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_every_reference_runs_the_variant(mode: str) -> None:
    module, callback = Referring(), qat(mode, module="net", start=0.5)
    run = trainer(callback, max_epochs=4)
    run.fit(module, loader())
    losses = []
    for variant in ("float", "fake_quant", "int8"):
        callback.use_variant(variant)
        (tested,) = run.test(module, loader(), verbose=False)
        assert len(set(tested.values())) == 1, tested
        losses.append(tested["net"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert callback.fidelity["sqnr_db"] > 40
    assert module.alias is module.net is module.wrapper.inner is callback.prepared


@pytest.mark.parametrize("only", ["alias", "wrapper", "listed", "sampler", "closure"])
def test_training_through_a_reference_is_training_of_the_network(only: str) -> None:
    ends = []
    for way in ("net", only):
        torch.manual_seed(0)
        module, callback = Referring(way), qat(module="net")
        trainer(callback).fit(module, loader())
        assert callback.quantized is not None
        ends.append(state(module))
    assert_same_state(*ends)


def test_post_training_quantization_tests_every_reference() -> None:
    module = Referring()
    trainer(max_epochs=3).fit(module, loader())
    ptq = PostTrainingQuantization(module="net", calibration_batches=4, calibration_dataloader=loader())
    (tested,) = trainer(ptq).test(module, loader(), verbose=False)
    (plain,) = trainer().test(module, loader(), verbose=False)
    assert len(set(tested.values())) == len(set(plain.values())) == 1
    assert tested["net"] != plain["net"]


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_checkpoints_have_the_network_under_each_name(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = state(Referring())
    module = Referring()
    module.load_state_dict(start)
    run = trainer(qat(mode, module="net"), max_epochs=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed, straight = Referring(), Referring()
    trainer(qat(mode, module="net"), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    straight.load_state_dict(start)
    trainer(qat(mode, module="net"), max_epochs=4).fit(straight, loader())
    assert_same_state(state(resumed), state(straight))


def test_a_float_checkpoint_with_several_names_is_loaded_into_a_run(tmp_path: Path) -> None:
    run, module = trainer(max_epochs=1), Referring()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    again, callback = Referring(), qat(module="net")
    trainer(callback, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "float.ckpt")
    assert callback.quantized is not None


class Part(Lit):
    """Keeps a part of its network, which its step calls."""

    net: Any
    kept: Any

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.net.features]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.kept[0](batch[0]).square().mean()


class Method(Lit):
    """Keeps the forward of its network, which its step calls after the network."""

    net: Any
    kept: Any

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.net.forward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.kept(batch[0]).square().mean()


class NamedPart(Lit):
    """Has a part of its network as an attribute of its own."""

    net: Any
    kept: Any

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.net.features

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.kept(batch[0]).square().mean()


@pytest.mark.parametrize("kind", [Part, Method, NamedPart])
def test_a_part_that_a_graph_has_replaced_is_refused_before_the_first_step(kind: type[Lit]) -> None:
    module = kind()
    before = state(Lit(copy.deepcopy(module.net)))
    with pytest.raises(NetworkError, match=r"A part of 'net' was called .* mode='eager'"):
        trainer(qat(module="net")).fit(module, loader())
    weights = {key: value for key, value in state(module).items() if key.startswith("net.") and key.endswith("weight")}
    assert all(torch.equal(value, before[key]) for key, value in weights.items())
    eager, callback = kind(), qat("eager", module="net")
    run = trainer(callback)
    run.fit(eager, loader())
    run.test(eager, loader(), verbose=False)
    assert callback.fidelity["sqnr_db"] > 40


class Held(nn.Module):
    """Runs a layer that is not its child."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.held = [layer]

    def forward(self, x: Tensor) -> Any:
        return self.held[0](x)


class InParts(nn.Module):
    """A network with a layer and its ReLU, and a module that holds a layer without having it as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.held = Held(self.pool)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.held(torch.relu(self.first(x))).flatten(1))


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_layers_that_stay_float_run_as_parts_of_the_graph(mode: str) -> None:
    module, callback = Lit(InParts()), qat(mode, exclude=["net.first", "net.held"])
    trainer(callback).fit(module, loader())
    assert [row.name for row in callback.quantized.coverage if row.quantized] == ["head"]


def test_after_the_fit_the_float_network_is_a_module_of_its_own_again() -> None:
    net = Net()
    module, callback = Lit(net), qat()
    within: list[Tensor] = []
    trainer(callback, LambdaCallback(on_train_end=lambda *_: within.append(net.eval()(IMAGES)))).fit(module, loader())
    assert torch.equal(within[0], module.net.eval()(IMAGES)), "in the fit, it is the prepared one"
    net.eval()
    plain = net(IMAGES)
    assert not torch.equal(plain, module.net(IMAGES))
    assert torch.equal(copy.deepcopy(net)(IMAGES), plain)
    assert torch.equal(pickle.loads(pickle.dumps(net))(IMAGES), plain)
    other, second = Lit(net), qat()
    run = trainer(second)
    run.fit(other, loader())
    run.test(other, loader(), verbose=False)
    assert second.fidelity["sqnr_db"] > 40


def test_nothing_is_left_on_the_modules_after_a_test() -> None:
    module, callback = Referring(), qat(module="net")
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    modules = [*module.modules(), *module.listed[0].modules()]
    assert not any("_compiled_call_impl" in vars(one) for one in modules)
    pickle.loads(pickle.dumps(callback.slots["net"]._of_replaced))


class Unused(Lit):
    """Trains something else than its network."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.other(batch[0].flatten(1)), batch[1])


def test_a_network_that_training_never_ran_is_reported_as_such() -> None:
    with pytest.warns(UserWarning, match="No training step ran the network"):
        trainer(qat(module="net", example_inputs=IMAGES)).fit(Unused(), loader())
