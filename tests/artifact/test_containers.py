"""Dict-likes, dataclasses and named tuples as inputs and outputs of networks: run, saved and loaded."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.artifact import load_quantized, save_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.example import Example
from qat_lightning.graph.structures import Record, parts, same
from qat_lightning.modes.uncalibrated import quantize as quantize_directly
from qat_lightning.settings.recipe import Recipe
from tests.artifact.making import Batch, quantize, read, write


@dataclass
class Output:
    logits: Any
    hidden: Any = None
    count: int = 0
    known: bool = field(init=False, default=True)


@dataclass
class DictLike(OrderedDict):
    """Like Hugging Face's ModelOutput: entries that are None are omitted."""

    loss: Any = None
    logits: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Bag(dict):
    """A dict whose keys are attributes."""

    __getattr__ = dict.__getitem__


class Pair(NamedTuple):
    logits: Any
    hidden: Any


@dataclass
class Picture:
    pixels: Any
    gain: float = 1.0


RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "ordered": lambda y, h: OrderedDict(out=y, aux=h),
    "dataclass": lambda y, h: Output(y, [h, None], 3),
    "dict_like": lambda y, h: DictLike(logits=y),
    "bag": lambda y, h: Bag(logits=y, hidden=h),
    "nested": lambda y, h: Pair(Output(y), OrderedDict(a=(h, None), b=[Bag(h=y)])),
    "default": lambda y, h: defaultdict(list, {"out": y}),
}


class Returning(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return RETURNS[self.what](y, F.relu(y))


class Taking(Returning):
    def forward(self, picture: Picture, *, more: dict[str, Tensor], scale: Any = None) -> Any:
        return super().forward(picture.pixels * picture.gain + more["bias"])


def pictures(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (Picture(torch.randn(count, 3, 8, 8), 2.0),), {"more": {"bias": torch.randn(count, 3, 1, 1)}}


def images(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(count, 3, 8, 8),), {}


@pytest.fixture(autouse=True)
def _decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    torch.manual_seed(0)


def made(mode: str, kind: str, network: nn.Module, batch: Batch) -> QuantizedNetwork:
    if kind == "qat":
        return quantize(mode, "x86", network, batch)
    recipe, example = Recipe(mode, "x86", kind=kind), Example(*batch(4))
    return QuantizedNetwork(quantize_directly(network, example, recipe), recipe, example)


def alike(one: Tensor, other: Tensor) -> bool:
    return type(one) is type(other) is Tensor and one.shape == other.shape


@pytest.mark.parametrize("what", RETURNS)
@pytest.mark.parametrize(("mode", "kind"), [(m, k) for m in ("eager", "fx", "pt2e") for k in ("qat", "dynamic")])
@pytest.mark.slow
def test_the_class_stays_in_the_process_and_with_the_network(mode: str, kind: str, what: str, tmp_path: Path) -> None:
    network = Returning(what).eval()
    args, _ = images(4)
    wanted = copy.deepcopy(network)(*args)
    saved = made(mode, kind, copy.deepcopy(network), images)
    result = saved(*args)
    assert same(wanted, result, alike)
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=network)(*args)
    assert same(result, loaded, torch.equal)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.slow
def test_without_the_network_a_record_has_the_same_keys(mode: str, tmp_path: Path) -> None:
    for what in RETURNS:
        saved = made(mode, "qat", Returning(what), images)
        save_quantized(saved, tmp_path / "net.int8")
        (x,), _ = images(3)
        result, loaded = saved(x), load_quantized(tmp_path / "net.int8")(x)
        if what in ("ordered", "default"):
            assert type(loaded) is type(result)
            assert list(loaded) == list(result)
        elif what == "nested":
            assert loaded._fields == ("logits", "hidden")
            assert torch.equal(loaded.hidden["b"][0].h, result.hidden["b"][0].h)
        else:
            assert type(loaded) is Record
            assert torch.equal(loaded.logits, result.logits)
            assert torch.equal(loaded["logits"], result.logits)
        if what == "dict_like":
            assert list(loaded) == ["logits"]
            assert loaded.loss is None
            with pytest.raises(AttributeError, match="'logits'"):
                loaded.probabilities  # noqa: B018
        if what == "dataclass":
            assert (loaded.count, loaded.hidden[1], len(parts(loaded))) == (3, None, 3)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_arguments_of_classes_of_ones_own(mode: str, tmp_path: Path) -> None:
    saved = quantize(mode, "x86", Taking("ordered"), pictures)
    save_quantized(saved, tmp_path / "net.int8")
    for network in (None, Taking("ordered"))[mode == "eager" :]:
        loaded = load_quantized(tmp_path / "net.int8", network=network)
        args, kwargs = pictures(5)
        assert same(saved(*args, **kwargs), loaded(*args, **kwargs), torch.equal)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_file_chooses_no_class(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class outside the network's modules, or one that is not a container, is neither looked up nor called."""
    network = Returning("dataclass")
    path, bad = tmp_path / "good.int8", tmp_path / "bad.int8"
    save_quantized(made(mode, "qat", copy.deepcopy(network), images), path)
    description, data = read(path)
    text = str(description["network"])
    assert text.count("'name': 'Output'") == 1
    before = set(sys.modules)
    for module, name in (
        ("os", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("pathlib", "Path"),
        ("antigravity", "fly"),
        ("transformers.modeling_outputs.os", "system"),
        ("tests.artifact.test_containers", "Returning"),
        ("tests.artifact.test_containers", "Path"),
        ("tests.artifact.making", "Case"),
    ):
        changed = copy.deepcopy(description)
        rename(changed["network"], {"module": module, "name": name})
        write(bad, changed, data)
        result = load_quantized(bad, network=network)(images(2)[0][0])
        assert type(result) is Record
    assert "antigravity" not in set(sys.modules) - before
    for row in ({"form": "code"}, {"module": 3}, {"name": None}, {"fields": ["a b"], "name": "no"}):
        changed = copy.deepcopy(description)
        rename(changed["network"], row)
        write(bad, changed, data)
        with pytest.raises(ArtifactError, match="cannot be loaded"):
            load_quantized(bad, network=network)


def rename(data: Any, change: dict[str, Any]) -> None:
    if isinstance(data, dict):
        if data.get("name") == "Output":
            data.update(change)
        for inner in data.values():
            rename(inner, change)
    elif isinstance(data, list):
        for inner in data:
            rename(inner, change)
