"""Recordings of int8 networks: bit-equal results without Python between the kernels, and no other visible effect."""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qat_lightning import Example, QuantizedNetwork, Recipe, calibrate, convert, load_quantized, prepare, quantize
from qat_lightning.artifact.frozen import CALLS_BEFORE
from tests.support.exactness import needs_onednn


class Residual(nn.Module):
    """Two convolutions with a sum, a float layer, and named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.norm(self.first(x)))
        x = F.silu(x + self.second(x))
        return {"scores": self.head(x.mean((2, 3))), "maps": (x, None)}


def int8(network: nn.Module | None = None, kind: str = "static", size: int = 12) -> QuantizedNetwork:
    torch.manual_seed(0)
    network = Residual() if network is None else network
    images = torch.randn(8, 3, size, size)
    if kind != "static":
        return quantize(network, Example((images,)), Recipe("fx", "x86", kind=kind))  # type: ignore[arg-type]
    prepared = prepare(network, Example((images,)), Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [images])
    return convert(prepared, Example((images,)))


def recordings(network: QuantizedNetwork) -> list[Any]:
    return list(network._frozen._made.values())


def again_and_again(network: QuantizedNetwork, *args: Any, **kwargs: Any) -> list[Any]:
    return [network(*args, **kwargs) for _ in range(CALLS_BEFORE + 3)]


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
def test_the_same_bits_come_out_in_the_same_form(kind: str) -> None:
    network = int8(kind=kind)
    for rows in (1, 5):
        images = torch.randn(rows, 3, 12, 12)
        wanted = network.network(images)
        for got in again_and_again(network, images):
            assert torch.equal(got["scores"], wanted["scores"])
            assert torch.equal(got["maps"][0], wanted["maps"][0])
            assert got["maps"][1] is None
    assert [made is not None for made in recordings(network)] == [True, True]
    other = torch.randn(5, 3, 12, 12)
    assert torch.equal(network(other)["scores"], network.network(other)["scores"])


def test_who_calls_a_few_times_pays_for_no_recording() -> None:
    network = int8()
    for _ in range(CALLS_BEFORE):
        network(torch.randn(2, 3, 12, 12))
    assert recordings(network) == []


def _hooked(network: Any) -> Callable[[Tensor], Tensor]:
    zeros: Any = network.head.register_forward_hook(lambda module, args, output: 0.0 * output.dequantize())
    assert zeros is not None
    return torch.zeros_like


def _replaced(network: Any) -> Callable[[Tensor], Tensor]:
    network.head = nn.Sequential(network.head, nn.Identity())
    return lambda scores: scores


def _coarser(network: Any) -> Callable[[Tensor], Tensor]:
    network.head.scale = network.head.scale * 64
    return lambda scores: scores


@pytest.mark.parametrize("change", [_hooked, _replaced, pytest.param(_coarser, marks=needs_onednn)])
def test_what_is_changed_afterwards_is_seen(change: Any) -> None:
    network, images = int8(), torch.randn(2, 3, 12, 12)
    before = again_and_again(network, images)[-1]["scores"]
    assert recordings(network)[0] is not None
    expected = change(network.network)(before)
    for got in again_and_again(network, images):
        assert torch.equal(got["scores"], network.network(images)["scores"])
    if change is not _coarser:
        assert torch.equal(got["scores"], expected)
    else:
        assert not torch.equal(got["scores"], before)


def test_weights_that_are_loaded_are_seen() -> None:
    network, images = int8(), torch.randn(2, 3, 12, 12)
    again_and_again(network, images)
    state = network.network.state_dict()
    key = next(name for name in state if name.startswith("second") and name.endswith("bias"))
    state[key] = state[key] + 1.0
    network.network.load_state_dict(state)
    assert torch.equal(network(images)["scores"], network.network(images)["scores"])


def test_copies_and_files_compute_the_same(tmp_path: Path) -> None:
    network, images = int8(), torch.randn(2, 3, 12, 12)
    wanted = again_and_again(network, images)[-1]["scores"]
    copied = copy.deepcopy(network)
    assert recordings(copied) == []
    network.save(tmp_path / "network.int8")
    for one in (copied, load_quantized(tmp_path / "network.int8")):
        assert torch.equal(again_and_again(one, images)[-1]["scores"], wanted)


def test_what_counts_operations_sees_them() -> None:
    network, images = int8(), torch.randn(2, 3, 12, 12)
    again_and_again(network, images)
    with FlopCounterMode(display=False) as plain:
        network.network(images)
    with FlopCounterMode(display=False) as counted:
        network(images)
    assert counted.get_total_flops() == plain.get_total_flops()


class Decides(nn.Module):
    """Branches on the value of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.mean()) > 0 else x


def test_code_that_may_decide_by_values_runs_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4), Decides())
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    prepared = prepare(network, Example((images,)), Recipe("fx", "x86", exclude=("3",), kind="static"))
    calibrate(prepared, [images])
    made = convert(prepared, Example((images,)))
    again_and_again(made, images)
    assert recordings(made) == [None]


def test_other_sizes_run_on_the_graph_that_is_made_for_them() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2 if x.shape[2] > 10 else 1)

    network = int8(Sized())
    for size in (12, 8, 12):
        images = torch.randn(2, 3, size, size)
        wanted = network.network(images)
        assert all(torch.equal(got, wanted) for got in again_and_again(network, images))
    assert [made is not None for made in recordings(network)] == [True, True]


class Reads(nn.Module):
    """A linear layer, and custom code."""

    def __init__(self, what: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4), what
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.what(self, self.layer(x))


def reading(what: Callable[[Any, Tensor], Any]) -> QuantizedNetwork:
    torch.manual_seed(0)
    example = Example((torch.randn(4, 4),))
    prepared = prepare(Reads(what), example, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [example.args[0]])
    return convert(prepared, example)


LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a number in a tensor": lambda net, y: y / y.abs().max().item(),
    "where a tensor is positive": lambda net, y: y[y > 0],
    "how many": lambda net, y: y * y[y > 0].numel(),
    "chance": lambda net, y: y + torch.rand_like(y),
    "dropout": lambda net, y: F.dropout(y, 0.5, True),
    "a constant": lambda net, y: (y, net.gain * 2),
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_what_a_recording_would_fix_is_computed_anew(look: str) -> None:
    network = reading(LOOKS[look])
    for _ in range(CALLS_BEFORE + 3):
        x = torch.randn(3, 4)
        torch.manual_seed(1)
        wanted = network.network(x)
        torch.manual_seed(1)
        got = network(x)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(got), _tensors(wanted), strict=True))
        _tensors(got)[-1].add_(100)  # what comes out is the caller's


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_weights_that_are_written_to_are_seen() -> None:
    network, x = reading(lambda net, y: y * F.softplus(net.gain)), torch.randn(3, 4)
    again_and_again(network, x)
    with torch.no_grad():
        next(value for name, value in network.network.named_parameters() if name.endswith("gain")).add_(3.0)
    assert torch.equal(network(x), network.network(x))


def test_another_network_in_its_place_is_run() -> None:
    network, other, x = reading(lambda net, y: y), reading(lambda net, y: y * 2), torch.randn(3, 4)
    again_and_again(network, x)
    network.network = other.network
    assert torch.equal(network(x), other.network(x))


def test_a_layer_that_is_put_back_is_run() -> None:
    network, x, y = reading(lambda net, y: y), torch.randn(3, 4), torch.randn(5, 4)
    again_and_again(network, x)
    before = network.network.layer
    network.network.layer = reading(lambda net, y: y).network.layer
    again_and_again(network, y)
    network.network.layer = before
    for given in (x, y):
        assert torch.equal(network(given), network.network(given))


def test_what_counts_its_calls_counts_them_once() -> None:
    network, x = reading(lambda net, y: y + net.calls.add_(1)), torch.randn(3, 4)
    counted = next(value for name, value in network.network.named_buffers() if name.endswith("calls"))
    before = float(counted)
    again_and_again(network, x)
    assert float(counted) == before + CALLS_BEFORE + 3


@needs_onednn  # QNNPACK does not check sizes
def test_an_error_is_that_of_the_network() -> None:
    network = reading(lambda net, y: y)
    again_and_again(network, torch.randn(3, 4))
    for _ in range(CALLS_BEFORE + 2):
        with pytest.raises(RuntimeError) as wanted:
            network.network(torch.randn(3, 5))
        with pytest.raises(RuntimeError) as got:
            network(torch.randn(3, 5))
        assert str(got.value) == str(wanted.value)


FLAG = 1.0


class Settings:
    """An object in a network, like a configuration of transformers."""

    def __init__(self) -> None:
        self.gain, self.inner = 2.0, {"factor": 1.0}


class Habits(nn.Module):
    """Layers of an eager network, and Python code between them."""

    def __init__(self, habit: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.head, self.habit, self.settings = nn.Linear(8, 4), habit, Settings()
        self.calls, self.seen, self.cache = 0, [], {}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        x = self.habit(self, self.relu(self.norm(self.conv(x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def eager(habit: Callable[[Any, Tensor], Tensor], kind: str = "static") -> Any:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    if kind != "static":
        return quantize(Habits(habit), Example((images,)), Recipe("eager", "x86", kind=kind))  # type: ignore[arg-type]
    prepared = prepare(Habits(habit), Example((images,)), Recipe("eager", "x86", kind="static"))
    calibrate(prepared, [images])
    return convert(prepared, Example((images,)))


def _halves(net: Any, x: Tensor) -> Tensor:
    total = sum((F.relu(part) for part in x.chunk(2, 1)), torch.zeros(()))
    return torch.cat([total, total], 1)


def _cached(net: Any, x: Tensor) -> Tensor:
    if x.shape not in net.cache:
        net.cache[x.shape] = torch.linspace(0, 1, x.shape[-1])
    return x * net.cache[x.shape]


def _counting(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x


def _remembering(net: Any, x: Tensor) -> Tensor:
    net.seen.append(x.shape[0])
    return x


def _logging(net: Any, x: Tensor) -> Tensor:
    logging.getLogger("habits").debug("%s", x.shape)
    return x


def _printing(net: Any, x: Tensor) -> Tensor:
    print(end="")  # noqa: T201
    return x


COMPUTES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda net, x: x,
    "a loop over parts": _halves,
    "an object's attribute": lambda net, x: x * net.settings.gain * net.settings.inner["factor"],
    "a global variable": lambda net, x: x * FLAG,
    "a table that was kept": _cached,
    "in place": lambda net, x: x.add_(1),
    "a dropout that does not train": lambda net, x: F.dropout(x, 0.5, net.norm.training and x.shape[0] < 0),
    "a shape as text": lambda net, x: x if f"{x.shape}" else x * 2,
}
DOES_MORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "counting": _counting,
    "remembering": _remembering,
    "logging": _logging,
    "printing": _printing,
    "a clock": lambda net, x: x * (1 if time.time() > 0 else 2),
    "chance": lambda net, x: x * random.choice([1.0, 1.0]),
}
READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a comparison": lambda net, x: x if x.sum() > 1e9 else x * 2,
    "a list": lambda net, x: x * (1 if max(x.flatten().tolist()) < 2 else 2),
    "numpy": lambda net, x: x * float(x.numpy().max() < 2),
    "numpy's memory": lambda net, x: x + torch.from_numpy(x.numpy() * 0.5),
}


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("habit", list(COMPUTES))
def test_python_code_that_only_computes_is_recorded(habit: str, kind: str) -> None:
    network = eager(COMPUTES[habit], kind)
    for _ in range(CALLS_BEFORE + 3):
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(network(images), network.network(images))
    assert [made is not None for made in recordings(network)] == [True]


@pytest.mark.parametrize("habit", list(DOES_MORE))
def test_python_code_that_does_more_runs_in_every_call(habit: str) -> None:
    network, images = eager(DOES_MORE[habit]), torch.randn(2, 3, 8, 8)
    calls, seen = network.network.calls, len(network.network.seen)
    again_and_again(network, images)
    assert recordings(network) == []
    if habit == "counting":
        assert network.network.calls == calls + CALLS_BEFORE + 3
    if habit == "remembering":
        assert len(network.network.seen) == seen + CALLS_BEFORE + 3


@pytest.mark.parametrize("habit", list(READS))
def test_python_code_that_reads_values_decides_in_every_call(habit: str) -> None:
    network = eager(READS[habit])
    for _ in range(CALLS_BEFORE + 3):
        images = 3 * torch.randn(2, 3, 8, 8)
        assert torch.equal(network(images), network.network(images))
    assert not any(recordings(network))


def test_what_python_code_reads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 8, 8)
    network = eager(COMPUTES["an object's attribute"])
    before = again_and_again(network, images)[-1]
    network.network.settings.gain = 3.0
    assert not torch.equal(network(images), before)
    before = again_and_again(network, images)[-1]
    network.network.settings.inner["factor"] = 5.0
    assert not torch.equal(network(images), before)
    network = eager(COMPUTES["a global variable"])
    before = again_and_again(network, images)[-1]
    monkeypatch.setitem(globals(), "FLAG", 7.0)
    assert torch.equal(network(images), network.network(images))
    assert not torch.equal(network(images), before)
    network = eager(COMPUTES["a table that was kept"])
    before = again_and_again(network, images)[-1]
    network.network.cache[torch.Size((2, 8, 8, 8))].mul_(2)
    assert not torch.equal(network(images), before)


def test_a_profiler_of_python_sees_every_call() -> None:
    import sys

    network, images, seen = eager(COMPUTES["nothing"]), torch.randn(2, 3, 8, 8), []
    sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code.co_name))
    try:
        again_and_again(network, images)
    finally:
        sys.setprofile(None)
    assert recordings(network) == []
    assert "forward" in seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_networks_are_recorded_in_each_mode_of_gradients(mode: Any) -> None:
    """In inference mode dropout is a separate operator, which is random in training."""
    network, images = eager(COMPUTES["a dropout that does not train"]), torch.randn(2, 3, 8, 8)
    with mode():
        wanted = network.network(images)
        for got in again_and_again(network, images):
            assert torch.equal(got, wanted)
    assert [made is not None for made in recordings(network)] == [True]
