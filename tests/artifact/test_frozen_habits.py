"""State that Python code reads or writes outside its network, and unusual forms of inputs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat_lightning.artifact.frozen import CALLS_BEFORE
from tests.artifact.test_frozen import Habits, again_and_again, eager, recordings

COUNT = 0
SEEN: list[int] = []
HELD: dict[str, Any] = {"factor": 1.0}
SPACE = SimpleNamespace(factor=1.0)
ARRAY = numpy.ones(1)
NUMBERS: Iterator[int] = iter(range(1000))


class Tally:
    """A class whose attributes the code reads and changes."""

    count = 0
    factor = 1.0


class Slim:
    """An object without a ``__dict__``."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


SLIM = Slim()


def _by_global(net: Any, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return x


def _by_list(net: Any, x: Tensor) -> Tensor:
    SEEN.append(1)
    return x


def _by_class(net: Any, x: Tensor) -> Tensor:
    Tally.count += 1
    return x


def _by_class_of_network(net: Any, x: Tensor) -> Tensor:
    type(net).counted = getattr(type(net), "counted", 0) + 1
    return x


def _by_slots(net: Any, x: Tensor) -> Tensor:
    SLIM.count += 1
    return x


def _by_iterator(net: Any, x: Tensor) -> Tensor:
    next(NUMBERS)
    return x


def _by_own_attribute(net: Any, x: Tensor) -> Tensor:
    _by_own_attribute.count += 1  # type: ignore[attr-defined]
    return x


_by_own_attribute.count = 0  # type: ignore[attr-defined]


def _closing(found: dict[str, Any]) -> Callable[[Any, Tensor], Tensor]:
    count = 0

    def habit(net: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        found["count"] = count
        return x

    return habit


CLOSED: dict[str, Any] = {"count": 0}
COUNTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], int]]] = {
    "a global variable": (_by_global, lambda: COUNT),
    "a list": (_by_list, lambda: len(SEEN)),
    "a class": (_by_class, lambda: Tally.count),
    "the network's class": (_by_class_of_network, lambda: getattr(Habits, "counted", 0)),
    "slots": (_by_slots, lambda: SLIM.count),
    "an iterator": (_by_iterator, lambda: next(NUMBERS)),
    "the function": (_by_own_attribute, lambda: _by_own_attribute.count),  # type: ignore[attr-defined]
    "a closure": (_closing(CLOSED), lambda: int(CLOSED["count"])),
}


@pytest.mark.parametrize("where", list(COUNTS))
def test_what_is_counted_anywhere_is_counted_once(where: str) -> None:
    habit, count = COUNTS[where]
    network, images = eager(habit, "dynamic"), torch.randn(2, 3, 8, 8)
    before = count()
    again_and_again(network, images)
    assert count() - before == CALLS_BEFORE + 3 + (where == "an iterator")
    assert recordings(network) == []


FACTORS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, pytest.MonkeyPatch], None]]] = {
    "a dict": (lambda net, x: x * HELD["factor"], lambda net, patch: patch.setitem(HELD, "factor", 3.0)),
    "an object": (lambda net, x: x * SPACE.factor, lambda net, patch: patch.setattr(SPACE, "factor", 3.0)),
    "a class": (lambda net, x: x * Tally.factor, lambda net, patch: patch.setattr(Tally, "factor", 3.0)),
    "an array": (lambda net, x: x * float(ARRAY[0]), lambda net, patch: ARRAY.fill(3.0)),
    "a function": (lambda net, x: F.gelu(x), lambda net, patch: patch.setattr(F, "gelu", lambda x: x * 3)),
    "a forward": (lambda net, x: x, lambda net, patch: patch.setattr(type(net.head), "forward", lambda self, x: x * 3)),
    "determinism": (
        lambda net, x: x * (3 if torch.are_deterministic_algorithms_enabled() else 1),
        lambda net, patch: torch.use_deterministic_algorithms(True),
    ),
}


@pytest.mark.parametrize("where", list(FACTORS))
def test_what_is_changed_anywhere_is_seen(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    habit, change = FACTORS[where]
    network, images = eager(habit, "dynamic"), torch.randn(2, 3, 8, 8)
    before = again_and_again(network, images)[-1]
    change(network.network, monkeypatch)
    try:
        got = network(images)
        with torch.no_grad():
            assert torch.equal(got, network.network(images))
        assert got.shape != before.shape or not torch.equal(got, before)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_variable_named_as_an_attribute_is_not_what_code_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = eager(lambda net, x: x + x.mean() * len(net.settings.inner)), torch.randn(2, 3, 8, 8)
    for value in range(CALLS_BEFORE + 3):
        monkeypatch.setitem(globals(), "inner", value)
        network(images)
    assert [made is not None for made in recordings(network)] == [True]


def test_a_hook_of_any_origin_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, seen = eager(lambda net, x: x), torch.randn(2, 3, 8, 8), []
    again_and_again(network, images)
    assert recordings(network)[0] is not None

    def watch(module: Any, args: Any) -> None:
        seen.append(module)

    watch.__module__ = "qat_lightning.anything"  # as those that measure layers
    network.network.head.register_forward_pre_hook(watch)
    network(images)
    assert len(seen) == 1


def test_a_batch_that_is_written_to_is_written_to_in_every_call() -> None:
    network = eager(lambda net, x: x, "dynamic")
    network.network.forward = lambda x: (x.pop("more"), Habits.forward(network.network, x["images"]))[1]
    for _ in range(CALLS_BEFORE + 3):
        batch = {"images": torch.randn(2, 3, 8, 8), "more": torch.ones(1)}
        network(batch)
        assert set(batch) == {"images"}


FORMS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.randn(1, 3, 8, 8).expand(2, 3, 8, 8),
    "with gaps": lambda: torch.randn(4, 3, 8, 16)[::2, :, :, ::2],
    "overlapping": lambda: torch.randn(400).as_strided((2, 3, 8, 8), (10, 9, 8, 1)),
    "channels last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "requiring gradients": lambda: torch.randn(2, 3, 8, 8, requires_grad=True),
    "sparse": lambda: torch.randn(2, 3, 8, 8).to_sparse(),
    "empty": lambda: torch.randn(0, 3, 8, 8),
    "float64": lambda: torch.randn(2, 3, 8, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_inputs_of_any_form_give_what_the_network_gives(form: str) -> None:
    network = eager(lambda net, x: x * (2 if x.is_contiguous() else 1))
    for _ in range(CALLS_BEFORE + 3):
        images = FORMS[form]()
        try:
            with torch.no_grad():
                wanted = network.network(images)
        except Exception as error:  # noqa: BLE001 - the same one must come from a recording
            with pytest.raises(type(error)):
                network(images)
        else:
            assert torch.equal(network(images), wanted)


def test_recordings_hold_for_the_mode_of_inference_that_they_were_made_in() -> None:
    network, images = eager(lambda net, x: x * (2 if torch.is_inference_mode_enabled() else 1)), torch.randn(2, 3, 8, 8)
    for _ in range(CALLS_BEFORE + 3):
        with torch.inference_mode():
            assert torch.equal(network(images), network.network(images))
            assert network(images).is_inference() == network.network(images).is_inference()
        with torch.no_grad():
            assert torch.equal(network(images), network.network(images))
            assert network(images).is_inference() == network.network(images).is_inference()
    assert [made is not None for made in recordings(network)] == [True, True]


def test_threads_that_call_a_network_at_once_get_the_same() -> None:
    network, images = eager(lambda net, x: x.add_(1)), [torch.randn(rows, 3, 8, 8) for rows in (1, 2, 3)]
    with torch.no_grad():
        wanted = [network.network(given) for given in images]
    wrong: list[Any] = []
    engine = torch.backends.quantized.engine

    def call() -> None:
        try:
            for _ in range(4 * CALLS_BEFORE):
                wrong.extend(1 for x, y in zip(images, wanted, strict=True) if not torch.equal(network(x), y))
        except Exception as error:  # noqa: BLE001 - it would be lost in its thread
            wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.backends.quantized.engine == engine


def test_a_recorded_network_is_mapped_over_a_dimension() -> None:
    network, images = eager(lambda net, x: x, "weight_only"), torch.randn(4, 2, 3, 8, 8)
    again_and_again(network, images[0])
    with torch.no_grad():
        wanted = torch.vmap(network.network)(images)
    assert torch.equal(torch.vmap(network)(images), wanted)


def test_a_debugger_sees_every_call_from_then_on() -> None:
    network, images, seen = eager(lambda net, x: x), torch.randn(2, 3, 8, 8), []
    again_and_again(network, images)
    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: seen.append(frame.f_code) and None)
    try:
        network(images)
    finally:
        sys.settrace(before)
    assert Habits.forward.__code__ in seen
