"""Calibration data if training_step does not call the network in evaluation mode, or fails after calling it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat_lightning import Example, PostTrainingQuantization
from qat_lightning.callbacks.parts import calibrated_copies
from qat_lightning.errors import ConfigurationError, ConversionError, NetworkError
from qat_lightning.recipes.bias_correction import correct_biases
from tests.callbacks.lit import CLASSES, Lit, Net, loader, qat, trainer


class Losses(Net):
    """Like a detector: losses in training, scores otherwise."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:  # type: ignore[override]
        scores = super().forward(x)
        return {"loss": F.cross_entropy(scores, target)} if self.training else [scores]


class Detector(Lit):
    """Its training_step can only process losses."""

    def __init__(self) -> None:
        super().__init__(Losses())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.net(batch[0], batch[1]).values())  # type: ignore[return-value]

    def _evaluate(self, stage: str, batch: Any) -> None:
        self.log(f"{stage}/acc", (self.net(batch[0])[0].argmax(1) == batch[1]).float().mean())


class TrainsOnly(Lit):
    """Its step does not reach the network in evaluation mode."""

    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.net.training:
            raise LookupError("no student in evaluation")
        self.steps += int(self.net.features[0].weight.requires_grad and torch.is_grad_enabled())
        return super().training_step(batch, batch_idx)


class Two(Lit):
    """Two networks, one after the other."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 3))
        self.other = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x.flatten(1)))


class NoValidation(TrainsOnly):
    """Like its base, without another step."""

    validation_step = None  # type: ignore[assignment]


def test_a_step_that_fails_once_the_network_was_called_has_done_its_part() -> None:
    torch.manual_seed(0)
    module, callback = Detector(), PostTrainingQuantization("eager")
    fitting = trainer(callback)
    fitting.fit(module, loader())
    assert fitting.test(module, loader(), verbose=False)[0]["test/acc"] > 0.9


@pytest.mark.parametrize("bias_correction", [False, True])
def test_batches_come_from_validation_where_the_training_step_does_not_call_the_network(bias_correction: bool) -> None:
    """Batches of 7 samples, unlike those of the training loader."""
    module, callback = TrainsOnly(), PostTrainingQuantization(bias_correction=bias_correction)
    sizes: list[int] = []
    fitting = trainer(callback, max_epochs=1)
    module.validation_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        sizes.append(len(batch[0])),
        TrainsOnly.validation_step(module, batch, batch_idx),
    )
    fitting.fit(module, loader(), loader(7, batch_size=7))
    assert set(sizes) == {7}
    assert callback.quantized is not None


class Indexed(TrainsOnly):
    """Validates on several loaders; notes the size of each batch and the index of its loader."""

    def __init__(self, note: Callable[[tuple[int, int]], None]) -> None:
        super().__init__()
        self.note = note  # a list in an attribute would be restored

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        self.note((len(batch[0]), dataloader_idx))
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("collect", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"])
def test_several_validation_loaders_calibrate_one_after_the_other_as_they_validate(collect: Any) -> None:
    seen: list[tuple[int, int]] = []
    module, callback = Indexed(seen.append), PostTrainingQuantization()
    validation = collect([loader(7, batch_size=7), loader(5, batch_size=5)])
    trainer(callback, max_epochs=1, limit_val_batches=0).fit(module, loader(), validation)
    assert callback.quantized is not None
    assert seen[-2:] == [(7, 0), (5, 1)]


def test_without_a_validation_loader_the_validation_step_gets_the_training_batches() -> None:
    module, callback = TrainsOnly(), PostTrainingQuantization()
    trainer(callback, max_epochs=1).fit(module, loader(), [])
    assert callback.quantized is not None


class Pairs(Lit):
    """Trains on a batch of each of two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


class Takes(Callback):
    """Notes the batches of the fit."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["a"][0])


@pytest.mark.parametrize("combine", [dict, CombinedLoader], ids=lambda combine: combine.__name__)
def test_what_several_training_loaders_give_together_calibrates_and_is_not_taken_from_the_training(
    combine: Any,
) -> None:
    """Bias correction reads batches in the middle of an epoch, calibration at the end."""
    loaders = combine({"a": loader(batch_size=8), "b": loader(batch_size=8)})
    takes, callback = Takes(), qat(start={"step": 4}, bias_correction_batches=2)
    trainer(callback, takes, max_epochs=1).fit(Pairs(), loaders)
    assert torch.equal(torch.cat(takes.batches), torch.cat([images for images, _ in loader()]))
    assert callback.quantized is not None
    calibrated = PostTrainingQuantization()
    trainer(calibrated, max_epochs=1).fit(Pairs(), loaders)
    assert calibrated.quantized is not None


def test_calibration_draws_from_no_generator_of_several_loaders() -> None:
    states = []
    for more in ([], [PostTrainingQuantization()]):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        first, second = (loader(shuffle=True, generator=generator) for generator in generators)
        trainer(*more, max_epochs=1).fit(Pairs(), {"a": first, "b": second})
        states.append([generator.get_state() for generator in generators])
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("recipes", [{}, {"bias_correction": True}, {"sequential_mse": True, "bias_correction": True}])
def test_recipes_use_the_batches_of_the_calibration_and_read_none_again(recipes: dict[str, bool]) -> None:
    class Reads(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    seen: list[Tensor] = []
    torch.manual_seed(0)
    module, batches = Reads(), loader()
    given = PostTrainingQuantization("eager", calibration_batches=3, calibration_dataloader=iter(batches), **recipes)
    trainer(given).test(module, loader(), verbose=False)
    assert len(seen) == 3
    called = PostTrainingQuantization("eager", calls=seen, **recipes)
    trainer(called).test(module, loader(), verbose=False)
    x = next(iter(batches))[0]
    assert torch.equal(given.quantized(x), called.quantized(x))


def test_only_the_step_that_calls_all_networks_gives_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstAlone(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0].flatten(1)).square().mean()

    counts: list[int] = []

    def counted(prepared: nn.Module, calls: list[Any], reference: Any) -> dict[str, float]:
        counts.append(len(calls))
        return correct_biases(prepared, calls, reference)

    monkeypatch.setattr(calibrated_copies, "correct_biases", counted)
    callback = PostTrainingQuantization("eager", module=["net", "other"], bias_correction=True)
    fitting = trainer(callback, max_epochs=1)
    fitting.fit(FirstAlone(), loader(), loader(7, batch_size=7))
    assert counts == [1, 1], "one batch of validation for each network, and none of training for the first"


def test_what_will_not_calibrate_is_refused_before_the_training_and_the_remedy_works() -> None:
    module = NoValidation()
    with pytest.raises(NetworkError, match=r"training_step failed \(LookupError.*PostTrainingQuantization\(calls="):
        trainer(PostTrainingQuantization()).fit(module, loader())
    assert module.steps == 0
    callback = PostTrainingQuantization(calls=[batch[0] for batch in loader()], bias_correction=True)
    trainer(callback).fit(module, loader())
    assert module.steps == 8
    assert callback.quantized is not None


def test_calls_of_several_networks() -> None:
    inputs = torch.randn(8, 3)
    calls = {"net": (torch.randn(8, 64) for _ in range(3)), "other": [{"input": inputs}, (inputs,)]}
    callback = PostTrainingQuantization(module=["net", "other"], calls=calls)
    trainer(callback).test(Two(), loader(), verbose=False)
    assert set(callback.quantized) == {"net", "other"}


@pytest.mark.parametrize(
    "settings",
    [
        {"calls": torch.zeros(3)},
        {"calls": 3},
        {"calls": [torch.zeros(3)], "kind": "dynamic"},
        {"calls": [torch.zeros(3)], "calibration_dataloader": [3]},
    ],
    ids=str,
)
def test_calls_that_are_not_possible(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="calls="):
        PostTrainingQuantization(**settings)


def test_no_calls_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no call of 'net'"):
        trainer(PostTrainingQuantization(calls=[])).fit(Lit(), loader())


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        scores: Tensor = super().forward(x)
        return scores if scale is None else scores * scale


class Scales(Lit):
    def __init__(self) -> None:
        super().__init__(Scaled())

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x, scale=torch.ones(len(x), 1))
        return scores


def test_a_call_has_positional_and_keyword_inputs() -> None:
    calls = [Example((torch.randn(8, 1, 8, 8),), {"scale": torch.ones(8, 1)}) for _ in range(2)]
    callback, module = PostTrainingQuantization("fx", calls=calls), Scales()
    fitting = trainer(callback)
    fitting.fit(module, loader())
    fitting.test(module, loader(), verbose=False)
    assert all(row.quantized for row in callback.quantized.coverage)


class GrowsLater(Lit):
    """Its last batch has images of another size, which its float network takes."""

    def __init__(self) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
        )
        super().__init__(net)


def test_a_calibration_that_fails_after_the_training_costs_int8_and_no_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, side, 8), torch.arange(8) % CLASSES) for side in (8, 8, 8, 12)]
    callback, saved = PostTrainingQuantization("pt2e"), ModelCheckpoint(tmp_path, save_last=True)
    ended: list[str] = []
    later = LambdaCallback(on_train_end=lambda *_: ended.append("train"), on_fit_end=lambda *_: ended.append("fit"))
    module = GrowsLater()
    fitting = trainer(callback, later, saved, max_epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="There is no int8 network of the fit that ended at step 4"):
        fitting.fit(module, DataLoader(batches, batch_size=None))
    assert ended == ["train", "fit"]
    assert (tmp_path / "last.ckpt").is_file()
    assert callback.quantized is None
    with pytest.raises(ConversionError, match="There is no int8 network"):
        callback.save(tmp_path / "net.int8")
