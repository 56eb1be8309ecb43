"""How a network is called, in its file: the call without labels, also where the file was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_lightning import Example, Recipe, calibrate, convert, load_quantized, prepare
from qat_lightning.errors import ArtifactError, NetworkError
from tests.artifact.making import read, write
from tests.modes.test_inference_call import LABELS, Dict, Pair, input_of


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bytes]]:
    found = {}
    for mode in ("fx", "pt2e"):
        path, example = tmp_path_factory.mktemp("good") / mode, Example((input_of(), LABELS))
        prepared = prepare(Dict().eval(), example, Recipe(mode, "x86", kind="static"))
        calibrate(prepared, [example])
        convert(prepared, example).save(path)
        found[mode] = read(path)
    return found


def loaded(content: tuple[dict[str, Any], bytes], change: Callable[[dict[str, Any]], Any], folder: Path) -> Any:
    description = copy.deepcopy(content[0])
    change(description["network"])
    write(folder / "net.int8", description, content[1])
    return load_quantized(folder / "net.int8")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor that is not there": lambda call: call["outputs"][0].update(target="output_9"),
    "no number": lambda call: call["outputs"][0].update(target="output_x"),
    "another number of tensors": lambda call: call.update(count=5),
    "code as a name": lambda call: call["outputs"][0].update(target="__import__('os')"),
    "a function off the list": lambda call: call["outputs"].insert(
        1, {"op": "call_function", "name": "evil", "target": "os.system", "args": ["true"], "kwargs": {}}
    ),
    "a tensor of the network": lambda call: call["outputs"].insert(
        1, {"op": "get_attr", "name": "evil", "target": "first.weight", "args": [], "kwargs": {}}
    ),
    "nothing": lambda call: call.clear(),
    "no list": lambda call: call.update(without=3),
}


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_call_is_refused(contents: dict[str, Any], what: str, mode: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        loaded(contents[mode], lambda network: CHANGES[what](network["inference"]), tmp_path)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_file_of_an_earlier_version_has_one_call(contents: dict[str, Any], mode: str, tmp_path: Path) -> None:
    network = loaded(contents[mode], lambda network: network.pop("inference"), tmp_path)
    assert network(input_of(), LABELS).keys() == {"loss", "logits"}
    with pytest.raises(NetworkError, match="give example_inputs="):
        network(input_of())


def test_a_tuple_with_none_in_place_of_the_loss_comes_back(tmp_path: Path) -> None:
    example = Example((input_of(), LABELS))
    prepared = prepare(Pair().eval(), example, Recipe("fx", "x86", kind="weight_only"))
    int8 = convert(prepared, example)
    int8.save(tmp_path / "net.int8")
    scores, loss = load_quantized(tmp_path / "net.int8")(input_of())
    assert loss is None
    assert torch.equal(scores, int8(input_of())[0])
