"""A network that computes its own loss is called without labels, in each form and in its file."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, calibrate, convert, load_quantized, prepare
from qat_lightning.errors import NetworkError
from qat_lightning.export.plain_tensors import in_its_runtime

ROWS, INPUTS, CLASSES = 4, 4, 3


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 8), nn.Linear(8, CLASSES)

    def scores(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found


class Dict(Base):
    """As networks of transformers."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.scores(x)
        return {"logits": scores} if labels is None else {"loss": F.cross_entropy(scores, labels), "logits": scores}


class Pair(Base):
    """As nanoGPT: the loss is None without targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        scores = self.scores(x)
        return scores, None if targets is None else F.cross_entropy(scores.view(-1, CLASSES), targets.view(-1))


class Bare(Base):
    """Returns another structure without labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.scores(x)
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)


class Weighed(Base):
    """The loss has weights of classes, is a module, and has two inputs, of which one is given by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none")

    def forward(self, x: Tensor, labels: Tensor | None = None, *, weights: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.scores(x)
        found = {"scores": scores, "chances": scores.softmax(-1)}
        if labels is not None and weights is not None:
            found["loss"] = (self.loss(scores, labels) * weights).mean()
        return found


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Structured(Base):
    """Returns a dataclass, and reads several inputs."""

    def forward(self, data: dict[str, Tensor], labels: Tensor | None = None) -> Output:
        scores = self.scores(data["a"] + data["b"])
        return Output(scores, None if labels is None else F.mse_loss(scores, labels))


LABELS = torch.arange(ROWS) % CLASSES
GIVEN: dict[type[Base], dict[str, Any]] = {
    Dict: {"labels": LABELS},
    Pair: {"targets": LABELS},
    Bare: {"labels": LABELS},
    Weighed: {"labels": LABELS, "weights": torch.ones(ROWS)},
}


def input_of(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1))


def tensors(result: Any) -> list[Tensor]:
    leaves = list(vars(result).values()) if isinstance(result, Output) else result
    leaves = list(leaves.values()) if isinstance(leaves, dict) else leaves
    leaves = leaves if isinstance(leaves, (list, tuple)) else [leaves]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("network", GIVEN, ids=lambda network: network.__name__)
def test_each_form_of_a_network_is_called_without_the_inputs_of_its_loss(
    network: type[Base], mode: str, kind: Any, tmp_path: Path
) -> None:
    given, example = GIVEN[network], Example((input_of(),), GIVEN[network])
    prepared = prepare(network().eval(), example, Recipe(mode, "x86", kind=kind))
    if kind == "static":
        calibrate(prepared, [example])
    int8 = convert(prepared, example)
    int8.save(tmp_path / "net.int8")
    forms = [prepared.eval(), copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]
    forms += [int8, copy.deepcopy(int8), load_quantized(tmp_path / "net.int8")]
    for form in forms:
        whole = form(input_of(), **given)
        for lean in (form(input_of()), form(x=input_of()), form(input_of(), **dict.fromkeys(given))):
            expected = network()(input_of())
            assert type(lean) is type(expected)
            assert (list(lean) if isinstance(lean, dict) else 0) == (list(expected) if isinstance(lean, dict) else 0)
            assert [tuple(leaf.shape) for leaf in tensors(lean)] == [tuple(leaf.shape) for leaf in tensors(expected)]
            assert all(torch.equal(one, other) for one, other in zip(tensors(lean), tensors(whole), strict=True))
        assert len(tensors(form(input_of(7)))[0]) == 7


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_dataclass_is_returned_without_its_loss(mode: str) -> None:
    data = {"a": input_of(), "b": input_of()}
    example = Example((data, torch.zeros(ROWS, CLASSES)))
    prepared = prepare(Structured().eval(), example, Recipe(mode, "x86", kind="static"))
    calibrate(prepared, [example])
    for form in (prepared, convert(prepared, example)):
        assert form(data).loss is None
        assert torch.equal(form(data).logits, form(*example.args).logits)


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_network_on_plain_tensors_is_called_without_labels(mode: str) -> None:
    example = Example((input_of(),), {"labels": LABELS})
    prepared = prepare(Dict().eval(), example, Recipe(mode, "x86", kind="static", runtime="plain"))
    calibrate(prepared, [example])
    int8 = in_its_runtime(convert(prepared, example))
    if mode == "fx":
        assert torch.equal(int8(input_of())["logits"], int8(input_of(), labels=LABELS)["logits"])
    else:  # the graph is captured from Python code, which shows nothing of other calls
        with pytest.raises(NetworkError, match="give example_inputs="):
            int8(input_of())


class Masked(Base):
    """An optional input that layers depend on, and labels."""

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.scores(x if mask is None else x * mask)
        return {"logits": scores} if labels is None else {"logits": scores, "loss": F.cross_entropy(scores, labels)}


class Hidden(Base):
    """With labels it returns the loss alone."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        scores = self.scores(x)
        return scores if labels is None else F.cross_entropy(scores, labels)


class Teacher(Base):
    """Labels change the scores."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        scores = self.scores(x)
        return scores if labels is None else scores + F.one_hot(labels, CLASSES)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("network", [Masked, Hidden, Teacher])
def test_a_call_that_computes_something_else_is_refused(network: type[Base], mode: str) -> None:
    masks = {"mask": torch.ones(ROWS, INPUTS)} if network is Masked else {}
    example = Example((input_of(),), masks | {"labels": LABELS})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepared = prepare(network().eval(), example, Recipe(mode, "x86"))
    warned = any("can only be called with labels" in str(one.message) for one in said)
    assert warned == (network is not Masked), "known before the first step"
    with pytest.raises(NetworkError, match="mode='eager', which needs no graph"):
        prepared(input_of())
    if masks:
        assert prepared(input_of(), **masks).keys() == {"logits"}


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_both_calls_train_the_same_layers_and_observe_the_same_ranges(mode: str) -> None:
    example = Example((input_of(),), {"labels": LABELS})
    torch.manual_seed(3)
    first = prepare(Dict(), example, Recipe(mode, "x86")).train()
    second = copy.deepcopy(first)
    first(*example.args, **example.kwargs)["loss"].backward()
    F.cross_entropy(second(input_of())["logits"], LABELS).backward()
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    gradients = [[p.grad for p in network.parameters()] for network in (first, second)]
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))
