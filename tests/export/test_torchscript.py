"""What TorchScript traces and what it refuses, whatever looks at calls of functions meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ExportError
from qat_lightning.export.protocol import Source
from qat_lightning.export.torchscript import TorchScript
from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated import quantize as quantize_directly
from qat_lightning.settings.recipe import Recipe


class Watching(TorchFunctionMode):
    """As the contexts that Lightning builds models in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class BranchOnSizes(nn.Module):
    """Two ways for two sizes, of which a file has that of its example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.shape[1] == 8 else x[:, :8])


class BranchOnValues(BranchOnSizes):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum() > 0 else -x)


def _source(network: nn.Module, mode: str) -> Source:
    example, recipe = Example((torch.randn(4, 8),)), Recipe(mode, "x86", kind="dynamic")
    return Source(QuantizedNetwork(quantize_directly(network.eval(), example, recipe), recipe, example), example)


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.device("cpu"), Watching])
def test_a_context_that_sees_functions_makes_no_difference(
    context: type[AbstractContextManager[None]], tmp_path: Path
) -> None:
    sizes = _source(BranchOnSizes(), "fx")
    values = _source(BranchOnValues(), "eager")
    path, other = tmp_path / "net.pt", torch.randn(2, 8)
    with context():
        TorchScript().write(sizes, path)
        with pytest.raises(ExportError, match=r"branches on the values of a tensor, at test_torchscript.py:\d+"):
            TorchScript().write(values, tmp_path / "other.pt")
    with torch.no_grad():
        assert torch.allclose(TorchScript().load(path)([other])[0], sizes.network(other), atol=1e-6)


def _reading(read: Callable[[Tensor], Any]) -> nn.Module:
    class Reads(BranchOnSizes):
        def forward(self, x: Tensor) -> Tensor:
            factor = read(x)
            return self.layer(x) * factor

    return Reads()


SIZES = {
    "compare": lambda x: 2.0 if x.shape[1] == 8 and x.shape[0] > 1 else 1.0,
    "assert": lambda x: _asserted(x.shape[1] % 8 == 0),
    "product": lambda x: 2.0 if x.shape[0] * x.size(1) >= 16 else 1.0,
    "numel": lambda x: 2.0 if x.numel() >= 16 else 1.0,
}
"""What is the same for a batch of 4 and of 2, and is not for one of 1 or of another width."""


def _asserted(holds: Any) -> float:
    assert holds
    return 1.0


@pytest.mark.parametrize("name", SIZES)
def test_a_branch_on_sizes_is_that_of_the_example_and_other_sizes_are_refused_by_the_file(
    name: str, tmp_path: Path
) -> None:
    source = _source(_reading(SIZES[name]), "eager")
    path, other = tmp_path / "net.pt", torch.randn(2, 8)
    with pytest.warns(UserWarning, match=r"accepts only input sizes .* test_torchscript.py:\d+"):
        TorchScript().write(source, path)
    run = TorchScript().load(path)
    assert torch.allclose(run([other])[0], source.network(other), atol=1e-6)
    with pytest.raises(torch.jit.Error, match=r"traced for inputs of other sizes: .* at test_torchscript.py:\d+"):
        run([torch.randn(1, 7)])


NUMBERS = {
    "length": lambda x: len(x),
    "loop": lambda x: sum(1 for _ in range(x.shape[0])),
    "int": lambda x: int(x.shape[0]),
    "root": lambda x: math.sqrt(x.shape[0]),
    "constant": lambda x: torch.tensor([x.shape[0], 1]).sum(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_from_sizes_is_for_these_sizes_alone(name: str, tmp_path: Path) -> None:
    """And never silently for others."""
    source = _source(_reading(NUMBERS[name]), "eager")
    path, other = tmp_path / "net.pt", torch.randn(4, 8)
    with pytest.warns(UserWarning, match="accepts only input sizes"):
        TorchScript().write(source, path)
    run = TorchScript().load(path)
    assert torch.allclose(run([other])[0], source.network(other), atol=1e-6)
    with pytest.raises(torch.jit.Error, match="traced for inputs of other sizes"):
        run([torch.randn(2, 8)])


VALUES = {
    "float": lambda x: 1.0 if float(x.mean()) > 0 else -1.0,
    "item": lambda x: x.mean().item(),
    "tolist": lambda x: x.mean().tolist(),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: 1.0 if bool(x.sum() > 0) else -1.0,
    "equal": lambda x: 1.0 if torch.equal(x, x.abs()) else -1.0,
    "contains": lambda x: 1.0 if 1.0 in x else -1.0,
    "numpy": lambda x: x.numpy().mean(),
    "constant": lambda x: torch.tensor([x.mean(), 1.0]).sum(),
    "index": lambda x: [1.0, 2.0][(x.sum() > 0).long()],
    "chance": lambda x: 1.0 if torch.rand(()) > 0.5 else -1.0,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_number_from_values_is_not_kept_from_the_example(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the values of a tensor, at test_torchscript.py:\d+.*torch.where chooses"):
        TorchScript().write(_source(_reading(VALUES[name]), "eager"), tmp_path / "net.pt")
    assert not (tmp_path / "net.pt").exists()


def test_what_is_computed_with_tensors_or_from_buffers_alone_is_traced(tmp_path: Path) -> None:
    """As the refusal says to: torch.where chooses by values."""

    class Chooses(BranchOnSizes):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.where(x.sum() > 0, x, -x)) * float(self.factor)

    source, path = _source(Chooses(), "eager"), tmp_path / "net.pt"
    TorchScript().write(source, path)
    for other in (torch.rand(3, 8), -torch.rand(3, 8)):
        assert torch.allclose(TorchScript().load(path)([other])[0], source.network(other), atol=1e-6)
