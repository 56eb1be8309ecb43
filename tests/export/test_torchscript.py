"""What TorchScript traces and what it refuses, whatever looks at calls of functions meanwhile."""

from __future__ import annotations

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
        with pytest.raises(ExportError, match="branches on the values or the sizes of a tensor"):
            TorchScript().write(values, tmp_path / "other.pt")
    with torch.no_grad():
        assert torch.allclose(TorchScript().load(path)([other])[0], sizes.network(other), atol=1e-6)


def test_a_branch_on_sizes_in_python_is_refused_with_the_mode_that_takes_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="on sizes, networks of mode='fx' may"):
        TorchScript().write(_source(BranchOnSizes(), "eager"), tmp_path / "net.pt")
