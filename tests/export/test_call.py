"""The call of an exported network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.export.call import Call
from qat_lightning.graph.example import Example

X = torch.randn(4, 4)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.first(x) * scale
        return x if mask is None else x * mask


class Source:
    """What `Call.of` reads of a source."""

    def __init__(self, example: Example) -> None:
        self.network, self.example, self.completion = Optional(), example, None


CALLS = [Example((X,)), Example((X, None)), Example((X,), {"scale": 1.0}), Example((X, None, 1.0))]


@pytest.mark.parametrize("exported", CALLS)
@pytest.mark.parametrize("called", CALLS)
def test_an_omitted_argument_is_its_default(exported: Example, called: Example) -> None:
    source: Any = Source(exported)
    call = Call.of(source)
    (tensor,) = call.flatten(called.args, called.kwargs)
    assert tensor is X
    with pytest.raises(ExportError):
        call.flatten((X, None, 2.0), {})
    with pytest.raises(ExportError):
        call.flatten((X, X), {})


@pytest.mark.parametrize("called", [Example((X,)), Example((X, None)), Example((X, 3))])
def test_an_input_that_was_exported_as_a_tensor_is_one(called: Example) -> None:
    source: Any = Source(Example((X, X)))
    with pytest.raises(ExportError, match=r"with a tensor where it is called with|other arguments"):
        Call.of(source).flatten(called.args, called.kwargs)
