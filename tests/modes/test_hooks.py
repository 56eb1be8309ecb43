"""The user's hooks: graph modes refuse those that a graph would leave out, unless the result depends on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, prepare, quantize
from qat_lightning.errors import NetworkError, TraceError

GRAPHS = ("fx", "pt2e")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CALL = Example((IMAGES,))

pytestmark = pytest.mark.usefixtures("without_compiler")


class Net(nn.Module):
    """Layers that a graph merges, and some that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.block(x)).flatten(1))


def look(*call: Any) -> None:
    """A hook that changes nothing."""


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(look),
    "before": lambda module: module.register_forward_pre_hook(look),
    "backward": lambda module: module.register_full_backward_hook(look),
    "before backward": lambda module: module.register_full_backward_pre_hook(look),
}


@pytest.mark.parametrize("place", ["", "block", "block.0", "block.1", "block.2", "pool", "head"])
@pytest.mark.parametrize("mode", GRAPHS)
def test_a_hook_that_looks_on_is_refused_wherever_it_is(mode: str, place: str) -> None:
    network = Net()
    network.get_submodule(place).register_forward_hook(look)
    shown = repr(place) if place else "the network itself"
    with pytest.raises(TraceError, match=f"Net has hooks on {shown}.*mode='eager'"):
        prepare(network, CALL, Recipe(mode, "x86"))


@pytest.mark.parametrize("kind", REGISTER)
def test_every_kind_of_hook_is_refused(kind: str) -> None:
    network = Net()
    REGISTER[kind](network.block[0])
    with pytest.raises(TraceError, match=r"hooks on 'block\.0'"):
        prepare(network, CALL, Recipe("fx", "x86"))


def test_hooks_are_as_they_were_after_they_were_tried() -> None:
    network, seen = Net(), list[str]()
    for name in ("first", "second"):
        network.head.register_forward_hook(lambda *_, name=name: seen.append(name))
    with pytest.raises(TraceError):
        prepare(network, CALL, Recipe("fx", "x86"))
    seen.clear()
    network(IMAGES)
    assert seen == ["first", "second"]


@pytest.mark.parametrize("place", ["head", "block", "block.0"])
@pytest.mark.parametrize("mode", ["eager", *GRAPHS])
def test_a_hook_that_changes_the_input_of_a_module_is_part_of_the_network(mode: str, place: str) -> None:
    network = Net()
    network.get_submodule(place).register_forward_pre_hook(lambda module, args: (args[0] - 0.5,))
    plain = copy.deepcopy(network).eval()
    prepared = prepare(network, CALL, Recipe(mode, "x86")).eval()
    torch.testing.assert_close(prepared(IMAGES), plain(IMAGES), atol=0.1, rtol=0)


class Collects(Net):
    """Reads what its own hook keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_forward_hook(lambda module, args, output: setattr(module, "kept", output))

    def forward(self, x: Tensor) -> Tensor:
        self.block.kept = None  # type: ignore[assignment]
        self.block(x)
        return self.head(self.pool(self.block.kept).flatten(1))


@pytest.mark.parametrize("mode", GRAPHS)
def test_a_hook_that_the_forward_reads_is_part_of_the_network(mode: str) -> None:
    network = Collects()
    plain = Net().eval()
    plain.load_state_dict(network.state_dict())
    prepared = prepare(network, CALL, Recipe(mode, "x86")).eval()
    torch.testing.assert_close(prepared(IMAGES), plain(IMAGES), atol=0.1, rtol=0)


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_kinds_without_calibration_refuse_what_their_graph_does_not_call(kind: Any, mode: str) -> None:
    network = Net()
    network.block.register_forward_hook(look)
    with pytest.raises(TraceError, match="hooks on 'block'"):
        quantize(network, CALL, Recipe(mode, "x86", kind=kind))


def test_layers_that_a_graph_calls_keep_their_hooks_with_kinds_without_calibration() -> None:
    network, seen = Net(), list[str]()
    network.head.register_forward_hook(lambda *_: seen.append("head"))
    quantized = quantize(network, CALL, Recipe("fx", "x86", kind="weight_only"))
    seen.clear()
    quantized(IMAGES)
    assert seen == ["head"]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("place", ["block", "block.0", "block.2"])
def test_a_hook_on_a_merged_module_is_refused_at_the_next_call(place: str, mode: str, copied: bool) -> None:
    prepared = prepare(Net(), CALL, Recipe(mode, "x86"))
    prepared = copy.deepcopy(prepared) if copied else prepared
    module = prepared.block if place == "block" else prepared.block[int(place[-1])]
    handle = module.register_forward_hook(look)
    with pytest.raises(NetworkError, match=f"A hook was registered on {place!r}"):
        prepared(IMAGES)
    handle.remove()
    prepared(IMAGES)


@pytest.mark.parametrize("place", ["block.1", "pool", "head"])
def test_a_hook_on_a_module_that_the_graph_calls_sees_its_output(place: str) -> None:
    network, seen = Net().eval(), dict[str, Tensor]()
    plain = copy.deepcopy(network)
    prepared = prepare(network, CALL, Recipe("fx", "x86")).eval()
    for name, module in (("float", plain), ("prepared", prepared)):
        module.get_submodule(place).register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
        module(IMAGES)
    torch.testing.assert_close(seen["prepared"], seen["float"], atol=0.1, rtol=0)
