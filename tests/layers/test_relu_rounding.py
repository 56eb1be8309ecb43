"""ReLU fused into the following rounding equals ReLU and then rounding, bit for bit, in every mode."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.layers.relu_rounding import relu_limit, with_relus_in_roundings
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.grid import fake_quantize
from qat_lightning.recipes.folding import fold_batchnorm
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import Depthwise, Functional, Plain, Residual

MODES = ["eager", "fx", "pt2e"]


@given(
    st.integers(0, 2**32 - 1),
    st.floats(2**-20, 1000.0, width=32),
    st.integers(0, 255),
    st.sampled_from([(0, 255), (-128, 127), (-127, 127), (0, 15)]),
    st.sampled_from([math.inf, 6.0, 1.0, 0.37]),
)
@settings(max_examples=80, deadline=None)
def test_values_and_gradients_are_those_of_relu_and_then_rounding(
    seed: int, scale: float, zero_point: int, grid: tuple[int, int], largest: float
) -> None:
    low, high = grid
    generator = torch.Generator().manual_seed(seed)
    step = torch.tensor(scale)
    ties = torch.arange(-600, 601) / 2 * step
    x = torch.cat([ties, ties.nextafter(ties + 1), torch.tensor([0.0, -0.0, 1e-30, -1e-30, largest, -largest])])
    if not math.isinf(largest):
        end = torch.tensor(largest)
        x = torch.cat([x, end.nextafter(end + 1)[None], end.nextafter(end - 1)[None]])
    x = torch.cat([x, torch.randn(500, generator=generator) * 100 * step, torch.randn(500, generator=generator)])
    gradient = torch.randn(x.shape, generator=generator)
    qparams = step, torch.tensor(low + zero_point % (high - low + 1), dtype=torch.int32)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rounded = fake_quantize(ours, *qparams, quant_min=low, quant_max=high, relu=largest)
    clamped = F.relu(theirs) if math.isinf(largest) else F.hardtanh(theirs, 0.0, largest)
    expected = fake_quantize(clamped, *qparams, quant_min=low, quant_max=high)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_with_a_scale_for_each_channel_it_is_relu_and_then_rounding() -> None:
    x, scale = torch.randn(4, 3, 5) * 9, torch.tensor([0.01, 0.1, 0.02])
    grid = {"quant_min": 0, "quant_max": 255, "axis": 1}
    zero = torch.zeros(3, dtype=torch.int32)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rounded = fake_quantize(ours, scale, zero, relu=6.0, **grid)
    expected = fake_quantize(F.relu6(theirs), scale, zero, **grid)
    rounded.sum().backward()
    expected.sum().backward()
    assert torch.equal(rounded, expected)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("largest", [math.inf, 6.0])
@pytest.mark.parametrize(
    ("settings_", "rounds"),
    [({}, False), ({}, True), ({"learned": "lsq"}, True), ({"source": "histogram_mse"}, True)],
    ids=["rounding off", "no range yet", "learned", "histogram"],
)
def test_a_relu_is_done_also_where_rounding_cannot_do_it(settings_: dict, rounds: bool, largest: float) -> None:
    grid = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    ours, theirs = FakeQuantize(**grid, **settings_), FakeQuantize(**grid, **settings_)
    for batch in range(3):
        x = torch.randn(50, generator=torch.Generator().manual_seed(batch)) * 5
        for fq in (ours, theirs):
            fq.enable_fake_quant(rounds)
        clamped = F.relu(x) if math.isinf(largest) else F.relu6(x)
        assert torch.equal(ours(x, relu=largest), theirs(clamped))
    assert ours.range() == theirs.range()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranges_are_those_of_what_relu_leaves(bad: float) -> None:
    def fresh() -> FakeQuantize:
        fq = FakeQuantize(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
        fq(torch.linspace(0, 1, 10))
        return fq

    ours, theirs = fresh(), fresh()
    for x in (torch.randn(50), torch.randn(50) * 9, torch.tensor([bad, 1.0]), -torch.rand(50)):
        torch.testing.assert_close(ours(x, relu=6.0), theirs(F.relu6(x)), rtol=0, atol=0, equal_nan=True)
    assert ours.range() == theirs.range()
    assert ours.batches == theirs.batches
    assert ours.nonfinite_batches == theirs.nonfinite_batches


def prepared_pair(mode: str, network: nn.Module, *, folded: bool) -> tuple[nn.Module, nn.Module]:
    """A prepared network with rounding, and a copy whose hooks on every rounding prevent fusion of ReLUs."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    example = Example((images[:2],))
    if folded and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        fold_batchnorm(network, example)
    prepared = get_mode(mode).prepare(network, example, Recipe(mode, "x86")).train()
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    prepared(images)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    plain = copy.deepcopy(prepared)
    for module in plain.modules():
        if isinstance(module, FakeQuantize):
            module.register_forward_hook(lambda module, args, output: None)
    return prepared, plain


@pytest.mark.parametrize("folded", [False, True], ids=["batchnorm", "folded"])
@pytest.mark.parametrize("network", [Plain, Residual, Depthwise, Functional])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_training_is_the_same_with_and_without(mode: str, network: type[nn.Module], folded: bool) -> None:
    ours, plain = prepared_pair(mode, network(), folded=folded)
    for seed in range(3):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        outputs = []
        for prepared in (ours, plain):
            torch.manual_seed(seed)
            outputs.append(prepared(images))
            F.cross_entropy(outputs[-1], torch.arange(8) % 4).backward()
        assert torch.equal(*outputs)
    gradients = [{name: p.grad for name, p in prepared.named_parameters()} for prepared in (ours, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    states = [prepared.state_dict() for prepared in (ours, plain)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if isinstance(v, Tensor))


@pytest.mark.parametrize("network", [Plain, Residual, Depthwise, Functional])
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_a_step_keeps_less_for_its_backward_pass(mode: str, network: type[nn.Module]) -> None:
    kept = []
    for prepared in prepared_pair(mode, network(), folded=False):
        storages: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor, storages: dict[int, int] = storages, alive: list[Tensor] = alive) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prepared(torch.randn(8, 3, 8, 8)).sum().backward()
        kept.append(sum(storages.values()))
    assert kept[0] <= kept[1]
    if network is Depthwise:
        assert kept[0] < kept[1], "what goes into a ReLU6 and what comes out of it were both kept"


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_what_runs_has_no_relu_that_a_rounding_does(mode: str) -> None:
    prepared, _ = prepared_pair(mode, Depthwise(), folded=False)
    modules = dict(prepared.named_modules(remove_duplicate=False))

    def relus(graph) -> int:
        called = [(modules.get(str(n.target)) if n.op == "call_module" else None, n) for n in graph.nodes]
        return sum(relu_limit(module, node) is not None for module, node in called)

    before = len(prepared.graph.nodes)
    assert relus(prepared.graph) == 2
    assert relus(with_relus_in_roundings(prepared, prepared.graph)) == 0
    assert len(prepared.graph.nodes) == before, "the graph itself is changed"


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_a_hook_on_a_relu_sees_what_it_leaves(mode: str) -> None:
    prepared, _ = prepared_pair(mode, Depthwise(), folded=False)
    seen = []
    prepared.get_submodule("expand.2").register_forward_hook(lambda module, args, output: seen.append(output))
    prepared(torch.randn(8, 3, 8, 8))
    assert len(seen) == 1
    assert 0 <= float(seen[0].detach().min()) < 1e-6 < float(seen[0].detach().max()) <= 6.1


class ReadAfterwards(nn.Module):
    """Reads the tensor that a ReLU changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + 0.0
        y = self.relu(x)
        return (self.left(y) + self.right(x)).mean((2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_relu_changes_in_place_is_changed(mode: str) -> None:
    ours, plain = prepared_pair(mode, ReadAfterwards(), folded=False)
    images = torch.randn(8, 3, 8, 8)
    assert torch.equal(ours(images), plain(images))


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_evaluation_run_the_same(mode: str) -> None:
    ours, plain = prepared_pair(mode, Residual(), folded=False)
    images = torch.randn(8, 3, 8, 8)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.equal(copied.eval()(images), plain.eval()(images))
