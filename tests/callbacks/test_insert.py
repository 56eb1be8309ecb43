"""Preparing networks in all kinds of LightningModules before weights, optimizers and devices."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.callbacks.post_training_quantization import PostTrainingQuantization
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError, ConversionError, NetworkError
from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.prepared import is_prepared
from tests.callbacks.lit import (
    CLASSES,
    MODES,
    Lit,
    Net,
    assert_same_state,
    dataset,
    loader,
    qat,
    ranges,
    state,
    trainer,
)

IMAGES = dataset()[:8][0]


def check_whole_run(
    module: LightningModule,
    callback: Any,
    loaders: Callable[[], Any] = loader,
    learnt: float = 0.9,
    classifies: bool = True,
) -> None:
    """Fit, test, predict; afterwards the prepared network is in place with every float key and parameter."""
    keys = set(module.state_dict())
    names = [name for name, _ in module.named_parameters()]
    parameters = list(module.parameters())
    fitting = trainer(callback)
    fitting.fit(module, loaders(), loaders())
    before = state(module)
    assert keys < set(before)
    assert any(key.endswith("min_val") for key in before)
    # The same objects in the same order: optimizer states of float checkpoints go by position.
    assert [name for name, _ in module.named_parameters()] == names
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    fitting.validate(module, loaders(), verbose=False)
    (metrics,) = fitting.test(module, loaders(), verbose=False)
    assert metrics["test/acc"] > learnt
    assert callback.fidelity["sqnr_db"] > 40.0
    if classifies:
        assert callback.fidelity["agreement"] > 0.99
    else:
        assert "agreement" not in callback.fidelity, "features are no scores of classes"
    assert_same_state(state(module), before)


class OwnForward(LightningModule):
    """Layers and ``forward`` of its own, with a constant, a parameter and a buffer besides."""

    _evaluate, training_step, test_step = Lit._evaluate, Lit.training_step, Lit.test_step
    validation_step, predict_step, configure_optimizers = (
        Lit.validation_step,
        Lit.predict_step,
        Lit.configure_optimizers,
    )

    def __init__(self, scale: float = 2.0, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(72, CLASSES)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.full((1,), 0.5))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.loss = nn.CrossEntropyLoss()

    def embed(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x)) * self.hparams["scale"] * self.gain + self.shift


class Derived(OwnForward):
    """Extends its parent's ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize("make", [OwnForward, Derived])
@pytest.mark.parametrize("mode", MODES)
def test_own_forward(mode: str, make: type[OwnForward]) -> None:
    module, callback = make(scale=1.5), qat(mode)
    check_whole_run(module, callback)
    assert type(module) is make
    assert module.hparams["scale"] == 1.5
    # Moved and cast as a whole, with what lies beside the layers.
    module.double().float()
    module.shift.fill_(7.0)
    trained = module.eval()(IMAGES)
    torch.testing.assert_close(callback.network("fake_quant")(IMAGES), trained)
    module.train()
    assert module.conv.training
    assert module.embed  # a method of the LightningModule


@pytest.mark.parametrize("mode", MODES)
def test_found_by_itself(mode: str) -> None:
    module, callback = Lit(), qat(mode)
    check_whole_run(module, callback)
    assert type(module) is Lit
    assert isinstance(module.accuracy, MulticlassAccuracy)
    assert is_prepared(module.net)
    assert callback.prepared is module.net


class TwoNetworks(Lit):
    """A teacher besides the network."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.teacher(x)


def test_an_unclear_network_is_an_error_that_names_the_candidates() -> None:
    with pytest.raises(NetworkError) as caught:
        trainer(qat()).fit(TwoNetworks(), loader())
    for part in ("'net' (Net)", "'teacher' (Sequential)", "module='net'", "module='.'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("module", ["net", ".", ["net", "teacher"], "net.features", "net.features.0"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_named(mode: str, module: Any) -> None:
    lit, callback = TwoNetworks(), qat(mode, module=module)
    check_whole_run(lit, callback, classifies="features" not in str(module))
    for name in [module] if isinstance(module, str) else module:
        assert is_prepared(lit if name == "." else lit.get_submodule(name))
    assert is_prepared(lit.teacher) == ("teacher" in module)


@pytest.mark.parametrize("mode", MODES)
def test_an_element_of_a_container(mode: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, CLASSES))
    module, callback = Lit(net), qat(mode, module="net.1")
    trainer(callback).fit(module, loader())
    assert is_prepared(net[1])
    assert not is_prepared(net[2])
    assert callback.quantized is not None


@pytest.mark.parametrize("name", ["nett", "net.x", "", "net.features.9"])
def test_a_name_that_does_not_exist(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"does not exist in Lit: .*net"):
        trainer(qat(module=name)).fit(Lit(), loader())


def test_nothing_to_quantize() -> None:
    class Empty(Lit):
        def __init__(self) -> None:
            super().__init__(nn.Flatten())

    with pytest.raises(NetworkError, match="holds no convolution or linear layer"):
        trainer(qat()).fit(Empty(), loader())


class BuiltInSetup(Lit):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage: str) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()


class BuiltInConfigureModel(Lit):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()


@pytest.mark.parametrize("make", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_built_late(mode: str, make: type[Lit]) -> None:
    module, callback = make(), qat(mode)
    fitting = trainer(callback)
    fitting.fit(module, loader())
    fitting.test(module, loader(), verbose=False)
    assert is_prepared(module.net)
    assert "configure_model" not in vars(module)
    (group,) = fitting.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.net.parameters()}


def test_the_api_of_the_network_stays() -> None:
    """Attributes and methods of the float network; unsupported ones raise a clear error."""
    module = Lit()
    trainer(qat("fx"), max_epochs=1).fit(module, loader())
    assert module.net.temperature == 2.0
    assert torch.equal(module.net.soften(torch.ones(2)), torch.full((2,), 0.5))
    with pytest.raises(NetworkError, match="mode='eager'"):
        module.net.features(IMAGES)
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        _ = module.net.nothing


def test_eager_keeps_every_submodule_callable() -> None:
    module = Lit()
    trainer(qat("eager"), max_epochs=1).fit(module, loader())
    assert module.net.features(IMAGES).shape == (8, 8, 3, 3)


# Examples


class Many(nn.Module):
    """Two inputs, a keyword, and a dict or a tuple of outputs."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict
        self.body = nn.Conv2d(1, 8, 3, stride=2)
        self.table = nn.Linear(3, 72)
        self.head = nn.Linear(72, CLASSES)

    def forward(self, image: Tensor, table: Tensor, *, scale: Tensor | None = None, gain: float = 1.0) -> Any:
        hidden = F.relu(self.body(image).flatten(1) + self.table(table))
        scores = self.head(hidden)
        if scale is not None:
            scores = scores * scale
        return {"scores": scores * gain, "hidden": hidden} if self.as_dict else (scores * gain, hidden)


class DictBatches(Lit):
    def __init__(self, as_dict: bool) -> None:
        super().__init__(Many(as_dict))
        self.as_dict = as_dict

    def forward(self, batch: Any) -> Tensor:
        outputs = self.net(batch["image"], table=batch["table"], scale=batch["scale"], gain=0.5)
        return outputs["scores"] if self.as_dict else outputs[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["label"])

    def _evaluate(self, stage: str, batch: Any) -> None:
        scores = self(batch)
        self.accuracy(scores, batch["label"])
        self.log(f"{stage}/acc", self.accuracy)


def dict_loader() -> DataLoader[Any]:
    images, labels = dataset()[:]
    rows = [
        {"image": images[n], "table": torch.ones(3) * n % 2, "scale": torch.ones(1), "label": labels[n]}
        for n in range(len(labels))
    ]
    return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_several_inputs_keywords_and_outputs(mode: str, as_dict: bool) -> None:
    module, callback = DictBatches(as_dict), qat(mode)
    check_whole_run(module, callback, dict_loader, learnt=0.4)
    args, kwargs = callback.example_inputs_
    assert [tuple(a.shape) for a in args] == [(16, 1, 8, 8)]
    assert set(kwargs) == {"table", "scale", "gain"}


class OneInput(Lit):
    """Its step fails before calling the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise KeyError("no such key")


def test_a_step_that_fails_before_the_network_is_called() -> None:
    with pytest.raises(NetworkError) as caught:
        trainer(qat()).fit(OneInput(), loader())
    for part in ("'net'", "KeyError", "no such key", "example_inputs", "example_input_array"):
        assert part in str(caught.value)


def test_a_fit_that_failed_to_begin_leaves_no_trace() -> None:
    module, callback = OneInput(), qat()
    before = set(vars(module))
    with pytest.raises(NetworkError):
        trainer(callback).fit(module, loader())
    assert set(vars(module)) - before <= {"prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"}
    assert callback.prepared is None
    module.__class__ = Lit  # mended
    trainer(callback).fit(module, loader())
    assert module.net is callback.prepared


def test_a_setup_that_failed_leaves_no_trace() -> None:
    class Fails(Lit):
        def setup(self, stage: str) -> None:
            raise ValueError("not yet")

    module, callback = Fails(), qat()
    with pytest.raises(ValueError, match="not yet"):
        trainer(callback).fit(module, loader())
    assert "configure_model" not in vars(module)
    module.__class__ = Lit
    trainer(callback).fit(module, loader())
    assert module.net is callback.prepared


@pytest.mark.parametrize("given", [IMAGES, (IMAGES,), [IMAGES], {"x": IMAGES}], ids=["tensor", "tuple", "list", "dict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_given_by_the_user(mode: str, given: Any) -> None:
    module, callback = Lit(), qat(mode, example_inputs=given)
    trainer(callback).fit(module, loader())
    args, kwargs = callback.example_inputs_
    assert torch.equal([*args, *kwargs.values()][0], IMAGES)


@pytest.mark.parametrize("given", ["images", 3, (), {}])
def test_an_example_without_a_tensor_is_refused_at_construction(given: Any) -> None:
    with pytest.raises(NetworkError, match="example_inputs holds no tensor"):
        qat(example_inputs=given)


def test_given_for_several_networks() -> None:
    module = TwoNetworks()
    callback = qat(module=["net", "teacher"], example_inputs={"net": IMAGES, "teacher": (IMAGES[:4],)})
    trainer(callback).fit(module, loader())
    assert callback.parts()["teacher"].example.args[0].shape[0] == 4
    with pytest.raises(NetworkError, match=r"'net', 'teacher'"):
        trainer(qat(module=["net", "teacher"], example_inputs=IMAGES)).fit(TwoNetworks(), loader())


@pytest.mark.parametrize("mode", MODES)
def test_example_input_array(mode: str) -> None:
    module, callback = Lit(), qat(mode)
    module.example_input_array = IMAGES[:5]
    trainer(callback, enable_model_summary=True).fit(module, loader())
    assert torch.equal(callback.example_inputs_[0][0], IMAGES[:5])


def test_a_batch_of_one_is_doubled_and_a_large_one_cut() -> None:
    for batch_size, kept in ((1, 2), (64, 32)):
        callback = qat()
        module = Lit(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))
        trainer(callback, max_epochs=1, limit_train_batches=1).fit(module, loader(batch_size=batch_size))
        assert callback.example_inputs_[0][0].shape[0] == kept


class FetchesOptimizersFirst(Lit):
    """Manual optimization as in Lightning's documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in (body, head):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net.features, self.net.head)]


@pytest.mark.parametrize("mode", MODES)
def test_manual_optimization(mode: str) -> None:
    module, callback = FetchesOptimizersFirst(), qat(mode)
    run = trainer(callback)
    run.fit(module, loader())
    assert callback.quantized is not None
    assert run.global_step == 2 * run.num_training_batches * run.max_epochs


# Data


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([dataset()[n] for n in range(64)])


class CollectionOfBatches(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        return torch.stack([super(CollectionOfBatches, self).training_step(part, batch_idx) for part in parts]).sum()


@pytest.mark.parametrize(
    ("make", "loaders"),
    [
        (Lit, lambda: DataLoader(Stream(), batch_size=16)),
        (Lit, lambda: DataLoader(dataset(), batch_sampler=BatchSampler(RandomSampler(range(64)), 16, True))),
        (Lit, lambda: loader(num_workers=1)),
        (CollectionOfBatches, lambda: {"labelled": loader(), "other": loader(batch_size=8)}),
        (CollectionOfBatches, lambda: [loader(), loader(batch_size=8)]),
    ],
    ids=["iterable", "batch_sampler", "workers", "dict_of_loaders", "list_of_loaders"],
)
def test_loaders(make: type[Lit], loaders: Callable[[], Any]) -> None:
    callback = qat()
    trainer(callback, max_epochs=1, limit_train_batches=2).fit(make(), loaders())
    assert callback.quantized is not None


class SeveralValidationLoaders(Lit):
    """The example comes from a validation step with ``dataloader_idx``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.is_grad_enabled():
            raise LookupError("only in training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)


def test_several_validation_loaders() -> None:
    trainer(qat(), max_epochs=1).fit(SeveralValidationLoaders(), loader(), [loader(), loader()])


class Halves(LightningDataModule):
    """Hooks of the DataModule convert the batch for the step."""

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"image": batch[0], "label": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch["image"] + 0.1 * torch.rand(1), batch["label"]]


def test_batch_hooks_of_a_data_module() -> None:
    callback = qat()
    trainer(callback).fit(Lit(), datamodule=Halves())
    assert callback.quantized is not None


class RandomStates(Callback):
    """Records every random state before preparation and at the beginning of the fit."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.seen: list[Any] = []

    def _keep(self) -> None:
        torch_states = [state.tolist() for state in (torch.get_rng_state(), self.generator.get_state())]
        self.seen.append([torch_states, np.random.get_state()[1].tolist(), random.getstate()])  # type: ignore[index]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._keep()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep()


class Noisy(Lit):
    """Uses every random generator in its step, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        noise = torch.rand(1) + np.random.rand() + random.random()
        self.log("noise", noise)
        return super().training_step((batch[0] + float(noise) * 0.01, batch[1]), batch_idx)


@pytest.mark.parametrize("mode", MODES)
def test_finding_an_example_moves_nothing(mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    watch, module = RandomStates(generator), Noisy()
    before = state(module)
    trainer(watch, qat(mode), max_epochs=0).fit(module, loader(shuffle=True, generator=generator))
    first, second = watch.seen
    assert first == second
    now = state(module)
    assert_same_state({key: now[key] for key in before}, before)
    assert all(torch.isinf(value) for value in ranges(module).values())
    assert module.net.training


def test_a_stateful_loader_begins_at_its_beginning() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    seen: list[list[Tensor]] = []
    for callbacks in ([], [qat()]):
        batches: list[Tensor] = []

        class Keep(Callback):
            def on_train_batch_start(self, *args: Any, batches: list[Tensor] = batches) -> None:
                batches.append(args[2][0])

        torch.manual_seed(0)
        data = stateful.StatefulDataLoader(dataset(), batch_size=16, shuffle=True)
        trainer(*callbacks, Keep()).fit(Lit(), data)
        seen.append(batches)
    assert all(torch.equal(left, right) for left, right in zip(*seen, strict=True))


class WithRecurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.flatten(1, 2))[0][:, -1])


def test_what_will_stay_float_is_said_before_the_training() -> None:
    """Layers that are excluded on purpose cause no warning."""
    with pytest.warns(UserWarning, match=r"1 of \d layers will stay float: net\.rows \(GRU\)"):
        trainer(qat("fx"), max_steps=1).fit(Lit(WithRecurrence()), loader())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(qat("fx", exclude=["net.head"]), max_steps=1).fit(Lit(), loader())
    assert not [warning for warning in caught if "will stay float" in str(warning.message)]


class Scored(nn.Module):
    """A custom layer, in a block that no trace can follow and that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        x = x @ self.weight
        return x, float(x.detach().sum())


class WithScores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scored, self.head = nn.Linear(64, 8), Scored(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scored(self.stem(x.flatten(1)))[0])


@pytest.mark.parametrize("mode", ["fx", "eager", "auto"])
def test_weights_that_functions_multiply_by_are_said_to_stay_float(mode: str) -> None:
    callback = qat(mode)
    with pytest.warns(UserWarning, match=r"1 of 3 layers will stay float: net\.scored \(Scored\)"):
        trainer(callback, max_steps=1).fit(Lit(WithScores()), loader())
    share = int8_share([*callback.quantized.coverage, *callback.quantized.operations])
    inputs = 64 * 8 + 8 * CLASSES
    assert share == pytest.approx(inputs / (inputs + 64))


def test_a_name_in_a_warning_can_be_copied_into_the_settings() -> None:
    with pytest.warns(UserWarning, match="will stay float") as caught:
        trainer(qat("fx"), max_steps=1).fit(Lit(WithRecurrence()), loader())
    (message,) = (str(one.message) for one in caught if "will stay float" in str(one.message))
    name = message.partition("float: ")[2].partition(" (GRU)")[0]
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        trainer(qat("fx", exclude=[name]), max_steps=1).fit(Lit(WithRecurrence()), loader())
    assert not [warning for warning in again if "stay float" in str(warning.message)]


class Hooked(nn.Module):
    """Layers with the hooks of the old ``weight_norm``."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.body = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 8)))
        self.head = nn.utils.spectral_norm(nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("callback", [QuantizationAwareTraining, PostTrainingQuantization])
def test_hooks_that_compute_weights_are_refused_with_what_to_use(callback: Any, mode: str) -> None:
    with pytest.raises(NetworkError) as caught:
        trainer(callback(mode=mode)).fit(Lit(Hooked()), loader())
    message = str(caught.value)
    for part in ("weight_norm on 'body.1'", "spectral_norm on 'head'", "parametrizations.weight_norm"):
        assert part in message
    assert "example_inputs" not in message


def test_there_is_nothing_to_save_before_a_fit() -> None:
    evaluated = r"trainer\.test, trainer\.predict or trainer\.fit"
    for callback, calls in ((qat(), r"trainer\.fit"), (PostTrainingQuantization(), evaluated)):
        with pytest.raises(ConversionError, match=rf"no int8 network to save: run {calls} with this callback first\.$"):
            callback.save("never.int8")
        with pytest.raises(ConversionError, match=rf"nothing to convert yet: run {calls} with this callback first\.$"):
            callback.convert()
    with pytest.raises(ConversionError, match="with convert_on_fit_end=True"):
        qat(convert_on_fit_end=False).save("never.int8")


def test_calibration_without_data_names_the_method_of_the_trainer() -> None:
    with pytest.raises(ConfigurationError, match=r"trainer\.test was given no training data"):
        trainer(PostTrainingQuantization()).test(Lit(), loader(), verbose=False)
