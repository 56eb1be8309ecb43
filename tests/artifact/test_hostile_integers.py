"""Manipulated files of dynamic and weight-only networks: an error, or no effect."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat_lightning import Scheme, load_quantized
from qat_lightning.artifact import artifact_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError, QuantizationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe
from tests.artifact.making import read, write
from tests.support.sequence_networks import Attention, Recurrent, Tables

Content = tuple[dict[str, Any], bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """The contents of valid files."""
    contents = {}
    rows, tokens = torch.randn(4, 7, 16), torch.randint(0, 50, (4, 6))
    four_bits = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16, weight_symmetric=False)
    for name, network, inputs, kind, scheme in (
        ("lstm", Recurrent(nn.LSTM), rows, "dynamic", Scheme()),
        ("attention", Attention(), rows, "dynamic", Scheme()),
        ("weights", Recurrent(nn.LSTM), rows, "weight_only", four_bits),
        ("tables", Tables(), tokens, "weight_only", four_bits),
    ):
        recipe, example = Recipe("fx", "x86", scheme, kind=kind), Example((inputs,))
        path = tmp_path_factory.mktemp("good") / name
        path.write_bytes(artifact_bytes(QuantizedNetwork(quantize(network, example, recipe), recipe, example)))
        contents[name] = read(path)
    return contents


def layer_of(description: dict[str, Any], kind: str) -> dict[str, Any]:
    found = (part["module"]["integers"] for part in description["network"]["used"].values() if "module" in part)
    return next(layer for layer in found if layer["class"] == kind)


def refused(content: Content, kind: str, change: Callable[[dict[str, Any]], Any], path: Path, match: str) -> None:
    description = copy.deepcopy(content[0])
    change(layer_of(description, kind))
    write(path / "bad.int8", description, content[1])
    with pytest.raises(ArtifactError, match=match):
        load_quantized(path / "bad.int8")


def test_unknown_classes(good: dict[str, Content], tmp_path: Path) -> None:
    for name in ("WeightOnly", "DynamicLinear"):
        source, kind = ("weights", "WeightOnly") if name == "WeightOnly" else ("lstm", "DynamicLinear")
        for wrong in ("IntegerLayer", "os.system", "Linear", None, ["DynamicLinear"]):
            refused(good[source], kind, lambda layer, w=wrong: layer.update({"class": w}), tmp_path, "cannot be loaded")
    for wrong in ("torch.nn.Module", "os:system", "torch.ao.nn.quantized.Linear", 3):
        refused(good["weights"], "WeightOnly", lambda layer, w=wrong: layer.update({"layer": w}), tmp_path, "loaded")


def test_arguments(good: dict[str, Content], tmp_path: Path) -> None:
    for name, value in (
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("num_layers", "2"),
        ("cell", "rm -rf"),
        ("engine", 3),
    ):
        refused(
            good["lstm"],
            "DynamicRecurrent",
            lambda layer, n=name, v=value: layer["arguments"].update({n: v}),
            tmp_path,
            "cannot be loaded",
        )
    for name, value in (("hidden_size", 25), ("unknown", 1), ("input_size", 10**12)):
        refused(
            good["lstm"],
            "DynamicRecurrent",
            lambda layer, n=name, v=value: layer["arguments"].update({n: v}),
            tmp_path,
            "cannot be loaded",
        )
    refused(
        good["attention"],
        "DynamicAttention",
        lambda layer: layer["arguments"].update(num_heads=0),
        tmp_path,
        "cannot be loaded",
    )


GRIDS = ([-300, 127, True, 0, False], [-7, 7, True, 3, False], [7, -7, True, 0, False], ["a", 7, True, 0, False], [1])


@pytest.mark.parametrize("grid", GRIDS)
def test_grids(grid: list[Any], good: dict[str, Content], tmp_path: Path) -> None:
    wrong = {"tuple": grid}
    refused(good["weights"], "WeightOnly", lambda layer: layer.update(grid=wrong), tmp_path, "cannot be loaded")
    refused(
        good["tables"],
        "WeightOnlyEmbedding",
        lambda layer: layer["arguments"].update(grid=wrong),
        tmp_path,
        "cannot be loaded",
    )


def test_tensors_of_other_types_and_shapes(good: dict[str, Content], tmp_path: Path) -> None:
    def swap(layer: dict[str, Any]) -> None:
        state = layer["state"]
        state["integers"], state["scales"] = state["scales"], state["integers"]

    refused(good["lstm"], "DynamicLinear", swap, tmp_path, "cannot be loaded")
    refused(good["tables"], "WeightOnlyEmbedding", swap, tmp_path, "cannot be loaded")
    refused(good["lstm"], "DynamicLinear", lambda layer: layer["state"].pop("scales"), tmp_path, "cannot be loaded")
    refused(good["lstm"], "DynamicLinear", lambda layer: layer["state"].update(more=1), tmp_path, "cannot be loaded")


@pytest.mark.parametrize("name", ["lstm", "attention", "weights", "tables"])
@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.slow
def test_any_change_loads_or_is_an_error_of_ours(
    name: str, good: dict[str, Content], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With one value of the description replaced, nothing but our own errors is raised."""
    description = copy.deepcopy(good[name][0])
    holder: Any = description["network"]
    while True:
        keys = sorted(holder, key=str) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or data.draw(st.integers(0, 9)) == 0:
            break
        holder = holder[key]
    values = [None, True, -1, 0, 3, 2**40, 1.5, "x", "os:system", [], {}, {"tuple": [1, 2]}, {"tensor": 0}]
    holder[key] = data.draw(st.sampled_from(values))
    path = tmp_path_factory.mktemp("changed") / "net.int8"
    write(path, description, good[name][1])
    with contextlib.suppress(QuantizationError):
        load_quantized(path)
