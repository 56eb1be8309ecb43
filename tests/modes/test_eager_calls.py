"""Layers that one forward pass calls several times in eager mode: each call has its own grids."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.artifact import artifact_bytes, quantized_from_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export import export_quantized
from qat_lightning.graph.example import Example
from qat_lightning.modes.eager.calls import MOST_CALLS
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

RECIPE = Recipe("eager", "x86")


class Detector(nn.Module):
    """One head with BatchNorm and ReLU6 for levels of different sizes; a pool shares the grid of its input."""

    def __init__(self, factors: tuple[float, ...] = (3.0, 1.0, 0.1)) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
        self.out, self.factors = nn.Conv2d(8, 4, 1), factors
        self.head.requires_grad_(True)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.out(F.max_pool2d(self.head(x * factor), 2)) for factor in self.factors]


def trained(network: nn.Module, *batches: Tensor) -> nn.Module:
    torch.manual_seed(0)
    prepared = get_mode("eager").prepare(network, Example((batches[0],)), RECIPE).train()
    for batch in batches:
        prepared(batch)
    return prepared


def converted(prepared: nn.Module, x: Tensor) -> Converted:
    return get_mode("eager").convert(cpu_copy(prepared), Example((x,)))


def test_each_call_has_its_range_and_its_int8_kernel() -> None:
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    prepared = trained(Detector(), x, x, x)
    head: Any = prepared.get_submodule("head.0")
    widths = [float(grids.input_fake_quant.max_val) for grids in head.grids]
    assert widths == pytest.approx([3 * float(x.max()), float(x.max()), 0.1 * float(x.max())])
    result = converted(prepared, x)
    assert all(row.quantized for row in result.coverage)
    fake_quant, int8 = cpu_copy(prepared)(x), result.network(x)
    assert min(sqnr_db(one, other) for one, other in zip(fake_quant, int8, strict=True)) > 45
    saved = artifact_bytes(QuantizedNetwork(result, RECIPE, Example((x,))))
    loaded = quantized_from_bytes(saved, Detector())
    for network in (loaded, copy.deepcopy(loaded)):
        for _ in range(2):
            assert all(torch.equal(one, other) for one, other in zip(network(x), int8, strict=True))
    names = {place.layer for place in find_places(prepared)}
    assert {"head.0", "head.0_call_1", "head.0_call_2", "head.0_call_2.input", "out_call_1"} <= names


def test_a_small_level_keeps_its_precision() -> None:
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    network = nn.Conv2d(3, 8, 3)

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = network

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(10 * x), self.head(x / 10)

    wanted = network(x / 10).detach()
    prepared = trained(Levels(), x, x)
    assert sqnr_db(wanted, converted(prepared, x).network(x)[1]) > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exported_program", "torchscript"])
def test_files_have_the_grids_of_each_call(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 10, 10)
    prepared = trained(Detector(), x, x)
    (result,) = export_quantized(prepared, tmp_path, [name], example=Example((x,)))
    assert not result.error
    assert min(result.sqnr_db_of_outputs.values()) > 40


class Branches(nn.Module):
    """Calls a shared layer a data-dependent number of times, and one of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.by_sign = nn.ModuleDict({"plus": nn.Linear(4, 4), "minus": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.shared(x))
        if x.sum() > 0:
            y = self.shared(10 * y)
        return self.by_sign["plus" if x.sum() > 0 else "minus"](y)


def test_the_number_of_calls_may_depend_on_the_data() -> None:
    x = torch.rand(4, 4)
    prepared = trained(Branches(), x, -x, x, -x)
    result = converted(prepared, x)
    assert all(row.quantized for row in result.coverage)
    for batch in (x, -x, x):
        assert sqnr_db(cpu_copy(prepared)(batch), result.network(batch)) > 45
    # The example has one call, and later there are two: the second has the grids of the first.
    other = trained(Branches(), -x, x, -x)
    assert len(other.get_submodule("shared").grids) == 1  # type: ignore[arg-type]
    assert sqnr_db(cpu_copy(other)(x), converted(other, x).network(x)) > 45


def test_a_cell_that_is_unrolled_has_one_pair_of_grids() -> None:
    factors = tuple(1.0 for _ in range(MOST_CALLS + 1))
    prepared = trained(Detector(factors), torch.randn(4, 3, 10, 10))
    head: Any = prepared.get_submodule("head.0")
    assert len(head.grids) == 1
    assert int(head.input_fake_quant.batches) == 1


def test_a_checkpoint_with_another_number_of_calls_loads() -> None:
    x = torch.randn(4, 3, 10, 10)
    once, often = trained(Detector((2.0,)), x, x), trained(Detector((1.0, 1.0)), x)
    often.load_state_dict(once.state_dict())
    head: Any = often.get_submodule("head.0")
    first: Any = once.get_submodule("head.0")
    assert [float(grids.output_fake_quant.max_val) for grids in head.grids] == [
        float(first.output_fake_quant.max_val)
    ] * 2
    once.load_state_dict(often.state_dict())


def test_a_network_that_reads_its_own_output_rounds_it_to_the_grid_of_its_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    prepared = trained(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), x, 3 * x).eval()
    network = converted(prepared, x).network
    with torch.no_grad():
        once, twice = prepared(x), prepared(prepared(x))
        assert torch.equal(prepared(once.clone()), twice), "whichever tensor holds the values"
        assert sqnr_db(network(network(x)), twice) > 30


def test_threads_that_run_a_network_at_the_same_time_do_not_mix_up_their_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.again(3 * self.again(x))))

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    network = converted(trained(Twice(), x, x), x).network
    layer: Any = network.get_submodule("again")
    second_waits, first_is_done = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        """Between the calls of one thread's pass, a whole pass of the other thread runs."""
        if threading.current_thread() is not threading.main_thread():
            second_waits.set()
            assert first_is_done.wait(60)

    wanted = network(x)
    seen: list[tuple[float, int]] = []
    layer.op.register_forward_pre_hook(lambda op, _: seen.append((op.scale, op.zero_point)))
    layer.op.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(network, x)
        assert second_waits.wait(60)
        here = network(x)
        first_is_done.set()
        there = running.result()
    assert torch.equal(here, wanted)
    assert torch.equal(there, wanted)
    grids = [layer.grids(call)[2:] for call in range(2)]
    assert seen[1:3] == grids, "of the pass that runs in between"
    assert seen[0] == grids[0]
    assert seen[3] == grids[1]


def test_a_later_call_leaves_the_grid_of_the_op_as_it_is() -> None:
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    network = converted(trained(Detector(), x, x), x).network
    layer: Any = network.get_submodule("head.0")
    first = layer.grids(0)[2:]
    during: list[tuple[float, int]] = []
    layer.op.register_forward_hook(lambda op, *_: during.append((layer.op.scale, layer.op.zero_point)))
    network(x)
    assert during == [first] * 3
