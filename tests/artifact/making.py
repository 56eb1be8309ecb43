"""Int8 networks for tests of files, made quickly: a few forward passes instead of training."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES, Case

Batch = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def images(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(count, 3, 8, 8),), {}


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def batch_of(case: Case) -> Batch:
    return lambda count: case.batch(count)[:2]


def quantize(
    mode: str,
    backend: str,
    network: nn.Module,
    batch: Batch = images,
    exclude: tuple[str, ...] = (),
    scheme: Scheme | None = None,
) -> QuantizedNetwork:
    recipe = Recipe(mode, backend, scheme or Scheme(), exclude=exclude)
    example = Example(*batch(4))
    flow = get_mode(mode)
    prepared = flow.prepare(network, example, recipe)
    prepared.train()
    with torch.no_grad():
        for _ in range(2):
            args, kwargs = batch(16)
            prepared(*args, **kwargs)
    return QuantizedNetwork(flow.convert(cpu_copy(prepared), example), recipe, example, source="step 2")


def assert_equal(one: Any, other: Any) -> None:
    for left, right in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        else:
            assert left == right


def assert_same_network(one: nn.Module, other: nn.Module, batch: Batch) -> None:
    for size in (1, 4, 7):
        args, kwargs = batch(size)
        assert_equal(one(*args, **kwargs), other(*args, **kwargs))


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("network.json")), archive.read("tensors.bin")


def write(path: Path, description: Any, data: bytes) -> None:
    """A file with deliberately changed contents, without the digest that would reveal the change."""
    if isinstance(description, dict):
        description = {key: value for key, value in description.items() if key != "digest"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network.json", json.dumps(description))
        archive.writestr("tensors.bin", data)
