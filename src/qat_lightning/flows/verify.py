"""The comparison that every conversion ends with: each int8 layer, fed fake-quant's own input, against fake-quant.

Right kernels then differ by rounding only (50 dB of SQNR and more), whatever the depth of the network; a kernel that
saturates or misplaces values is at 6 to 27 dB and is named.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.backends import Backend, quantized_engine
from qat_lightning.errors import VerificationError
from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.flows.base import Example, LayerCheck, sqnr_db
from qat_lightning.flows.shared_range import SharedRange, UnionObserver
from qat_lightning.graph_network import GraphNetwork
from qat_lightning.relu_rounding import writes_in_place

ONE_STEP = 1.01
"""A layer that is off by one step somewhere has rounded the other way, which is no fault; more is."""


class Recorder(fx.Interpreter):
    """Runs a graph against any module and keeps the value of each node, as it was before anything wrote over it."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what it yields."""
        if writes_in_place(n, self.fetch_attr(str(n.target)) if n.op == "call_module" else None):
            self._keep(n.all_input_nodes[0])
        value = super().run_node(n)
        self.values[n.name] = value
        return value

    def _keep(self, written: fx.Node) -> None:
        """Copy the values that share memory with the one that is about to be changed."""
        changed = self.env[written]
        if not isinstance(changed, Tensor):
            return
        memory = changed.untyped_storage().data_ptr()
        for name, value in self.values.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory:
                self.values[name] = value.clone()


@torch.no_grad()
def check_layers(prepared: GraphNetwork, int8: GraphNetwork, example: Example, target: Backend) -> list[LayerCheck]:
    """Compare each op of an FX int8 graph with fake-quant.

    Args:
        prepared: The network with fake-quant, on the CPU, in eval mode, with rounding on.
        int8: What it was converted to.
        example: A real batch.
        target: The backend, for its engine and tolerance.

    Returns:
        One row for each op that yields a quantized tensor, and for each float op in between; quantizing and
        dequantizing are no ops of their own.

    Raises:
        VerificationError: A layer is past the tolerance; the message names it, its op and the backend.
    """
    expected = Recorder(prepared, prepared.graph)
    expected.run(*example_values(prepared.graph, example))
    checks = []
    with quantized_engine(target.engine):
        actual = Recorder(int8, int8.graph)
        actual.run(*example_values(int8.graph, example))
        reference = _Reference(prepared, expected.values, int8, actual.values)
        for node in int8.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or node.target in (
                torch.quantize_per_tensor,
                "dequantize",
            ):
                continue
            if not isinstance(actual.values[node.name], Tensor):
                continue
            wanted = reference.value(node)
            if wanted is None or (not wanted.is_floating_point() and not wanted.is_quantized):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), reference.argument)
            got = getattr(actual, node.op)(node.target, args, kwargs)
            checks.append(_compare(node, _op_name(node, int8), wanted, got))
    raise_if_faulty(checks, target)
    return checks


def raise_if_faulty(checks: list[LayerCheck], target: Backend, wanted: str = "fake-quant computed in training") -> None:
    """Raise for the worst layer that is past the tolerance of ``target`` by more than a rounding.

    Args:
        checks: The rows.
        target: The backend.
        wanted: What the layers are compared with, for the message.
    """
    faulty = [check for check in checks if is_faulty(check, target)]
    if not faulty:
        return
    worst = min(faulty, key=lambda check: check.sqnr_db)
    apart = "" if math.isnan(worst.max_steps) else f", up to {worst.max_steps:.0f} steps apart"
    raise VerificationError(
        f"Layer {worst.name!r} does not compute in int8 what {wanted}: {worst.sqnr_db:.1f} dB "
        f"of SQNR on the same input{apart}, where {target.tolerance_db:.0f} dB is the least for backend "
        f"{target.name!r}. Its kernel is {worst.op}. {len(faulty)} of {len(checks)} layers are past the tolerance. "
        f"What to do: exclude=['{worst.name}'], or another backend."
    )


def is_faulty(check: LayerCheck, target: Backend) -> bool:
    """Whether a layer is past the tolerance, and not by single roundings of a small output only."""
    return check.sqnr_db < target.tolerance_db and not check.max_steps <= ONE_STEP


class _Reference:
    """Fake-quant's value for each node of the int8 graph, on the grid of that node."""

    def __init__(
        self, prepared: GraphNetwork, expected: dict[str, Any], int8: GraphNetwork, actual: dict[str, Any]
    ) -> None:
        self.modules = dict(prepared.named_modules(remove_duplicate=False))
        self.expected, self.actual = expected, actual
        self.int8_modules = dict(int8.named_modules(remove_duplicate=False))
        self.int8_names = {node.name for node in int8.graph.nodes}
        self.prepared_nodes = {node.name: node for node in prepared.graph.nodes}
        self.source: dict[fx.Node, fx.Node | None] = {}
        for node in int8.graph.nodes:
            self.source[node] = self._match(node)

    def value(self, node: fx.Node) -> Tensor | None:
        """The tensor that ``node`` should yield: quantized if it yields a quantized one; None if there is none."""
        source = self.source[node]
        if source is None:
            return None
        if node.target == "dequantize":
            (quantized,) = node.all_input_nodes
            value = self.value(quantized)
            return None if value is None else value.dequantize()
        return self._on_grid(self.expected[source.name], self.actual[node.name])

    def argument(self, node: fx.Node) -> Any:
        """What to feed for ``node``: fake-quant's value, or where it has none, what the int8 network computed."""
        actual = self.actual[node.name]
        if node.op in ("placeholder", "get_attr"):
            return actual
        if not isinstance(actual, Tensor):
            # The outputs of a recurrent layer or of attention, which stay float; or a shape.
            source = self.source[node]
            return actual if source is None else self.expected[source.name]
        value = self.value(node)
        return actual if value is None else value

    def _match(self, node: fx.Node) -> fx.Node | None:
        """The node of the prepared graph whose value, put on the grid, is the value of ``node``."""
        if node.name in self.prepared_nodes:
            found = self.prepared_nodes[node.name]
            # A float op has no ReLU in it: where the int8 network does without one, quantizing behind it clamps.
            return found if self._stays_float(node) else self._end_of_fusion(found)
        inputs = [self.source[arg] for arg in node.all_input_nodes if self.source[arg] is not None]
        if node.target in (torch.quantize_per_tensor, "dequantize"):
            return inputs[0] if inputs else None
        # Upstream makes a new node for a binary op: known by what it works on.
        for candidate in self.prepared_nodes.values():
            if candidate.name in self.int8_names or self._is_quantization(candidate) or not inputs:
                continue
            if [self._behind_fake_quantize(arg) for arg in candidate.all_input_nodes] == inputs:
                return self._end_of_fusion(candidate)
        return None

    def _behind_fake_quantize(self, node: fx.Node) -> fx.Node:
        """The op whose value ``node`` has: through the rounding, and through a dropout that int8 does without."""
        while True:
            inputs = node.all_input_nodes
            dropped = node.name not in self.int8_names and len(inputs) == 1 and self._is_fake_quantize(inputs[0])
            if not (self._is_fake_quantize(node) or dropped):
                return node
            node = inputs[0]

    def _is_fake_quantize(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules.get(str(node.target)), (FakeQuantize, SharedRange))

    def _is_quantization(self, node: fx.Node) -> bool:
        """Whether a node rounds or observes, and is no op of the float network."""
        observes = node.op == "call_module" and isinstance(self.modules.get(str(node.target)), UnionObserver)
        return observes or self._is_fake_quantize(node)

    def _stays_float(self, node: fx.Node) -> bool:
        """Whether an op yields float, and is no layer of upstream's with a ReLU in it."""
        value = self.actual[node.name]
        module = self.int8_modules.get(str(node.target)) if node.op == "call_module" else None
        has_relu = isinstance(module, nn.Sequential) and any(isinstance(part, nn.ReLU) for part in module)
        return isinstance(value, Tensor) and not value.is_quantized and not has_relu

    def _end_of_fusion(self, node: fx.Node) -> fx.Node:
        """Follow ops that were fused into this one (a ReLU behind an addition, a ReLU6)."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.name in self.int8_names or user.op == "output" or self._is_fake_quantize(user):
                break
            node = user
        return node

    @staticmethod
    def _on_grid(value: Any, actual: Tensor) -> Tensor | None:
        if not isinstance(value, Tensor):
            return None
        if not actual.is_quantized:
            return value
        return torch.quantize_per_tensor(value.float(), actual.q_scale(), actual.q_zero_point(), actual.dtype)


def example_values(graph: fx.Graph, example: Example) -> list[Any]:
    """The example's inputs in the order of a graph's placeholders."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values = list(example.args)
    for node in inputs[len(values) :]:
        # What the example leaves out has its default, which a placeholder holds as its argument.
        values.append(example.kwargs[node.target] if node.target in example.kwargs else node.args[0])
    return values


def _compare(node: fx.Node, op: str, wanted: Tensor, got: Tensor) -> LayerCheck:
    name = str(node.target) if node.op == "call_module" else node.name
    if not got.is_quantized:
        return LayerCheck(name, op, sqnr_db(wanted, got))
    steps = (wanted.int_repr().int() - got.int_repr().int()).abs().max().item() if got.numel() else 0
    return LayerCheck(name, op, sqnr_db(wanted.dequantize(), got.dequantize()), float(steps))


def _op_name(node: fx.Node, network: nn.Module) -> str:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(node.target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))
