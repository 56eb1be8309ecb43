"""Coverage of ops in an FX network: for the prepared network what conversion will do, for the int8 one the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.graph.structures import parts
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.layers.operators import MOVES, MOVING_MODULES, faces_of
from qat_lightning.modes.coverage import Operations, flops_of, is_float, macs_of, operations_of
from qat_lightning.modes.fx.config import LEFT_FLOAT, backend_config
from qat_lightning.modes.fx.layers import UNSEEN, read_nodes
from qat_lightning.modes.fx.passes import CLAMPS, OWN_GRIDS, is_scaled_sum
from qat_lightning.modes.fx.products import PRODUCT_NAMES, PRODUCTS
from qat_lightning.modes.fx.tracer import is_foreign
from qat_lightning.modes.fx.weights import is_constant
from qat_lightning.modes.places import op_name, rounding_of
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage
from qat_lightning.modes.recording import example_values, run_of

_WRITE_INSTEAD: dict[Any, tuple[str, str]] = {
    torch.relu: ("torch.relu", "F.relu or nn.ReLU"),
    torch.relu_: ("torch.relu_", "F.relu or nn.ReLU"),
    torch.max_pool2d: ("torch.max_pool2d", "F.max_pool2d or nn.MaxPool2d"),
    torch.conv2d: ("torch.conv2d", "F.conv2d or nn.Conv2d"),
    torch.batch_norm: ("torch.batch_norm", "nn.BatchNorm2d"),
}
"""Functions that mode fx does not support, and supported alternatives."""


_AVERAGES = faces_of("mean", *(f"{name}{dims}d" for name in ("avg_pool", "adaptive_avg_pool") for dims in (1, 2, 3)))


class FxOperations:
    """Creates the coverage rows of ops.

    Args:
        prepared: The prepared network, on the CPU, in evaluation.
        example: One call of it.
        layers: The names of the layers, which have rows of their own.
        values: Values of the nodes of its graph in a call; None to run it.
    """

    def __init__(
        self, prepared: nn.Module, example: Example, layers: set[str], values: Mapping[str, Any] | None = None
    ) -> None:
        self.state = prepared_state(prepared)
        self.plan = self.state.plan
        self.example, self.layers = example, layers
        self.modules = dict(prepared.named_modules(remove_duplicate=False))
        self.prepared = prepared
        graph: Any = prepared.graph
        self.values = dict(run_of(prepared, graph, example_values(graph, example)) if values is None else values)
        for node in self.plan.graph.nodes:  # roundings that training omits: their input takes their place
            if node.name not in self.values and node.op == "call_module" and node.args[0].name in self.values:
                self.values[node.name] = self.values[node.args[0].name]
        self.known = {config.pattern for config in backend_config().configs}

    def rows(self, done: Mapping[str, bool] | None = None, unseen: Collection[str] = ()) -> Operations:
        """One row per op that depends on an input; ops inside a layer have its name.

        Args:
            done: Whether each remaining node of the int8 graph returns integers; missing nodes were fused into kernels.
                None before conversion.
            unseen: Names of nodes before roundings that never observed a range.
        """
        found = []
        read = read_nodes(self.plan.graph)
        for node in self.plan.graph.nodes:
            if node not in read or is_constant(node) or not self._computes(node):
                continue
            quantized = self._will_be(node) if done is None else done.get(node.name, True)
            name = self._name(node)
            reason = "" if quantized else UNSEEN if self._reads(node, unseen) else self._why(node)
            macs = macs_of(flops_of(node, self.values, self.prepared), self.example)
            row = LayerCoverage(name, self._kind_name(node), quantized, reason, what="op", macs=macs)
            found.append((node, row))
        return operations_of(self.plan.graph, found)

    def _reads(self, node: fx.Node, unseen: Collection[str]) -> bool:
        """Whether an op reads or returns a value whose range is unknown."""
        sources = [node]
        for source in node.all_input_nodes:
            sources.append(source if rounding_of(self._module(source)) is None else source.all_input_nodes[0])
        return any(source.name in unseen for source in sources)

    def _computes(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr", "output"):
            return False
        module, value = self._module(node), self.values.get(node.name)
        whole = module is not None or is_foreign(node.target)  # which may return several tensors
        if not (_holds_float(value) if whole else is_float(value)):
            return False
        if module is None:
            return op_name(node.target) not in MOVES
        name = str(node.target).partition("_call_")[0]
        return rounding_of(module) is None and name not in self.layers and not isinstance(module, MOVING_MODULES)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        scope: str = self.plan.scopes.get(node.name, "")
        if scope in self.layers:
            return scope
        return f"{scope}.{node.name}" if scope else node.name

    def _kind(self, node: fx.Node) -> Any:
        module = self._module(node)
        if module is None:
            return node.target
        # A BatchNorm that can be frozen has a class of this package.
        face = type(module)
        return next((base for base in face.__mro__ if base in self.known or base in LEFT_FLOAT), face)

    def _kind_name(self, node: fx.Node) -> str:
        module = self._module(node)
        return op_name(node.target) if module is None else type(module).__name__.removeprefix("Freezable")

    def _selected(self, node: fx.Node) -> bool:
        scope = str(node.target) if node.op == "call_module" else self.plan.scopes.get(node.name, "")
        recipe, prefix = self.state.recipe, self.state.prefix
        name = join(prefix, scope)
        return recipe.selects(name) if scope else not recipe.include

    def _will_be(self, node: fx.Node) -> bool:
        if node.name in self.plan.dropped:
            return True
        face = self._kind(node)
        if node.name in {*self.plan.float_ops, *self.state.left_float} or not self._selected(node):
            return False
        if face in LEFT_FLOAT or face not in self.known:
            return False
        # Not a bias, which is never rounded: kernels have it in float.
        sources = [
            source
            for source in node.all_input_nodes
            if rounding_of(self._module(source)) is not None or not is_constant(source)
        ]
        tensors = [source for source in sources if is_float(self.values.get(source.name))]
        return all(self._on_grid(source) for source in tensors) and self._is_rounded(node)

    def _on_grid(self, node: fx.Node) -> bool:
        """Whether a value was rounded, and perhaps moved since, or is passed from an op to its ReLU."""
        module = self._module(node)
        if module is not None and rounding_of(module) is not None:
            return True
        if self._computes(node) or node.op in ("placeholder", "get_attr"):
            return len(node.users) == 1 and node.op not in ("placeholder", "get_attr") and self._will_be(node)
        sources = [s for s in node.all_input_nodes if is_float(self.values.get(s.name))]
        return bool(sources) and all(self._on_grid(source) for source in sources)

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether the output of an op is rounded, directly or after a ReLU and ops that only move values."""
        for user in node.users:
            module = self._module(user)
            if module is not None and rounding_of(module) is not None and user.name not in self.plan.sums:
                return True
            follows = user.name in self.plan.dropped or _is_relu(user, module) or not self._computes(user)
            if user.op != "output" and follows and self._is_rounded(user):
                return True
        return False

    def _why_no_product(self, node: fx.Node) -> str:
        """Why mode fx does not round a product."""
        values = [self.values.get(source.name) for source in node.all_input_nodes]
        if not all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values):
            return "int8 kernels multiply float32 only"
        if "products" not in self.state.recipe.families:
            return "the checkpoint is from a release that did not quantize products with broadcast shapes"
        if node.target in PRODUCTS:
            return "an outer product sums nothing, and rounding could make different factors (such as positions) equal"
        return (
            "it is not a single product of two tensors that sums over their shared dimensions, and only those have an "
            "int8 kernel"
        )

    def _why_chosen(self, node: fx.Node) -> str:
        """Why an op that could be int8 stays float; empty if this does not apply."""
        if node.name in self.state.left_float:
            return self.state.left_float[node.name]
        if not self._selected(node):
            return EXCLUDED
        return "only float ops read it" if node.name in self.plan.sums else ""

    def _why(self, node: fx.Node) -> str:
        face, name = self._kind(node), self._kind_name(node)
        chosen = self._why_chosen(node)
        if chosen:
            return chosen
        if face in LEFT_FLOAT:
            coarser = ": its int8 kernel rounds to the coarser grid of its input" if face in _AVERAGES else ""
            return f"{name} is not quantized in mode='fx'{coarser}"
        if name in PRODUCT_NAMES:
            divides = node.name in self.plan.divisors
            return "divisors are not rounded" if divides else self._why_no_product(node)
        if face in _WRITE_INSTEAD:
            unknown, known = _WRITE_INSTEAD[face]
            return f"mode='fx' does not know {unknown}: write {known}"
        if is_batchnorm(self._module(node)):
            return (
                "a BatchNorm that follows no layer, is called from several places, or normalizes another dimension "
                "than the layer's channels cannot be folded"
            )
        if node.name in self.plan.float_ops:
            return self._why_float_op(node)
        if face not in self.known:
            return f"mode='fx' has no int8 kernel for {name}"
        return "its input or its output is not quantized"

    def _why_float_op(self, node: fx.Node) -> str:
        """Why an op that upstream would lower stays float."""
        face = self._kind(node)
        if face in CLAMPS:
            if self.state.recipe.target.engine == "qnnpack":
                return "QNNPACK's clamp misplaces channels-last values"
            return "its limits are tensors, which its int8 kernel does not support"
        if is_scaled_sum(node):
            return "its int8 kernel takes no alpha=: multiply the tensor before it is added"
        return f"{'' if face in OWN_GRIDS else 'with a number, '}its int8 kernel has another grid"


def _holds_float(value: Any) -> bool:
    """Whether a value is a float tensor or a container with one."""
    return is_float(value) or any(map(_holds_float, parts(value)))


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, (nn.ReLU, nn.ReLU6)) or node.target in (F.relu, F.relu6, "relu", "relu_")
