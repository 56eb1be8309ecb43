"""The verification of every conversion: each int8 layer on fake-quant's own input, and then the whole network.

This is the part for graphs of mode fx; `judging` compares values, and `whole` compares the whole network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.graph.example import Example
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.fx.alignment import Alignment
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.judging import (
    Grid,
    Names,
    bias_rounding,
    compare_integers,
    decibels,
    is_faulty,
    raise_if_faulty,
)
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.recording import (
    Again,
    Recorder,
    RunsApart,
    SeededRecorder,
    copies,
    copy_of,
    example_values,
    feeding,
    in_order,
    same_random_numbers,
    seed,
)
from qat_lightning.modes.whole import DRAWS, Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import quantized_engine

__all__ = ["Recorder", "check_layers", "example_values", "is_faulty"]


@dataclass(frozen=True)
class Checked:
    """The result of a verification.

    Attributes:
        checks: One row per op with a quantized output, and per float op in between; quantize and dequantize do not
            count as ops.
        whole: The row of the whole network; None if there is no output to compare.
        values: The value of each node of the fake-quant graph on the example.
        integers: Whether each node of the int8 graph returns integers.
    """

    checks: list[LayerCheck]
    whole: WholeCheck | None
    values: dict[str, Any]
    integers: dict[str, bool]


@torch.no_grad()
def check_layers(
    prepared: GraphNetwork, int8: GraphNetwork, example: Example, target: Backend, origins: dict[str, str]
) -> Checked:
    """Compare each op of an FX int8 graph with fake-quant, and then the whole network.

    Args:
        prepared: The network with fake-quant, on the CPU, in eval mode, with rounding enabled.
        int8: The converted network.
        example: A real batch.
        target: The backend, for its engine and tolerance.
        origins: Origins of the nodes of ``int8``; see `fx_alignment.take_origins`.

    Returns:
        The comparison, and the recorded values.

    Raises:
        VerificationError: A layer exceeds the tolerance (the message names it, its op and the backend), or all layers
            are correct and the whole network is not.
    """
    alignment = Alignment(prepared, prepared.graph, origins)
    names = _names(prepared, alignment)
    with same_random_numbers(), quantized_engine(target.engine):
        values = example_values(prepared.graph, example)
        expected = SeededRecorder(prepared, prepared.graph)
        expected.run(*copies(values))
        drawing = expected.drawn
        if drawing:
            expected = SeededRecorder(prepared, prepared.graph, None, drawing)
            expected.run(*copies(values))
        comparison = _Comparison(int8, alignment, expected, target)
        comparison.run(*copies(example_values(int8.graph, example)))
        raise_if_faulty(comparison.checks, target, names)
        actual = SeededRecorder(int8, int8.graph, origins, drawing)
        actual.run(*copies(example_values(int8.graph, example)))
        again = Again(prepared, prepared.graph, values, alignment.observes, comparison.errors, drawing)
        whole = check_whole(expected.values["output"], actual.values["output"], again.ways)
        if whole is not None and not is_right(whole):
            suspects = _where_it_begins(comparison, actual.values, again, names)
            raise_if_wrong(whole, suspects, comparison.checks, names)
    integers = {name: isinstance(value, Tensor) and value.is_quantized for name, value in actual.values.items()}
    return Checked(comparison.checks, whole, expected.values, integers)


class _Comparison(RunsApart):
    """Runs an int8 graph, each op on exactly fake-quant's values, and compares the results."""

    def __init__(self, int8: GraphNetwork, alignment: Alignment, expected: SeededRecorder, target: Backend) -> None:
        super().__init__(int8, graph=int8.graph)
        self.alignment, self.expected, self.target = alignment, expected, target
        self.checks: list[LayerCheck] = []
        self.source: dict[str, str] = {}
        """For each node of the int8 graph, the fake-quant node whose value it should have."""
        self.errors: dict[str, Tensor] = {}
        """For each node of fake-quant, the difference of its kernel's result."""
        self.origin: dict[fx.Node, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and continue with fake-quant's value."""
        if n.op in ("placeholder", "get_attr", "output"):
            origin = self.alignment.origin(n)
            if origin is not None:
                self.origin[n] = origin
            return super().run_node(n)
        if n.target == "dequantize" and n.all_input_nodes[0].name in self.source:
            return self._dequantized(n, n.all_input_nodes[0])
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        in_place = writes_in_place(n, self.fetch_attr(str(n.target)) if n.op == "call_module" else None)
        if in_place:
            args, kwargs = copies((args, kwargs))
        name = self.alignment.origins.get(n.name, n.name)
        if name in self.expected.drawing:
            args, kwargs = in_order((args, kwargs))
        seed(name)
        value = self._judged(n, getattr(self, n.op)(n.target, args, kwargs))
        if in_place and n.all_input_nodes[0] in self.env:
            self.env[n.all_input_nodes[0]] = value  # for readers after the in-place op
        return value

    def _dequantized(self, n: fx.Node, quantized: fx.Node) -> Any:
        """Fake-quant's exact value, which may differ slightly from the dequantized integers."""
        self.origin[n], self.source[n.name] = self.origin[quantized], self.source[quantized.name]
        return copy_of(self.expected.values[self.source[n.name]])

    def _judged(self, n: fx.Node, got: Any) -> Any:
        origin = self.alignment.origin(n)
        quantizes = n.target is torch.quantize_per_tensor
        if quantizes:
            origin = self.origin.get(n.args[0])  # type: ignore[arg-type]
        if origin is None:
            return got
        self.origin[n] = origin
        if isinstance(got, Tensor) and got.is_quantized:
            return got if got.qscheme() is not torch.per_tensor_affine else self._integers(n, origin, got, quantizes)
        return self._floats(n, origin, got)

    def _integers(self, n: fx.Node, origin: fx.Node, got: Tensor, quantizes: bool) -> Tensor:
        place = self.alignment.rounding(origin, Grid(got.q_scale(), got.q_zero_point()))
        exact, rounded = (self.expected.values[node.name] for node in (place.exact, place.rounded))
        if not isinstance(rounded, Tensor) or not rounded.is_floating_point():
            return got
        wanted = torch.quantize_per_tensor(rounded.float(), got.q_scale(), got.q_zero_point(), got.dtype)
        doubt = lambda: self._bias_rounding(n, got) + self._doubt(origin, place.exact, got.q_scale())  # noqa: E731
        check = compare_integers(_name(origin), _op_name(n, self.module), exact, wanted, got, allowed=doubt)
        if check.fault or not quantizes:
            self.checks.append(check)
        if check.max_steps and not check.fault and got.shape == wanted.shape:
            self.errors[place.rounded.name] = got.dequantize() - wanted.dequantize()
        self.source[n.name] = place.rounded.name
        return wanted

    def _floats(self, n: fx.Node, origin: fx.Node, got: Any) -> Any:
        # A float op has no fused ReLU: if the int8 network omits one, the quantization after it clamps.
        source = self.alignment.end_of_fusion(origin) if self._has_relu(n) else origin
        wanted = self.expected.values[source.name]
        if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
            on_grid = any(isinstance(leaf, Tensor) and leaf.is_quantized for leaf in tree_leaves(got))
            return wanted if type(wanted) is type(got) and not on_grid else got
        if wanted.is_floating_point() and got.is_floating_point():
            self.checks.append(LayerCheck(_name(origin), _op_name(n, self.module), decibels(wanted, got)))
            self.source[n.name] = source.name
        return copy_of(wanted)

    def _has_relu(self, n: fx.Node) -> bool:
        """Whether a node calls one of upstream's layers with a fused ReLU."""
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        return isinstance(module, nn.Sequential) and any(isinstance(part, nn.ReLU) for part in module)

    def _bias_rounding(self, n: fx.Node, got: Tensor) -> float:
        source = self.env[n.all_input_nodes[0]] if n.op == "call_module" else None
        if not isinstance(source, Tensor) or not source.is_quantized:
            return 0.0
        layer = self.fetch_attr(str(n.target))
        return bias_rounding(layer, source.q_scale(), got.q_scale(), self.target)

    def _doubt(self, first: fx.Node, last: fx.Node, scale: float) -> float:
        """Error of fake-quant's own float arithmetic, in steps, for example from cancellation of large numbers."""
        nodes, node = [last], last
        while node is not first and node.all_input_nodes:
            node = node.all_input_nodes[0]
            nodes.insert(0, node)
        if node is not first:
            return 0.0
        off = 0.0
        for draw in range(DRAWS):
            disturb, values = Disturbance(draw), dict(self.expected.env)
            for source in first.all_input_nodes:
                values[source] = disturb(values[source])
            for part in nodes:
                values[part] = self._again(part, values)
            off = max(off, float((values[last] - self.expected.values[last.name]).abs().max()))
        return 2 * off / scale

    def _again(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: copy_of(values[arg]))
        return getattr(self.expected, node.op)(node.target, args, kwargs)


def _where_it_begins(comparison: _Comparison, actual: dict[str, Any], again: Again, names: Names) -> tuple[str, ...]:
    """The layers around the first node at which int8 is farther from fake-quant than the draws are."""
    for node in comparison.graph.nodes:
        got, source = actual.get(node.name), comparison.source.get(node.name)
        if source is None or not isinstance(got, Tensor):
            continue
        got = got.dequantize() if got.is_quantized else got
        if again.is_unlike(comparison.expected.values[source], got, source):
            return names.layers(_name(comparison.origin[node]))
    return ()


def _names(prepared: GraphNetwork, alignment: Alignment) -> Names:
    state = prepared_state(prepared)
    layers = _quantized_layers(prepared)

    def layer_of(node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" and node.target in layers else ""

    def feeds(name: str) -> list[str]:
        return feeding(alignment.nodes[name], layer_of) if name in alignment.nodes else []

    return Names(state.prefix, {name for name, _ in state.float_network.named_modules()}, feeds)


def _quantized_layers(prepared: nn.Module) -> set[str]:
    return {name for name, module in prepared.named_modules() if "weight_fake_quant" in module._modules}


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _op_name(node: fx.Node, network: nn.Module) -> str:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(node.target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))
