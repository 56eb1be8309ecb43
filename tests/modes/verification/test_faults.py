"""Faults inserted into correct int8 networks are all detected and named, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.errors import VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer.dynamic import DynamicLinear
from qat_lightning.modes.eager import check as eager_check
from qat_lightning.modes.eager.int8 import Int8Layer
from qat_lightning.modes.fx import upstream as fx_upstream
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.pt2e import mode as pt2e_flow
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.settings.recipe import Recipe

MODES = ("fx", "eager", "pt2e")
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class ThreeOutputs(nn.Module):
    """Two layers, and three heads with the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.heads = nn.ModuleList(nn.Linear(64, 5) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return {name: head(x) for name, head in zip("abc", self.heads, strict=True)}


def convert(mode: str, network: nn.Module | None = None, *, prefix: str = "") -> Converted:
    torch.manual_seed(0)
    network = network or ThreeOutputs()
    flow, example = get_mode(mode), Example((IMAGES,))
    prepared = flow.prepare(network, example, Recipe(mode, "x86"), prefix=prefix)
    for _ in range(2):
        prepared.train()(IMAGES)
    return flow.convert(cpu_copy(prepared), example)


Fault = Callable[[Tensor, float], Tensor]
"""Of a layer's float output and its step, what a wrong kernel gives."""


def _scaled_channel(y: Tensor, step: float) -> Tensor:
    wrong = y.clone()
    wrong[:, 5] *= 1.03
    return wrong


def _some_off(y: Tensor, step: float) -> Tensor:
    wrong = y.clone().contiguous()
    wrong.view(-1)[::50] += step
    return wrong


FAULTS: dict[str, Fault] = {
    "saturates": lambda y, step: y.clamp(max=0.6 * float(y.max())),
    "misplaces": lambda y, step: y.roll(1, 1),
    "one step off": lambda y, step: y + step,
    "some a step off": _some_off,
    "one channel": _scaled_channel,
}


def inject(monkeypatch: pytest.MonkeyPatch, mode: str, layer: str, fault: Fault) -> None:
    """Make the kernel of a layer wrong from its creation."""
    {"fx": _inject_fx, "eager": _inject_eager, "pt2e": _inject_pt2e}[mode](monkeypatch, layer, fault)


def _wrong(quantized: Tensor, fault: Fault) -> Tensor:
    scale, zero_point = quantized.q_scale(), quantized.q_zero_point()
    return torch.quantize_per_tensor(fault(quantized.dequantize(), scale), scale, zero_point, quantized.dtype)


def _inject_fx(monkeypatch: pytest.MonkeyPatch, layer: str, fault: Fault) -> None:
    upstream = fx_upstream.convert_fx

    def convert_wrong(*args: Any, **kwargs: Any) -> Any:
        int8 = upstream(*args, **kwargs)
        module = int8.get_submodule(layer)
        if fault is _scaled_channel:
            weight = module.weight()
            scales = weight.q_per_channel_scales().clone()
            scales[5] *= 1.03
            zeros = weight.q_per_channel_zero_points()
            wrong = torch._make_per_channel_quantized_tensor(weight.int_repr(), scales, zeros, 0)
            module.set_weight_bias(wrong, module.bias())
        else:
            module.register_forward_hook(lambda _, __, y: _wrong(y, fault))
        return int8

    monkeypatch.setattr(fx_upstream, "convert_fx", convert_wrong)


def _inject_eager(monkeypatch: pytest.MonkeyPatch, layer: str, fault: Fault) -> None:
    right = Int8Layer.run

    def run(self: Int8Layer, quantized: Tensor, call: int = 0) -> Tensor:
        y = right(self, quantized, call)
        return _wrong(y, fault) if self.chain.name == layer else y

    monkeypatch.setattr(Int8Layer, "run", run)


def _inject_pt2e(monkeypatch: pytest.MonkeyPatch, layer: str, fault: Fault) -> None:
    right = pt2e_flow.decompose

    def decompose(*args: Any) -> Any:
        result = right(*args)
        graph = result.graph_module.graph
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        weight = f"{layer.replace('.', '_')}_weight"
        (node,) = [node for node in graph.nodes if weight in [arg.target for arg in _inputs_of_weight(node)]]
        steps = [float(n.args[1]) for n in graph.nodes if n.target is quantize]
        op, step = node.target, max(steps)

        def wrong(*inputs: Any) -> Tensor:
            return fault(op(*inputs), step)

        wrong.__name__ = str(op)
        node.target = wrong
        result.graph_module.recompile()
        return result

    monkeypatch.setattr(pt2e_flow, "decompose", decompose)


def _inputs_of_weight(node: Any) -> list[Any]:
    is_layer = node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    return node.args[1].all_input_nodes if is_layer else []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_kernel_is_caught_and_named(monkeypatch: pytest.MonkeyPatch, mode: str, fault: str) -> None:
    inject(monkeypatch, mode, "second", FAULTS[fault])
    with pytest.raises(VerificationError, match="'second'") as caught:
        convert(mode)
    assert caught.value.layers[0] == "second"
    assert caught.value.checks
    assert "exclude=['second']" in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_one_wrong_output_of_three_is_caught_and_named(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    inject(monkeypatch, mode, "heads.1", lambda y, step: y + 0.05 * float(y.std()))
    with pytest.raises(VerificationError, match=r"'heads\.1'") as caught:
        convert(mode, prefix="net")
    assert caught.value.layers == ("heads.1",)
    assert "exclude=['net.heads.1']" in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_in_each_others_place_are_caught_by_the_whole(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Each kernel is correct: only a comparison of the results detects it."""

    def swap(graph: Any) -> None:
        output = graph.output_node()
        (results,) = output.args
        if isinstance(results, dict):
            output.args = ({**results, "a": results["b"], "b": results["a"]},)
        else:
            output.args = ((results[1], results[0], *results[2:]),)

    if mode == "fx":
        right = fx_upstream.convert_fx
        monkeypatch.setattr(fx_upstream, "convert_fx", lambda *a, **k: (swap((made := right(*a, **k)).graph), made)[1])
    elif mode == "pt2e":
        decompose = pt2e_flow.decompose
        monkeypatch.setattr(
            pt2e_flow, "decompose", lambda *a: (swap((made := decompose(*a)).graph_module.graph), made)[1]
        )
    else:
        run = eager_check._run_int8
        swapped = lambda result: {"a": result["b"], "b": result["a"], "c": result["c"]}  # noqa: E731
        monkeypatch.setattr(eager_check, "_run_int8", lambda *a: (swapped((made := run(*a))[0]), made[1]))
    with pytest.raises(VerificationError, match=r"as a whole.*\['[ab]'\].*millionth.* dB"):
        convert(mode)


def test_two_grids_for_one_tensor_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 graph rounds once more, to a grid that fake-quant does not have."""
    upstream = fx_upstream.convert_fx

    def convert_wrong(*args: Any, **kwargs: Any) -> Any:
        int8 = upstream(*args, **kwargs)
        (node,) = [n for n in int8.graph.nodes if n.target == "second"]
        scale = int8.get_submodule("first").scale * 1.37
        with int8.graph.inserting_before(node):
            plain = int8.graph.call_method("dequantize", (node.args[0],))
            again = int8.graph.call_function(torch.quantize_per_tensor, (plain, scale, 0, torch.quint8))
        node.args = (again,)
        int8.recompile()
        return int8

    monkeypatch.setattr(fx_upstream, "convert_fx", convert_wrong)
    with pytest.raises(VerificationError) as caught:
        convert("fx")
    assert {"first", "second"} & set(caught.value.layers)


@pytest.mark.parametrize("fault", ["saturates", "misplaces", "one channel"])
def test_a_wrong_dynamic_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = DynamicLinear.forward
    monkeypatch.setattr(DynamicLinear, "forward", lambda self, x: FAULTS[fault](right(self, x), 0.0))
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    with pytest.raises(VerificationError, match=r"exclude=\['net\.0'\]|exclude=\['net\.2'\]"):
        quantize(network, Example((IMAGES[:, 0, 0],)), Recipe("eager", "x86", kind="dynamic"), prefix="net")


def test_a_dynamic_kernel_that_is_wrong_on_later_calls_is_caught_by_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(x)))

    right, calls = DynamicLinear.forward, []

    def wrong(self: DynamicLinear, x: Tensor) -> Tensor:
        calls.append(x)
        return right(self, x) * (1.0 if len(calls) % 2 else 1.5)

    monkeypatch.setattr(DynamicLinear, "forward", wrong)
    with pytest.raises(VerificationError, match="as a whole"):
        quantize(Twice(), Example((IMAGES[:, 0, 0],)), Recipe("eager", "x86", kind="dynamic"))
