"""How a graph is called: optional inputs by name and by position, and inputs of many sizes."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Example, Recipe, calibrate, convert, load_quantized, prepare
from qat_lightning.errors import NetworkError, TraceError
from qat_lightning.modes import graph_network
from qat_lightning.modes.graph_network import GraphNetwork
from tests.artifact.making import read, write

X, Y = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def forms(network: nn.Module, example: Example, folder: Path, mode: str = "fx") -> list[Any]:
    """The prepared network and the int8 network, their copies, and the network of the file."""
    prepared = prepare(network.eval(), example, Recipe(mode, "x86", kind="static"))
    calibrate(prepared, [example])
    int8 = convert(prepared, example)
    int8.save(folder / "net.int8")
    copies = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), copy.deepcopy(int8)]
    return [prepared.eval(), int8, *copies, load_quantized(folder / "net.int8")]


class Optional(nn.Module):
    """Two optional inputs, the first of which is usually left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        x = self.first(x).relu()
        x = x if scale is None else x * scale
        return x if y is None else x + y


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_an_input_that_the_example_leaves_out_keeps_its_position(mode: str, tmp_path: Path) -> None:
    for network in forms(Optional(), Example((X,), {"y": Y}), tmp_path, mode):
        expected = network(X, y=Y)
        assert torch.equal(network(X, None, Y), expected)
        assert torch.equal(network(y=Y, scale=None, x=X), expected)
        with pytest.raises(NetworkError, match="give example_inputs="):
            network(X, Y)
        with pytest.raises(NetworkError, match="give example_inputs="):
            network(X, Y, Y)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("example", [Example((X, None)), Example((X,), {"scale": None, "y": None}), Example((X,))])
def test_an_input_of_none_is_left_out(example: Example, mode: str, tmp_path: Path) -> None:
    for network in forms(Optional(), example, tmp_path, mode):
        expected = network(X)
        for call in ((X, None), (X, None, None)):
            assert torch.equal(network(*call), expected)
        assert torch.equal(network(X, y=None), expected)
        with pytest.raises(NetworkError, match="give example_inputs="):
            network(X, Y)


class Required(nn.Module):
    """An input that has to be given and may be None, and one by keyword only after one with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None, y: Tensor | None = None, *, z: Tensor) -> Tensor:
        x = self.first(x).relu() + z
        x = x if mask is None else x * mask
        return x if y is None else x + y


def test_an_input_without_a_default_may_be_none(tmp_path: Path) -> None:
    for network in forms(Required(), Example((X, None), {"z": Y}), tmp_path):
        assert torch.equal(network(X, mask=None, z=Y), network(X, None, None, z=Y))
        with pytest.raises(NetworkError, match="the trace fixes the value of mask"):
            network(X, Y, z=Y)


class Unread(nn.Module):
    """Inputs that forward does not read, whose names torch.fx could give to others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, aux: Tensor | None = None, aux_1: Tensor | None = None) -> Tensor:
        return self.first(x).relu() if aux is None else x


def test_an_input_that_is_not_read_may_have_any_name(tmp_path: Path) -> None:
    for network in forms(Unread(), Example((X,), {"aux_1": Y}), tmp_path):
        assert torch.equal(network(X, aux_1=Y), network(X, None, X))


class Scaled(nn.Module):
    """A number and a flag with defaults; the flag decides about the path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, flip: bool = False) -> Tensor:
        x = self.first(x * scale).relu()
        return x.flip(0) if flip else x


def test_a_number_is_the_default_that_the_trace_has_or_is_refused(tmp_path: Path) -> None:
    for network in forms(Scaled(), Example((X,)), tmp_path):
        assert torch.equal(network(X, 1.0, False), network(X))
        with pytest.raises(NetworkError, match=r"called with x, scale=2\.0; the trace fixes"):
            network(X, 2.0)


def test_the_default_of_an_input_that_the_example_gives_is_another_value(tmp_path: Path) -> None:
    for network in forms(Scaled(), Example((X,), {"flip": True}), tmp_path):
        assert torch.equal(network(X, 1.0, True), network(X, flip=True))
        with pytest.raises((NetworkError, TraceError), match=r"flip: True, .*is called with flip: False"):
            network(X)


def test_a_file_of_an_earlier_version_has_the_inputs_of_its_trace(tmp_path: Path) -> None:
    *_, loaded = forms(Optional(), Example((X,), {"y": Y}), tmp_path)
    description, tensors = read(tmp_path / "net.int8")
    nodes = description["network"]["nodes"]
    description["network"]["nodes"] = [node for node in nodes if "fixed" not in node["kwargs"]]
    assert len(description["network"]["nodes"]) == len(nodes) - 1
    write(tmp_path / "earlier.int8", description, tensors)
    earlier = load_quantized(tmp_path / "earlier.int8")
    assert torch.equal(earlier(X, y=Y), loaded(X, y=Y))
    with pytest.raises(NetworkError, match="and is called with x and without y"):
        earlier(X)


class Positions(nn.Module):
    """A table for the size of the input, which is a constant of a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] < 100
        return self.first(x) + torch.linspace(0, 1, x.shape[2]).view(1, 1, -1, 1)


def constants(network: Any) -> set[str]:
    return {name for name, _ in network.named_buffers() if "_size_" in name}


@pytest.mark.parametrize("kind", ["static", "weight_only"])
def test_the_graphs_for_other_sizes_that_were_used_last_are_kept(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 3
    monkeypatch.setattr(graph_network, "MOST_SIZES", most)
    example = Example((torch.randn(2, 3, 8, 8),))
    prepared: Any = prepare(Positions().eval(), example, Recipe("fx", "x86", kind=kind))
    if kind == "static":
        calibrate(prepared, [example])
    int8 = convert(prepared, example).network
    networks = [network for network in (prepared.eval(), int8) if isinstance(network, GraphNetwork)]
    images = [torch.randn(2, 3, size, size) for size in range(9, 9 + most + 2)]
    for network in networks:
        first = network(images[0])
        for image in images[1:most]:
            network(image)
        kept = dict(network.__dict__["_made_for"])
        network(images[0])
        assert network.__dict__["_made_for"] == kept, "none is made again"
        with pytest.warns(UserWarning, match="more than 3 sizes besides .* use fewer sizes, .* or mode='eager'"):
            network(images[-1])
        assert len(network.__dict__["_made_for"]) == most
        keys = {network.sizes.key((images[number],), {}) for number in (0, 1) if network.sizes is not None}
        assert len(keys & network.__dict__["_made_for"].keys()) == 1, "the oldest was dropped, which is the second"
        assert len(constants(network)) == (most if network is prepared else 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The network was called")  # it was said
            network(images[1])
        assert torch.equal(network(images[0]), first)
        assert not constants(copy.deepcopy(network)), "a copy makes its own"


def test_dozens_of_sizes_are_traced_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example((torch.randn(2, 3, 8, 8),))
    prepared: Any = prepare(Positions().eval(), example, Recipe("fx", "x86"))
    made = list[Any]()

    def other_sizes(network: GraphNetwork, args: Any, kwargs: Any) -> Any:
        made.append(args[0].shape)
        return lambda network, x: x

    prepared.give_sizes(prepared.sizes, other_sizes)
    for _ in range(2):
        for size in range(20, 80):
            prepared(torch.zeros(2, 3, size, size))
    assert len(made) == 60
