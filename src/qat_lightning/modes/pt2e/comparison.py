"""Comparing a decomposed graph with fake-quant: each op on fake-quant's own input, and then the whole network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qat_lightning.checks import LayerCheck
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import scope_of
from qat_lightning.layers.relu_rounding import writes_in_place
from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS, DEQUANTIZE, QUANTIZE, main_op
from qat_lightning.modes.fx.alignment import Alignment
from qat_lightning.modes.judging import MIDDLE, Grid, Names, beyond_rounding, decibels, raise_if_faulty
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.pt2e.network import ExportedNetwork
from qat_lightning.modes.pt2e.training import Plan
from qat_lightning.modes.recording import (
    Again,
    RunsApart,
    SeededRecorder,
    copies,
    copy_of,
    feeding,
    same_random_numbers,
    seed,
)
from qat_lightning.modes.verify import Checked
from qat_lightning.modes.whole import DRAWS, Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.settings.backends import Backend

_STEPS = 255
"""Number of steps of the grid on which a float output is judged, from its smallest value to its largest."""


@torch.no_grad()
def check_layers(
    prepared: ExportedNetwork, decomposed: fx.GraphModule, plan: Plan, example: Example, target: Backend
) -> Checked:
    """Compare each layer of the decomposed graph with fake-quant, and then the whole network.

    Args:
        prepared: The network with fake-quant, on the CPU, in eval mode, with rounding enabled.
        decomposed: The converted network.
        plan: Plan of its preparation.
        example: A real batch.
        target: The backend, for its tolerance.

    Returns:
        The comparison, and the recorded values: one row per layer, where a layer is an op with the ops fused with it,
        up to the quantization of its output.

    Raises:
        VerificationError: A layer exceeds the tolerance, or all layers are correct and the whole network is not.
    """
    graph: Any = prepared.graph
    renamed = {(pair.layer, *pair.moves)[-1]: pair.batchnorm for pair in plan.folded}
    # Between a layer and its BatchNorm, fake-quant's values are not normalized yet.
    before = {name for pair in plan.folded for name in (pair.layer, *pair.moves)} - set(renamed)
    there = {node.name for node in graph.nodes} - before
    origins = {node.name: renamed.get(node.name, node.name) for node in decomposed.graph.nodes}
    alignment = Alignment(prepared, graph, {name: origin for name, origin in origins.items() if origin in there})
    tensors = plan.spec.flatten(example.args, example.kwargs)
    names = _names(prepared, decomposed)
    with same_random_numbers():
        expected = SeededRecorder(prepared, graph)
        expected.run(*copies(tensors))
        comparison = _Comparison(decomposed, alignment, expected, ends=set(renamed))
        comparison.run(*copies(tensors))
        raise_if_faulty(comparison.checks, target, names)
        actual = SeededRecorder(decomposed, decomposed.graph, alignment.origins)
        actual.run(*copies(tensors))
        again = Again(prepared, graph, tensors, alignment.observes, comparison.errors)
        ways = [lambda disturb, way=way: plan.spec.unflatten(way(disturb)) for way in again.ways]
        wanted, got = (plan.spec.unflatten(recorder.values["output"]) for recorder in (expected, actual))
        whole = check_whole(wanted, got, ways)
        if whole is not None and not is_right(whole):
            suspects = _where_it_begins(comparison, actual.values, again, names)
            raise_if_wrong(whole, suspects, comparison.checks, names)
    return Checked(comparison.checks, whole, expected.values, {})


class _Comparison(RunsApart):
    """Runs a decomposed graph, each op on exactly fake-quant's values, and compares the results."""

    def __init__(
        self, graph_module: fx.GraphModule, alignment: Alignment, expected: SeededRecorder, ends: set[str]
    ) -> None:
        super().__init__(graph_module)
        self.alignment, self.expected, self.ends = alignment, expected, ends
        self.checks: list[LayerCheck] = []
        self.source: dict[str, str] = {}
        """For each node, the fake-quant node whose float value it should have."""
        self.errors: dict[str, Tensor] = {}
        """Difference of each rounding, by the fake-quant node that rounds."""
        self.origin: dict[fx.Node, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and continue with fake-quant's value."""
        origin = self.alignment.origin(n)
        if origin is not None:
            self.origin[n] = origin
        if n.op != "call_function":
            return super().run_node(n)
        if n.target is DEQUANTIZE[0] and n.all_input_nodes[0].name in self.source:
            return self._dequantized(n, n.all_input_nodes[0])
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        in_place = writes_in_place(n)
        if in_place:
            args, kwargs = copies((args, kwargs))
        seed(self.alignment.origins.get(n.name, n.name))
        got = self.call_function(n.target, args, kwargs)
        if n.target is QUANTIZE[0] and n.args[0] in self.origin:
            return self._rounded(n, self.origin[n.args[0]], got)  # type: ignore[index]
        value = got if origin is None else self._judged(n, origin, got)
        if in_place and n.all_input_nodes[0] in self.env:
            self.env[n.all_input_nodes[0]] = value  # for readers after the in-place op
        return value

    def _dequantized(self, n: fx.Node, quantized: fx.Node) -> Any:
        self.origin[n], self.source[n.name] = self.origin[quantized], self.source[quantized.name]
        return copy_of(self.expected.values[self.source[n.name]])

    def _rounded(self, n: fx.Node, origin: fx.Node, got: Tensor) -> Tensor:
        """Compare the integers with those that fake-quant rounds to."""
        scale, zero_point = n.args[1:3]
        grid = Grid(float(scale), int(zero_point))  # type: ignore[arg-type]
        place = self.alignment.rounding(origin, grid)
        exact, rounded = (self.expected.values[node.name] for node in (place.exact, place.rounded))
        if not isinstance(rounded, Tensor) or rounded.shape != got.shape:
            return got
        wanted = n.target(rounded, *n.args[1:])  # type: ignore[operator]
        beyond = beyond_rounding(exact, wanted.int(), got.int(), grid)
        if beyond > MIDDLE:
            steps = float((wanted.int() - got.int()).abs().max())
            fault = f"its integers are up to {steps:.0f} steps apart, {beyond:.1f} more than rounding explains"
            ratio = decibels(wanted.float() - grid.zero_point, got.float() - grid.zero_point)
            self.checks.append(LayerCheck(_name(n), str(n.target), ratio, steps, fault))
        elif not torch.equal(wanted, got):
            self.errors[place.rounded.name] = (got.float() - wanted.float()) * grid.scale
        self.origin[n], self.source[n.name] = origin, place.rounded.name
        return wanted  # type: ignore[no-any-return]

    def _judged(self, n: fx.Node, origin: fx.Node, got: Any) -> Any:
        wanted = self.expected.values[origin.name]
        if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
            return wanted if type(wanted) is type(got) else got
        if wanted.dtype is not got.dtype:
            return got
        if not got.is_floating_point() or n.target in (*QUANTIZE, *DEQUANTIZE):
            return copy_of(wanted)
        self.source[n.name] = origin.name
        check = self._compare(n, wanted, got)
        if check.fault or _ends_layer(n, n.target in CHANNEL_AXIS or n.name in self.ends):
            self.checks.append(check)
        return copy_of(wanted)

    def _compare(self, n: fx.Node, wanted: Tensor, got: Tensor) -> LayerCheck:
        ratio, steps, fault = decibels(wanted, got), torch.nan, ""
        quantizing = [user for user in n.users if user.target is QUANTIZE[0]]
        if wanted.shape != got.shape:
            fault = f"its shape is {tuple(got.shape)}, not {tuple(wanted.shape)}"
        elif ratio == -torch.inf and wanted.any():
            fault = "its NaNs or infinities differ"
        elif got.numel() and ratio < torch.inf:
            difference = (wanted - got).nan_to_num().abs().max()
            grids = [float(user.args[1]) for user in quantizing]  # type: ignore[arg-type]
            finite = wanted[wanted.isfinite()]
            step = min(grids, default=float((finite.max() - finite.min().clamp(max=0)) / _STEPS) or 1.0)
            if float(difference) > MIDDLE * step and float(difference) > MIDDLE * step + self._doubt(n, got):
                fault = f"its values are up to {float(difference) / step:.1f} steps of 1/{_STEPS} of their range apart"
        for user in quantizing:
            integers = [user.target(value, *user.args[1:]).int() for value in (wanted, got)]  # type: ignore[operator]
            steps = float((integers[0] - integers[1]).abs().max()) if not fault and got.numel() else steps
        return LayerCheck(_name(n), str(main_op(n).target), ratio, steps, fault)

    def _doubt(self, n: fx.Node, got: Tensor) -> float:
        """Error of float arithmetic, for example from cancellation of large numbers."""
        off = 0.0
        for draw in range(DRAWS):
            disturb = Disturbance(draw)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            args, kwargs = torch.utils._pytree.tree_map(lambda value: disturb(copy_of(value)), (args, kwargs))  # noqa: B023
            seed(self.alignment.origins.get(n.name, n.name))
            off = max(off, float((self.call_function(n.target, args, kwargs) - got).nan_to_num().abs().max()))
        return 2 * off


def _ends_layer(node: fx.Node, has_weight: bool) -> bool:
    if node.target in DEQUANTIZE:
        return False
    if any(user.op == "output" or user.target in QUANTIZE for user in node.users):
        return True
    return has_weight and not _runs_on_to_quantize(node)


def _runs_on_to_quantize(node: fx.Node) -> bool:
    """Whether all ops from here to the next quantization read no other float value."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in QUANTIZE:
            return True
        others = [source for source in user.all_input_nodes if source is not node]
        if user.op == "output" or user.target in CHANNEL_AXIS or any(o.target not in DEQUANTIZE for o in others):
            return False
        node = user
    return False


def _where_it_begins(comparison: _Comparison, actual: dict[str, Any], again: Again, names: Names) -> tuple[str, ...]:
    """The layers around the first node at which int8 is farther from fake-quant than the draws are."""
    for node in comparison.graph.nodes:
        got, source = actual.get(node.name), comparison.source.get(node.name)
        if source is None or not isinstance(got, Tensor) or not got.is_floating_point():
            continue
        if again.is_unlike(comparison.expected.values[source], got, source):
            return names.layers(_name(node))
    return ()


def _name(node: fx.Node) -> str:
    """The layer that a node belongs to, otherwise the name of the node."""
    main = main_op(node)
    return scope_of(main) or main.name


def _names(prepared: ExportedNetwork, decomposed: fx.GraphModule) -> Names:
    state = prepared_state(prepared)
    layers = {name for name, _ in state.float_network.named_modules()}
    nodes = {_name(node): node for node in decomposed.graph.nodes if node.op == "call_function"}

    def layer_of(node: fx.Node) -> str:
        return scope_of(node) if node.target in CHANNEL_AXIS else ""

    def feeds(name: str) -> list[str]:
        return feeding(nodes[name], layer_of) if name in nodes else []

    return Names(state.prefix, layers, feeds)
