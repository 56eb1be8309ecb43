"""``runtime="plain"``: int8 networks on plain tensors, from the callbacks and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from qat_lightning import (
    Example,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Recipe,
    calibrate,
    convert,
    load_quantized,
    prepare,
)
from qat_lightning.errors import CombinationError, ConfigurationError, ConversionError, ExportError
from qat_lightning.export import plain_tensors
from qat_lightning.modes.decomposed import int8
from qat_lightning.modes.decomposed.plain import PlainLayer
from tests.callbacks.lit import Lit, dataset, loader, trainer
from tests.support.exactness import SEVEN_BITS

IMAGES = dataset()[:32][0]
PAIRS = [("fx", "x86"), ("fx", "onednn"), ("eager", "x86"), ("pt2e", "x86")]


def fit(mode: str, backend: str, runtime: Any) -> tuple[Any, Lit, QuantizationAwareTraining]:
    seed_everything(0, verbose=False)
    callback, module = QuantizationAwareTraining(mode, backend, runtime=runtime, scheme=SEVEN_BITS), Lit()
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader(), loader())
    return fitting, module, callback


@pytest.mark.filterwarnings("error:The int8 network is not compiled")
@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_a_fit_ends_in_plain_tensors_and_its_file_keeps_them(mode: str, backend: str, tmp_path: Path) -> None:
    fitting, module, callback = fit(mode, backend, "plain")
    quantized = callback.quantized
    assert (quantized.recipe.mode, quantized.recipe.runtime) == ("pt2e", "plain")
    fitting.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] == 1.0
    assert quantized.network.runs == "onednn"
    layers = [module for module in quantized.network._compiled.modules() if isinstance(module, PlainLayer)]
    assert len(layers) == sum(row.quantized for row in quantized.coverage)
    callback.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8")
    assert torch.equal(loaded(IMAGES), quantized(IMAGES))
    assert loaded.network.runs == "onednn"


def test_a_checkpoint_goes_with_either_runtime() -> None:
    recipe = Recipe("fx", "x86")
    assert not recipe.differences(Recipe("fx", "x86", runtime="plain"))


def made(mode: str, tmp_path: Path) -> Path:
    call = Example((torch.randn(8, 3, 8, 8),))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    prepared = prepare(network, call, Recipe(mode, "x86", SEVEN_BITS, kind="static"))
    calibrate(prepared, [call.args[0]])
    convert(prepared, call).save(tmp_path / "model.int8")
    return tmp_path / "model.int8"


def test_a_file_can_be_loaded_for_it(tmp_path: Path) -> None:
    loaded = load_quantized(made("pt2e", tmp_path), runtime="plain")
    loaded(torch.randn(3, 3, 8, 8))
    assert loaded.network.runs == "onednn"


def test_a_file_of_packed_weights_names_the_function_that_turns_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"mode 'fx': load it without runtime=, and .*to_plain_tensors"):
        load_quantized(made("fx", tmp_path), runtime="plain")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QuantizationAwareTraining(runtime="fast"), "'fast' is unknown: use 'plain', or None"),
        (lambda: QuantizationAwareTraining(backend="fbgemm", runtime="plain"), "use backend='x86'"),
        (lambda: QuantizationAwareTraining("pt2e", "xnnpack", runtime="plain"), "use backend='x86'"),
        (lambda: QuantizationAwareTraining("parts", runtime="plain"), "use mode='fx'"),
        (lambda: QuantizationAwareTraining(kind="dynamic", runtime="plain"), "use kind='static'"),
        (lambda: PostTrainingQuantization(kind="weight_only", runtime="plain"), "use kind='static'"),
    ],
)
def test_what_it_does_not_run_is_refused_at_once(make: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_it_is_tried_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise ExportError("no counterpart")

    monkeypatch.setattr(plain_tensors, "in_plain_ops", fails)
    callback, module = QuantizationAwareTraining(runtime="plain"), Lit()
    fitting = trainer(callback, max_epochs=1)
    with pytest.raises(ExportError, match="no counterpart"):
        fitting.fit(module, loader(), loader())
    assert fitting.global_step == 0


class LeNet(nn.Module):
    """Flattens with ``view``, which needs a tensor in the order of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        result: Tensor = self.head(x.view(x.size(0), -1))
        return result


@pytest.mark.parametrize("mode", ["fx", "eager", "pt2e"])
def test_flattening_by_view_is_tested_as_trained(mode: str) -> None:
    callback, module = QuantizationAwareTraining(mode, "x86", runtime="plain", scheme=SEVEN_BITS), Lit(LeNet())
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(module, loader(), loader())
    fitting.test(module, loader(), verbose=False)
    assert callback.fidelity["agreement"] == 1.0
    assert callback.quantized.network.runs == "onednn"


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_an_int8_network_that_cannot_run_is_refused_before_the_first_step(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("no kernel runs this")

    monkeypatch.setattr(int8.Int8Network, "_run_kernels", lambda self, tensors: self.__dict__.update(_compiled=fails))
    fitting = trainer(QuantizationAwareTraining(mode, "x86", runtime="plain"), max_epochs=1)
    with pytest.raises((ConversionError, ExportError), match=r"cannot run.*no kernel runs this"):
        fitting.fit(Lit(), loader(), loader())
    assert fitting.global_step == 0


def test_a_combination_that_a_sweep_skips() -> None:
    with pytest.raises(CombinationError):
        Recipe("fx", "qnnpack", runtime="plain")
