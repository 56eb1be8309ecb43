"""Compiled training steps: the same training, one graph between two switches, and no remaining state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qat_lightning import Example, QuantizationMonitor, Recipe, prepare
from qat_lightning.demos import CharTransformer
from qat_lightning.errors import ConfigurationError
from qat_lightning.modes import compiling
from qat_lightning.modes.compiling import CompiledSteps
from qat_lightning.settings.scheme import Scheme
from tests.callbacks.lit import CLASSES, MODES, Lit, dataset, loader, qat, trainer
from tests.callbacks.test_insert import OwnForward
from tests.support.nightly import nightly_except

IMAGES = dataset()[:32][0]


class Residual(nn.Module):
    """In-place additions, and a ReLU module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts compilations; runs AOTAutograd without the slow code generator."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    return counter


SOON = {"start": {"step": 1}, "freeze_observers": None, "freeze_batchnorm": None}
"""A schedule without a switch after the first step that is compiled."""
SCHEDULE = {"start": {"step": 3}, "freeze_observers": {"step": 6}, "freeze_batchnorm": {"step": 9}}


def fitted(mode: str, make: Any, *, compile: bool, batches: Any = None, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, callback = make(), qat(mode, compile=compile, **(SCHEDULE | settings))
    fitting = trainer(callback, max_epochs=3)
    fitting.fit(module, batches if batches is not None else loader(), loader(32, 8))
    return callback, module


def assert_alike(left: nn.Module, right: nn.Module, tolerance: float = 1e-3) -> None:
    for key, value in left.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(right.state_dict()[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "make"),
    [
        pytest.param("eager", lambda: Lit(Residual()), id="eager-in place", marks=pytest.mark.nightly),
        pytest.param("fx", OwnForward, id="fx-own forward"),
        pytest.param("pt2e", lambda: Lit(Residual()), id="pt2e-in place", marks=pytest.mark.nightly),
        pytest.param("eager", OwnForward, id="eager-own forward", marks=pytest.mark.nightly),
        pytest.param("fx", lambda: Lit(Residual()), id="fx-in place", marks=pytest.mark.nightly),
        pytest.param("pt2e", OwnForward, id="pt2e-own forward", marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_fit_is_the_same_fit_in_one_graph_between_two_switches(mode: str, make: Any, graphs: Any) -> None:
    plain, expected = fitted(mode, make, compile=False)
    assert graphs.frame_count == 0
    callback, module = fitted(mode, make, compile=True)
    assert graphs.frame_count == 4, "before rounding, with it, without observers, with BatchNorm frozen"
    assert set(module.state_dict()) == set(expected.state_dict())
    assert_alike(expected, module)
    torch.testing.assert_close(callback.quantized(IMAGES), plain.quantized(IMAGES), rtol=0.0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_on_the_lightning_module(mode: str, graphs: Any) -> None:
    callback, module = fitted(mode, Lit, compile=True, **SOON)
    assert graphs.frame_count == 1
    assert not any(isinstance(part.__dict__.get("forward"), CompiledSteps) for part in module.modules())
    again, other = pickle.loads(pickle.dumps((callback, copy.deepcopy(module))))
    assert torch.equal(again.quantized(IMAGES), callback.quantized(IMAGES))
    assert torch.equal(other.eval().net(IMAGES), module.eval().net(IMAGES))
    before = graphs.frame_count
    trainer(callback).test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] > 0.95
    assert graphs.frame_count == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_nothing_is_left_after_an_exception(mode: str, graphs: Any) -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 3:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(qat(mode, compile=True)).fit(module, loader())
    assert graphs.frame_count == 1
    assert not any(isinstance(part.__dict__.get("forward"), CompiledSteps) for part in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_a_last_batch_of_another_size_is_one_more_graph(mode: str, graphs: Any) -> None:
    callback, _ = fitted(mode, Lit, compile=True, batches=loader(70), **SOON)
    assert graphs.frame_count == 2
    assert callback.quantized is not None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Scheme(learned_step="lsq+"), Scheme(weight_bits=4)], ids=["lsq+", "4 bits"])
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_other_schemes(mode: str, scheme: Scheme, graphs: Any) -> None:
    settings = SOON | {"scheme": scheme}
    _, expected = fitted(mode, lambda: Lit(lr=0.0005), compile=False, **settings)
    _, module = fitted(mode, lambda: Lit(lr=0.0005), compile=True, **settings)
    assert graphs.frame_count == 1
    assert_alike(expected, module, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", nightly_except(MODES, "fx"))
def test_a_resumed_fit_ends_where_the_uninterrupted_one_does(mode: str, graphs: Any, tmp_path: Any) -> None:
    _, expected = fitted(mode, Lit, compile=True)
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    broken_off = {"max_epochs": 3, "max_steps": 8, "enable_checkpointing": True}
    trainer(qat(mode, compile=True, **SCHEDULE), saving, **broken_off).fit(Lit(), loader())
    module = Lit()
    trainer(qat(mode, compile=True, **SCHEDULE), max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == set(expected.state_dict())
    assert_alike(expected, module)


@pytest.mark.slow
def test_steps_that_are_looked_at_run_as_they_are(graphs: Any) -> None:
    torch.manual_seed(0)
    module, callback = Lit(), qat("fx", compile=True)
    monitor = QuantizationMonitor(every_n_steps=2)
    trainer(callback, monitor, max_epochs=2).fit(module, loader())
    assert graphs.frame_count == 1


def test_without_a_compiler_the_error_says_what_to_install() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no_such_compiler",)}),
        pytest.raises(ConfigurationError, match=r"apt install g\+\+"),
    ):
        trainer(qat(compile=True)).fit(Lit(), loader())


def test_a_word_is_no_flag() -> None:
    with pytest.raises(ConfigurationError, match="compile='yes' is not valid"):
        qat(compile="yes")


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_generated_code_trains_alike(mode: str) -> None:
    torch._dynamo.reset()
    _, expected = fitted(mode, lambda: Lit(Residual()), compile=False)
    callback, module = fitted(mode, lambda: Lit(Residual()), compile=True)
    assert_alike(expected, module)
    assert callback.quantized is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_except(["dynamic", "weight_only"], "weight_only"))
def test_layers_that_are_rounded_where_they_are_compile_in_any_code(kind: str) -> None:
    """A network that Dynamo cannot trace while a torch function mode is active."""
    torch.manual_seed(0)
    network, tokens = CharTransformer(context=8, dim=32, depth=1), torch.randint(0, 256, (2, 8))
    recipe = Recipe("eager", "x86", kind=kind, trained=True)  # type: ignore[arg-type]
    prepared = prepare(network, Example((tokens,)), recipe).train()
    plain = copy.deepcopy(prepared)
    CompiledSteps(prepared, prepared, "network")
    for _ in range(3):
        ours, wanted = prepared(tokens), plain(tokens)
        ours.sum().backward()
        wanted.sum().backward()
        assert torch.allclose(ours, wanted, atol=1e-4)
