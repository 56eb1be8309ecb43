"""Shapes, types and devices in traces of mode fx, known from the example, for any number of samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat_lightning import calibrate, load_quantized, prepare
from qat_lightning.errors import QuantizationError, TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.graph_network import compile_graph
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.tracing import trace
from qat_lightning.plain import convert
from qat_lightning.rehearsal.rehearse import rehearse
from qat_lightning.settings.recipe import Recipe
from tests.modes.carried import carried_through

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """Two layers with a subclass's code between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.size = 8
        self.register_buffer("position", torch.randn(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.between(self.conv(x)).mean((2, 3)))
        return y

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Chunks(Base):
    def between(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2, 1))
        parts.extend(F.relu(part) for part in parts[:1])
        assert len(parts) == 3
        return torch.cat(parts, 1)[:, 4:]


class Kinds(Base):
    """Queries of types and devices as in real networks."""

    def between(self, x: Tensor) -> Tensor:
        assert x.ndim == len(x.shape) == 4
        assert isinstance(x, Tensor)
        if torch.jit.is_scripting() or x.is_cuda or x.device.type == "mps" or x.dtype == torch.float16:
            return x * 2
        if x.is_floating_point() and torch.is_tensor(x):
            x = x.clamp(min=torch.finfo(x.dtype).min)
        return x + torch.arange(8, device=x.device).to(x.dtype).view(1, 8, 1, 1)


class Tokens(Base):
    def between(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        assert len(tokens.shape) == 3
        assert tokens.shape[-1] == channels
        return F.relu(tokens.reshape(samples, height, width, channels).permute(0, 3, 1, 2))


class Zeros(Base):
    """Creates a tensor for the number of samples."""

    def between(self, x: Tensor) -> Tensor:
        samples = len(x)
        if samples == 0:
            raise ValueError("there is nothing")
        extra = torch.zeros(samples, 8, 1, x.shape[3], dtype=x.dtype, device=x.device)
        half = torch.ones(int(x.shape[1] / 2)).expand(samples, 4)
        return torch.cat([x, extra + half.sum(1).view(samples, 1, 1, 1)], 2)


class Fixed(Base):
    """Branches on height and width."""

    def between(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.size or x.shape[-1] % 2:
            position = F.interpolate(self.position, size=x.shape[-2:])
        else:
            position = self.position
        for row in range(x.shape[2] // 4):
            x = x + position[:, :, row : row + 1]
        return x


class BySamples(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x


class ByMore(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if len(x) > 5 else x


class ByValue(Base):
    def between(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return x * 2 if x.mean() > 0 else x


class LoopOverSamples(Base):
    def between(self, x: Tensor) -> Tensor:
        return torch.stack([x[sample] for sample in range(x.shape[0])])


class Unlabelled(nn.Module):
    """Has no layers, and branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool((x < 1e9).all()) else x.clamp(max=1e9)


class CalledAsAWhole(Base):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Unlabelled()

    def between(self, x: Tensor) -> Tensor:
        x = self.odd(x)
        return x * 2 if x.shape[1] == 8 else x


def run(graph_module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    return compile_graph(graph_module.graph)(graph_module, *args, **kwargs)


@pytest.mark.parametrize("kind", [Chunks, Kinds, Tokens, Zeros])
def test_a_trace_beside_the_example_is_for_any_number_of_samples_and_any_size(kind: type[Base]) -> None:
    network = kind().eval()
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    graph_module, _, sizes = trace(copy.deepcopy(network), Example((IMAGES,)), [])
    graph_module.eval()
    for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (7, 3, 8, 8), (2, 3, 6, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(graph_module, x), network(x))
    assert sizes is None or not sizes.others((torch.zeros(5, 3, 9, 9),), {})
    assert all(torch.equal(buffer, kept[name]) for name, buffer in network.named_buffers())


def test_what_is_decided_by_height_and_width_is_fixed_to_them_and_not_to_the_number_of_samples() -> None:
    network = Fixed().eval()
    graph_module, _, sizes = trace(copy.deepcopy(network), Example((IMAGES,)), [])
    graph_module.eval()
    for samples in (1, 3, 9):
        x = torch.randn(samples, 3, 8, 8)
        torch.testing.assert_close(run(graph_module, x), network(x))
    assert sizes is not None
    assert [str(given) for given in sizes.inputs] == ["x: (any, 3, 8, 8)"]
    assert sizes.others((torch.zeros(1, 3, 9, 8),), {}) == ["x: (1, 3, 9, 8)"]


class SpreadOverSamples(Base):
    """Positions as in decoders: one row for all samples is expanded if there are several."""

    def between(self, x: Tensor) -> Tensor:
        position = torch.arange(8, device=x.device)[None]
        if x.shape[0] != position.shape[0]:
            position = position.expand(x.shape[0], -1)
        return x + position[:, :, None, None] * torch.ones(x.shape[2:], device=x.device)


def test_what_is_another_way_for_one_sample_is_tried_with_one() -> None:
    network = SpreadOverSamples().eval()
    get_mode("fx").prepare(copy.deepcopy(network), Example((IMAGES,)), Recipe("fx", "x86"))
    graph_module, _, _ = trace(copy.deepcopy(network), Example((IMAGES,)), [])
    for samples in (1, 2, 7):
        x = torch.randn(samples, 3, 8, 8)
        torch.testing.assert_close(run(graph_module.eval(), x), network(x))


def test_another_result_for_one_sample_is_refused() -> None:
    with pytest.raises(TraceError, match="for one sample it returns something different"):
        get_mode("fx").prepare(BySamples(), Example((IMAGES,)), Recipe("fx", "x86"))


class InstallsHooks(Base):
    """Like transformers: hooks that the first call installs collect the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.collected = nn.Sequential(self.conv, nn.ReLU()), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "installed"):
            self.block.register_forward_hook(lambda module, args, output: self.collected.append(output))
            self.installed = True
        self.collected.clear()
        self.block(x)
        (only,) = self.collected
        y: Tensor = self.head(only.reshape(x.shape[0], 8, int(x.shape[2]), -1).mean((2, 3)))
        return y


def test_hooks_that_a_forward_installs_are_installed_anew_by_each_trace() -> None:
    network = InstallsHooks()
    graph_module, _, _ = trace(network, Example((IMAGES,)), [])
    assert not network.block._forward_hooks
    torch.testing.assert_close(run(graph_module.eval(), IMAGES), InstallsHooks().eval()(IMAGES))


class MakesItsLoss(Base):
    """Like transformers given labels; and an activation by its name."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.head(nn.SiLU()(self.conv(x)).mean((2, 3)))
        return {"loss": nn.CrossEntropyLoss()(logits.view(-1, 4), labels.view(-1)), "logits": logits}


def test_modules_that_a_forward_makes_are_traced_through() -> None:
    example = Example((IMAGES, torch.tensor([0, 1, 2, 3])))
    found = rehearse(MakesItsLoss(), example, Recipe("fx", "x86"))
    assert (found.int8_macs, found.left_float, found.unsaved) == (1, {}, "")
    graph_module, _, _ = trace(MakesItsLoss(), example, [])
    got, wanted = graph_module.eval()(*example.args), MakesItsLoss().eval()(*example.args)
    torch.testing.assert_close(got["loss"], wanted["loss"])


class TakesMore(Base):
    """Like transformers, whose forwards accept any other keyword and ignore it."""

    def forward(self, x: Tensor | None = None, more: bool | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        y: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return y


def test_a_forward_with_more_arguments_than_it_uses_is_called_by_name() -> None:
    found = rehearse(TakesMore(), Example((), {"x": IMAGES}), Recipe("fx", "x86"))
    assert (found.int8_macs, found.left_float, found.unsaved) == (1, {}, "")


class Cache:
    pass


class ReturnsACache(Base):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.head(self.conv(x).mean((2, 3))), Cache()


def test_what_no_graph_holds_is_refused_with_what_to_do() -> None:
    with pytest.raises(TraceError, match=r"but not a Cache: remove it from .*use_cache=False"):
        trace(ReturnsACache(), Example((IMAGES,)), [])


class Factories(Base):
    """Creates tensors with the input's shape, including the number of samples, on its device."""

    def between(self, x: Tensor) -> Tensor:
        shape = x.size()
        return x * torch.ones(shape, device=x.device) + torch.zeros(shape[:2], device=x.device)[:, :, None, None]


def test_tensors_of_the_shape_of_an_input_have_as_many_samples() -> None:
    network = Factories().eval()
    graph_module, _, _ = trace(copy.deepcopy(network), Example((IMAGES,)), [])
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(run(graph_module.eval(), x), network(x))


@pytest.mark.parametrize("kind", [ByMore, LoopOverSamples])
def test_what_is_decided_by_the_number_of_samples_is_refused_with_the_line(kind: type[Base]) -> None:
    with pytest.raises(TraceError, match=r"test_fx_shapes\.py:\d+ in between: .*(shape\[0\]|len)"):
        trace(kind(), Example((IMAGES,)), [])


def test_what_is_decided_by_values_is_refused_with_the_line() -> None:
    with pytest.raises(TraceError, match=r"in between: return x \* 2 if x\.mean\(\) > 0 else x"):
        trace(ByValue(), Example((IMAGES,)), [])


def test_what_holds_no_layer_and_looks_at_values_is_called_as_a_whole_beside_the_example() -> None:
    graph_module, _, _ = trace(CalledAsAWhole(), Example((IMAGES,)), [])
    assert "odd" in {node.target for node in graph_module.graph.find_nodes(op="call_module")}


class Counting(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def between(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return self.drop(self.norm(x)) if x.shape[1] > 4 else x


def test_nothing_of_the_network_or_the_process_moves_while_it_is_traced() -> None:
    network = Counting().train()
    names, state = set(vars(network)), copy.deepcopy(network.state_dict())
    before = torch.get_rng_state()
    trace(network, Example((IMAGES,)), [])
    assert torch.equal(torch.get_rng_state(), before)
    assert set(vars(network)) == names
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not {"isinstance", "len"} & set(globals())
    assert type(torch.zeros) is type(torch.relu)
    assert "view" not in vars(Tensor)


@dataclass
class Given:
    images: Tensor
    scale: float | None = None


class Structured(nn.Module):
    """Containers as inputs and outputs; branches on values that are neither tensors nor sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(
        self, given: Given, extra: dict[str, Any], *rest: Tensor, double: bool = False, **more: Tensor
    ) -> dict[str, Any]:
        y = self.conv(given.images)
        for value in (*extra.values(), *rest, *more.values()):
            if value is not None:
                y = y + value
        if double and given.scale is None:
            y = y * 2
        return {"y": y, "parts": Given(F.relu(y), given.scale), "number": len(extra)}


def test_containers_flags_and_none_are_taken_apart_and_what_they_decided_is_known() -> None:
    network = Structured().eval()
    one = torch.randn(1)
    args = (Given(IMAGES), {"a": one, "b": None}, one)
    kwargs = {"double": True, "shift": one}
    graph_module, _, sizes = trace(copy.deepcopy(network), Example(args, kwargs), [])
    wanted, got = network(*args, **kwargs), run(graph_module, *args, **kwargs)
    assert got["number"] == 2
    assert got["parts"].scale is None
    torch.testing.assert_close(got["y"], wanted["y"])
    torch.testing.assert_close(got["parts"].images, wanted["parts"].images)
    assert sizes is not None
    assert not sizes.others(args, kwargs)
    assert sizes.others(args, kwargs | {"double": False}) == ["double: False"]
    assert sizes.others((Given(IMAGES, 0.5), *args[1:]), kwargs) == ["given.scale: 0.5"]


@pytest.mark.parametrize("kind", [Tokens, Fixed])
def test_a_network_that_looks_at_shapes_trains_and_is_int8(kind: type[Base]) -> None:
    converted = carried_through(kind(), IMAGES)
    assert all(row.quantized for row in converted.coverage)
    converted.network(torch.randn(9, 3, 8, 8))
    if kind is Tokens:
        converted.network(torch.randn(2, 3, 10, 8))


class Positions(Base):
    """A constant and a loop that depend on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)

    def between(self, x: Tensor) -> Tensor:
        assert x.shape[2] in (6, 8, 12)
        x = x + torch.linspace(0, 1, x.shape[2], device=x.device).view(1, 1, -1, 1)
        return self.drop(self.norm(x.reshape(x.shape[0], 8, x.shape[2] * x.shape[3]).view(-1, 8, *x.shape[2:])))


def test_another_size_takes_a_second_trace_with_the_same_layers_and_ranges() -> None:
    network = Positions()
    prepared: Any = get_mode("fx").prepare(copy.deepcopy(network).train(), Example((IMAGES,)), Recipe("fx", "x86"))
    keys = list(prepared.state_dict())
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    larger = torch.randn(3, 3, 12, 12)
    network.train()
    before = torch.get_rng_state()
    outputs = []
    for each in (network, prepared):
        torch.set_rng_state(before)
        outputs.append(each(larger))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    gradients = dict(prepared.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prepared.norm.running_mean, network.norm.running_mean)
    assert list(prepared.state_dict()) == keys
    ranges = [fq.seen for _, fq in fake_quantizers(prepared) if fq.observed]
    assert all(ranges), "the second trace moves the ranges of the first"
    with torch.inference_mode():
        copy.deepcopy(prepared).eval()(torch.randn(1, 3, 6, 6))
    converted = get_mode("fx").convert(cpu_copy(prepared), Example((IMAGES,)))
    for size in (6, 8, 12):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(converted.network(x), cpu_copy(prepared)(x), rtol=0.02, atol=0.02)


class Doubles(nn.Module):
    """A number that differs in evaluation, as an argument of a function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 2.0 if self.training else 1.0)


class PositionsAndPart(Positions):
    def __init__(self) -> None:
        super().__init__()
        self.part = Doubles()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(super().forward(x))
        return y


def test_another_size_follows_the_training_flag_of_the_part_that_calls_a_function() -> None:
    torch.manual_seed(0)
    prepared: Any = prepare(PositionsAndPart(), Example((IMAGES,)), Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [Example((IMAGES,))])
    names = [name for name, _ in prepared.named_modules()]
    larger = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        result = prepared.eval()(larger)
        assert not torch.equal(result, torch.zeros_like(result))
        prepared.part.train()
        assert torch.equal(prepared(larger), 2 * result)
        assert torch.equal(copy.deepcopy(prepared)(larger), 2 * result)
        prepared.part.eval()
        assert torch.equal(prepared(larger), result)
        prepared.part.train()
        prepared(torch.randn(2, 3, 6, 6))
    assert [name for name, _ in prepared.named_modules()] == names
    int8 = convert(prepared.eval(), Example((IMAGES,)))
    torch.testing.assert_close(int8(larger), result, rtol=0.05, atol=0.05)


def test_a_size_that_goes_another_way_is_refused_with_both_sizes() -> None:
    prepared = get_mode("fx").prepare(Fixed(), Example((IMAGES,)), Recipe("fx", "x86"))
    with pytest.raises(TraceError, match=r"\(any, 3, 8, 8\).*\(2, 3, 9, 8\).*diverge near '(?!activation_post)\w+'"):
        prepared(torch.randn(2, 3, 9, 8))


def test_a_file_is_for_the_sizes_that_were_fixed_and_says_so(tmp_path: Path) -> None:
    prepared = get_mode("fx").prepare(Positions(), Example((IMAGES,)), Recipe("fx", "x86"))
    prepared(IMAGES)
    quantized = convert(prepared, Example((IMAGES,)))
    quantized.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(x), quantized(x))
    with pytest.raises(
        QuantizationError, match=r"Positions was traced for x: \(any, 3, 8, 8\).*with x: \(1, 3, 6, 6\)"
    ):
        loaded(torch.randn(1, 3, 6, 6))


class Attention(Base):
    """A number that differs in evaluation, as an argument of a function and in a computed bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("none", torch.zeros(4), persistent=False)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        assert tokens.ndim == 3
        tokens = F.linear(tokens, weight=self.weight, bias=torch.cat((self.bias, self.none)))
        share = 0.5 if self.training else 0.0
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=share)
        return tokens.transpose(1, 2).unsqueeze(-1)


def test_arguments_by_mode_and_computed_biases_go_into_a_file(tmp_path: Path) -> None:
    prepared = get_mode("fx").prepare(Attention(), Example((IMAGES,)), Recipe("fx", "x86"))
    prepared(IMAGES)
    quantized = convert(prepared, Example((IMAGES,)))
    assert [row.quantized for row in quantized.operations if row.kind == "linear"] == [True]
    quantized.save(tmp_path / "net.int8")
    assert torch.equal(load_quantized(tmp_path / "net.int8")(IMAGES), quantized(IMAGES))


class ShapePlusTuple(Base):
    """Here plus is not an addition of tensors."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).flatten(2).reshape(x.shape[:2] + (-1, 4))  # noqa: RUF005 - as networks have it


def test_sums_of_shapes_have_no_range() -> None:
    carried_through(ShapePlusTuple(), IMAGES)


class Assigns(Base):
    def between(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :4] = x[:, 4:]
        y[:, 4:, 1:] = 2.0
        rows = torch.ones(8, dtype=torch.bool) & (y > 1)
        return torch.where(rows, y, -x)


class AssignsToView(Base):
    """A view is read after its base was written."""

    def between(self, x: Tensor) -> Tensor:
        y = x * 2
        part = y[:, :4]
        y[:, :2] = 0.0
        return torch.cat((part, y[:, 4:]), 1)


class AssignsToInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0.0
        y: Tensor = self.head(self.conv(x).mean((2, 3)))
        return y


def test_assignments_to_parts_of_a_tensor_are_copies() -> None:
    network = Assigns().eval()
    graph_module, _, _ = trace(copy.deepcopy(network), Example((IMAGES,)), [])
    torch.testing.assert_close(run(graph_module.eval(), IMAGES), network(IMAGES))
    converted = carried_through(Assigns(), IMAGES)
    assert "__and__" not in {node.target for node in converted.network.graph.nodes}


@pytest.mark.parametrize("kind", [AssignsToView, AssignsToInput])
def test_assignments_that_a_copy_would_lose_are_refused(kind: type[Base]) -> None:
    with pytest.raises(TraceError, match="an assignment changes"):
        trace(kind(), Example((IMAGES,)), [])


class Scaled(Base):
    """Computes with a number among the inputs."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.conv(x)
        assert x.ndim == 4
        y: Tensor = self.head(x.mean((2, 3))) * (scale / 2)
        return y


class Repeated(Base):
    """Branches on a number among the inputs."""

    def forward(self, x: Tensor, rounds: int = 1) -> Tensor:
        x = self.conv(x)
        for _ in range(rounds):
            x = x * 0.5
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize(("kind", "given", "fixed"), [(Scaled, 0.5, []), (Repeated, 2, ["rounds: 3"])])
def test_numbers_among_the_inputs_are_fixed_only_if_they_decide(kind: type[Base], given: Any, fixed: list[str]) -> None:
    network = kind().eval()
    graph_module, _, sizes = trace(copy.deepcopy(network), Example((IMAGES, given)), [])
    for number in (given, given if fixed else 3):
        torch.testing.assert_close(run(graph_module.eval(), IMAGES, number), network(IMAGES, number))
    assert ([] if sizes is None else sizes.others((IMAGES, 3), {})) == fixed


class FourSamples(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.reshape(4, *x.shape[1:])


def test_where_only_one_number_of_samples_can_be_it_is_fixed() -> None:
    prepared = get_mode("fx").prepare(FourSamples(), Example((IMAGES,)), Recipe("fx", "x86"))
    with pytest.raises(QuantizationError, match=r"traced for x: \(4, 3, .*called with x: \(6, 3, 8, 8\)"):
        prepared(torch.randn(6, 3, 8, 8))


class KeepsTables(nn.Module):
    """Creates a table for the input's size, stores it as a buffer, and counts its calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind, self.calls, self.last = nn.Linear(4, 4), kind, 0, None
        self.table: Tensor | None = None
        if kind == "buffer":
            del self.table
            self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=torch.float32)
        return self.linear(x).transpose(1, 2) + self.table


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_what_a_forward_keeps_is_made_by_each_trace_and_left_as_it_was(kind: str) -> None:
    network = nn.Sequential(KeepsTables(kind))
    x = torch.randn(2, 3, 4)
    expected = copy.deepcopy(network)(x)
    prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86"))
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    assert torch.allclose(prepared(x), expected, atol=1e-6)
    inner = network[0]
    assert (inner.calls, inner.last) == (0, None)
    assert rehearse(nn.Sequential(KeepsTables(kind)), Example((x,)), Recipe("fx", "x86")).unsaved == ""


def table_of(rows: int, columns: int) -> Tensor:
    """A function that a library tells torch.fx to call as a whole."""
    return torch.arange(float(rows)).unsqueeze(1) * columns + torch.arange(columns)


def by_values(x: Tensor) -> Tensor:
    """A function that cannot be traced."""
    return x if float(x.detach().sum()) > 0 else -x


def joined(x: Tensor) -> Tensor:
    """A function that ends in one of torch, as `torchvision.models.swin_transformer`'s do."""
    return torch.cat([x, -x], 1)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A function that returns several tensors."""
    return x[:, :1], x[:, 1:]


def by_name(x: Tensor) -> dict[str, list[Tensor]]:
    """A function that returns nested containers."""
    return {"a": [x, x.flip(1)]}


for wrapped_function in ("table_of", "by_values", "joined", "halves", "by_name"):
    fx.wrap(wrapped_function)


class Wrapped(Base):
    """Adds a table of the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        x = self.conv(x)
        return x + table_of(x.shape[2], x.shape[3]).to(x.dtype)


def test_a_wrapped_function_is_traced_through_so_that_a_file_loads_by_itself(tmp_path: Path) -> None:
    prepared = get_mode("fx").prepare(Wrapped(), Example((IMAGES,)), Recipe("fx", "x86"))
    prepared(IMAGES)
    quantized = convert(prepared, Example((IMAGES,)))
    quantized.save(tmp_path / "a.int8")
    assert torch.equal(load_quantized(tmp_path / "a.int8")(IMAGES), quantized(IMAGES))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: joined(x)[:, :8],
        lambda x: torch.cat(halves(x), 1),
        lambda x: sum(by_name(x)["a"]),
        lambda x: by_values(x),
    ],
    ids=["function of torch", "tuple", "containers", "not traceable"],
)
def test_a_wrapped_function_may_return_anything_and_leaves_later_traces_alone(use: Callable[[Tensor], Tensor]) -> None:
    class Uses(Base):
        def forward(self, x: Tensor) -> Tensor:
            return use(self.conv(x))

    registered = dict(fx._symbolic_trace._wrapped_fns_to_patch)
    network = Uses()
    prepared = get_mode("fx").prepare(network, Example((IMAGES,)), Recipe("fx", "x86"))
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    assert torch.allclose(prepared(IMAGES), network(IMAGES), atol=1e-6)
    assert fx._symbolic_trace._wrapped_fns_to_patch == registered
    fx.symbolic_trace(nn.Linear(4, 2))


def test_a_wrapped_function_that_no_trace_can_follow_is_called_as_it_is() -> None:
    class Opaque(Base):
        def forward(self, x: Tensor) -> Tensor:
            return by_values(self.conv(x))

    graph, *_ = trace(Opaque(), Example((IMAGES,)), [])
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [by_values]
