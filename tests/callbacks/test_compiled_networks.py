"""Networks that the user's code gives to ``torch.compile`` are quantized and run uncompiled, under their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qat_lightning import PostTrainingQuantization, load_quantized
from tests.callbacks.lit import Lit, Net, dataset, loader, qat, trainer

IMAGES = dataset()[:32][0]

WARNING = r"^Given to torch.compile: 'net.* runs uncompiled .* compile=True"


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


class InSetup(Lit):
    """Like the template of Lightning and Hydra."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.net = compiled(self.net)


class InInit(Lit):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(compiled(Net()), lr)


class InConfigureModel(Lit):
    def configure_model(self) -> None:
        if not hasattr(self.net, "_orig_mod"):
            self.net = compiled(self.net)


class Part(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.features = compiled(self.net.features)


class InPlace(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")
        self.net.features.compile(backend="eager")


KINDS: list[Callable[[], Lit]] = [InSetup, InInit, InConfigureModel, Part, InPlace]


@pytest.fixture(autouse=True)
def compiles_nothing() -> Any:
    """Whatever runs in the test, Dynamo sees no frame of it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["frames"]


def made(kind: Callable[[], Lit]) -> Lit:
    torch.manual_seed(0)
    return kind()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The entries of the float network by its own names."""
    state = {name.replace("._orig_mod", ""): value for name, value in module.state_dict().items()}
    return {name: state[name] for name in Lit().state_dict()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fit_is_that_of_the_uncompiled_network_under_the_names_of_the_compiled(
    mode: str, kind: Callable[[], Lit], tmp_path: Path
) -> None:
    plain, expected = made(Lit), qat(mode, start={"step": 1})
    trainer(expected).fit(plain, loader())
    module, callback = made(kind), qat(mode, start={"step": 1})
    fitting = trainer(callback)
    with pytest.warns(UserWarning, match=WARNING):
        fitting.fit(module, loader())
    fitting.test(module, loader(), verbose=False)
    got, wanted = weights(module), weights(plain)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert torch.equal(callback.quantized(IMAGES), expected.quantized(IMAGES))
    by_float_run = made(kind)
    by_float_run.setup("fit")
    by_float_run.configure_model()
    assert by_float_run.state_dict().keys() <= module.state_dict().keys()
    if mode == "fx":
        callback.quantized.save(tmp_path / "network.int8")
        assert torch.equal(load_quantized(tmp_path / "network.int8")(IMAGES), callback.quantized(IMAGES))


@pytest.mark.parametrize("kind", [InSetup, Part])
@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fit_resumes_and_goes_on(mode: str, kind: Callable[[], Lit], tmp_path: Path) -> None:
    module, fitting = made(kind), trainer(qat(mode, start={"step": 1}), max_epochs=1)
    fitting.fit(module, loader())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    resumed = made(kind)
    trainer(qat(mode, start={"step": 1}), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    fitting.fit_loop.max_epochs = 2
    names = module.state_dict().keys()
    fitting.fit(module, loader())  # compiles in its setup once more
    assert module.state_dict().keys() == names == resumed.state_dict().keys()


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_fit_begins_with_the_checkpoint_of_a_compiled_float_run(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    floats, running = InInit(lr=0.0), trainer(max_epochs=1)
    with torch.compiler.set_stance("force_eager"):
        running.fit(floats, loader())
    running.save_checkpoint(tmp_path / "float.ckpt")
    module, callback = InSetup(lr=0.0), qat(mode, float_checkpoint=tmp_path / "float.ckpt")
    trainer(callback, max_epochs=1).fit(module, loader())
    kept = callback.float_weights("net._orig_mod")
    assert all(torch.equal(kept[name], value) for name, value in floats.net._orig_mod.named_parameters())
    module = InSetup(lr=0.0)
    trainer(qat(mode), max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "float.ckpt")
    wanted = dict(floats.named_parameters())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ["net", "net.features", "net._orig_mod.features"])
def test_a_network_in_a_compiled_one_is_named_as_usual(name: str) -> None:
    module, callback = made(InInit), qat("fx", module=name)
    trainer(callback, max_epochs=1).fit(module, loader())
    inside = "net._orig_mod" if name == "net" else "net._orig_mod.features"
    assert list(callback.prepared_networks) == [inside]


def test_calibration_of_a_compiled_network() -> None:
    module, callback = made(InInit), PostTrainingQuantization(calibration_dataloader=loader(), calibration_batches=2)
    trainer(callback).test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] > 0.9


@pytest.mark.parametrize("head", ["net.head", "net._orig_mod.head"])
def test_patterns_may_leave_out_the_compiled_wrapper(head: str) -> None:
    module = made(InInit)
    callback = qat("fx", exclude=[head])
    trainer(callback, max_epochs=1).fit(module, loader())
    assert {row.name: row.reason for row in callback.coverage if not row.quantized and row.what == "layer"} == {
        "net._orig_mod.head": "excluded"
    }
