"""In-place changes of layer outputs: every mode rounds the changed tensor, or raises an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

MODES = ("eager", "fx", "pt2e")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("without_compiler")


class Network(nn.Module):
    def __init__(self, write: Callable[[Network, Tensor], object]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu, self.silu = nn.ReLU(inplace=True), nn.SiLU(inplace=True)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.write(self, y)
        return self.second(y).mean((2, 3))


def _added(network: Network, y: Tensor) -> None:
    y += 1.0


WRITES = {
    "module": lambda network, y: network.relu(y),
    "float module": lambda network, y: network.silu(y),
    "method": lambda network, y: y.relu_(),
    "function": lambda network, y: F.relu(y, True),
    "underscore": lambda network, y: torch.relu_(y),
    "assignment": _added,
    "chain": lambda network, y: y.mul_(y.mean()).add_(0.5),
}
THROUGH_VIEWS = {
    "view": lambda network, y: y.view(-1).mul_(-2.0),
    "flatten": lambda network, y: network.relu(y.flatten(1)),
    "select": lambda network, y: y[:, 0].zero_(),
}


def _rounded(mode: str, network: nn.Module, exclude: tuple[str, ...] = ()) -> nn.Module:
    prepared = get_mode(mode).prepare(network, Example((IMAGES,)), Recipe(mode, "x86", exclude=exclude))
    prepared.train()
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    prepared(IMAGES)
    set_phase(prepared, fake_quant=True, observers=False, batchnorm_frozen=False)
    return prepared.eval()


SEEN = [(mode, write) for mode in MODES for write in WRITES if (mode, write) != ("fx", "assignment")]


@pytest.mark.parametrize(("mode", "write"), SEEN)
def test_what_is_written_is_what_the_next_layer_reads(mode: str, write: str) -> None:
    """As a statement whose result is not used: both networks stay close to float, and to each other."""
    network = Network(WRITES[write]).eval()
    wanted = network(IMAGES).detach()
    prepared = _rounded(mode, network)
    with torch.no_grad():
        assert sqnr_db(wanted, prepared(IMAGES)) > 25
        int8 = get_mode(mode).convert(cpu_copy(prepared), Example((IMAGES,))).network
        assert sqnr_db(wanted, int8(IMAGES)) > 25


@pytest.mark.parametrize("write", THROUGH_VIEWS)
def test_a_write_through_a_view_is_rounded_or_refused(write: str) -> None:
    """A graph that has already rounded the tensor cannot know; eager rounds when the next layer is called."""
    for mode in ("fx", "pt2e"):
        with pytest.raises(TraceError, match=r"overwrites it later.*mode='eager'"):
            _rounded(mode, Network(THROUGH_VIEWS[write]))
    network = Network(THROUGH_VIEWS[write]).eval()
    wanted = network(IMAGES).detach()
    with torch.no_grad():
        assert sqnr_db(wanted, _rounded("eager", network)(IMAGES)) > 25


def test_an_assignment_that_tracing_cannot_see_is_refused() -> None:
    with pytest.raises(TraceError, match=r"something different from the network on the example.*\+="):
        _rounded("fx", Network(WRITES["assignment"]))


@pytest.mark.parametrize(("mode", "write"), [*SEEN, *[("eager", write) for write in THROUGH_VIEWS]])
def test_what_a_float_layer_gave_may_be_written_over(mode: str, write: str) -> None:
    """Conversion compares each layer's own output, before later in-place changes."""
    network = Network((WRITES | THROUGH_VIEWS)[write]).eval()
    wanted = network(IMAGES).detach()
    prepared = _rounded(mode, network, exclude=("first",))
    converted = get_mode(mode).convert(cpu_copy(prepared), Example((IMAGES,)))
    rows = {row.name: row.quantized for row in converted.coverage}
    assert rows["second"]
    assert not rows["first"]
    with torch.no_grad():
        assert sqnr_db(wanted, converted.network(IMAGES)) > 25
