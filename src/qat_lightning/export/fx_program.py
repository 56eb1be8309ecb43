"""The int8 graph of mode fx in plain ops: each packed kernel becomes a float op between dequantize and quantize."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from qat_lightning.artifact.packed import is_packed_layer
from qat_lightning.checks import LayerCheck
from qat_lightning.errors import ExportError
from qat_lightning.export.grids import Grid, QdqLayer, on_grid
from qat_lightning.export.plain_layers import plain_integer_layer
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer import IntegerLayer
from qat_lightning.layers.kernels import is_packed
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.verify import Recorder, example_values, is_faulty
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import quantized_engine

_Q = torch.ops.quantized


def _conv_sizes(packed: Any) -> tuple[Any, ...]:
    return tuple(packed.stride()), tuple(packed.padding()), tuple(packed.dilation()), packed.groups()


def _relu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(a: Any, b: Any) -> Tensor:
        return F.relu(function(a, b))

    return run


_BINARY: dict[Any, Callable[..., Any]] = {
    _Q.add: torch.add,
    _Q.add_relu: _relu(torch.add),
    _Q.mul: torch.mul,
    _Q.mul_relu: _relu(torch.mul),
    _Q.matmul: torch.matmul,
    _Q.add_scalar: torch.add,
    _Q.add_scalar_relu: _relu(torch.add),
    _Q.mul_scalar: torch.mul,
    _Q.mul_scalar_relu: _relu(torch.mul),
}
"""Ops with two operands. A quantize op after them is dropped if the values are on that grid already."""
_UNARY: dict[Any, tuple[Callable[..., Any], int]] = {
    _Q.hardswish: (F.hardswish, 1),
    _Q.sigmoid: (torch.sigmoid, 1),
    _Q.relu6: (F.relu6, 1),
    _Q.leaky_relu: (F.leaky_relu, 2),
    _Q.elu: (F.elu, 2),
    _Q.softmax: (F.softmax, 2),
    _Q.cat: (torch.cat, 2),
}
"""Ops with one operand, and how many of their arguments belong to the op rather than to its grid."""
_LINEAR = {_Q.linear: False, _Q.linear_relu: True}
_CONVOLUTIONS = {
    _Q.conv1d: False,
    _Q.conv1d_relu: True,
    _Q.conv2d: False,
    _Q.conv2d_relu: True,
    _Q.conv3d: False,
    _Q.conv3d_relu: True,
}
_ELEMENTWISE: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nnq.ReLU6: lambda module: nn.ReLU6(),
    nnq.Hardswish: lambda module: nn.Hardswish(),
    nnq.ELU: lambda module: nn.ELU(module.alpha),
    nnq.LeakyReLU: lambda module: nn.LeakyReLU(module.negative_slope),
    nnq.Sigmoid: lambda module: nn.Sigmoid(),
    nnq.Softmax: lambda module: nn.Softmax(module.dim),
    nnq.Dropout: lambda module: nn.Identity(),
}


@torch.no_grad()
def fx_float_graph(
    network: GraphNetwork, example: Example, target: Backend, spell: Spelling | None = None
) -> fx.GraphModule:
    """Convert an int8 graph to plain ops, and compare each with its kernel.

    Args:
        network: The int8 network.
        example: A real batch.
        target: Its backend.
        spell: See `qat_lightning.export.program.int8_program`.

    Raises:
        ExportError: A kernel has no translation, or its translation computes different values.
    """
    with quantized_engine(target.engine):
        recorder = Recorder(network, network.graph)
        recorder.run(*example_values(network.graph, example))
        translation = _Translation(network, recorder.values, spell or plain_integer_layer)
        translated = translation.run()
    checked = _Checked(translated, translation.stands_for, recorder.values, target)
    checked.run(*example_values(network.graph, example))
    return translated


class _Translation:
    """One pass over an int8 graph that replaces each quantized tensor by the float tensor of the same values."""

    def __init__(self, network: GraphNetwork, values: dict[str, Any], spell: Spelling) -> None:
        self.network, self.values, self.spell = network, values, spell
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self.stands_for: dict[str, str] = {}

    def run(self) -> fx.GraphModule:
        for node in self.network.graph.nodes:
            made = self._node(node)
            if made is None:
                continue
            value = self.values.get(node.name)
            if isinstance(value, Tensor) and value.is_quantized and node.op != "output":
                if not self._ends_on_grid(made):
                    made = self.graph.call_function(on_grid, (made, Grid.of(value)))
                self.stands_for[made.name] = node.name
            self.made[node] = made
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        used = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        translated = fx.GraphModule({name: value for name, value in self.root.items() if name in used}, self.graph)
        return translated.eval()

    def _ends_on_grid(self, made: fx.Node) -> bool:
        return made.op == "call_module" and isinstance(self.root.get(str(made.target)), QdqLayer)

    def _node(self, node: fx.Node) -> fx.Node | None:
        mapped: Any = fx.node.map_arg((node.args, node.kwargs), lambda arg: self.made.get(arg))
        args, kwargs = mapped
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        if node.op == "call_method" and node.target == "dequantize":
            return _as_node(args[0])
        if node.op == "call_function":
            return self._function(node, args, kwargs)
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _attribute(self, node: fx.Node) -> fx.Node | None:
        value: Any = operator.attrgetter(str(node.target))(self.network)
        if is_packed(value):
            return None
        self.root[str(node.target)] = value
        return self.graph.create_node("get_attr", node.target, name=node.name)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        module: Any = self.network.get_submodule(str(node.target))
        name = str(node.target)
        if is_packed_layer(module):
            module = _blaming(node, lambda: QdqLayer.of(module))
        elif type(module) in _ELEMENTWISE:
            module = _ELEMENTWISE[type(module)](module)
        elif type(module) in (nnq.BatchNorm2d, nnq.BatchNorm3d, nniq.BNReLU2d, nniq.BNReLU3d):
            module = _batchnorm(module)
        elif type(module).__module__.startswith("torch.ao.nn.quantized.modules"):
            raise _untranslated(node, type(module).__name__)
        elif isinstance(module, IntegerLayer):
            module = self.spell(module, name)
        self.root[name] = module
        return self.graph.create_node("call_module", name, args, kwargs, name=node.name)

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        target: Any = node.target
        target = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        if target in (torch.quantize_per_tensor, torch.dequantize):
            return _as_node(args[0])
        if target in _BINARY:
            return self.graph.call_function(_BINARY[target], args[:2])
        if target in _UNARY:
            function, count = _UNARY[target]
            return self._unary(node, function, count, args, kwargs)
        if target in _LINEAR or target in _CONVOLUTIONS:
            return self._packed(node, target, args)
        if isinstance(target, torch._ops.OpOverloadPacket) and target._qualified_op_name.startswith("quantized::"):
            raise _untranslated(node, target._qualified_op_name)
        return self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)

    def _unary(self, node: fx.Node, function: Any, count: int, args: Any, kwargs: Any) -> fx.Node:
        schema = getattr(node.target, "_schema", None) or node.target.default._schema  # type: ignore[union-attr]
        named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        grid = ("output_scale", "output_zero_point", "scale", "zero_point", "inplace")
        return self.graph.call_function(function, tuple(v for k, v in named.items() if k not in grid)[:count])

    def _packed(self, node: fx.Node, target: Any, args: Any) -> fx.Node:
        packed: Any = operator.attrgetter(str(node.args[1].target))(self.network)  # type: ignore[union-attr]
        grid = Grid.of(self.values[node.name])
        if target in _LINEAR:
            weight, bias = torch.ops.quantized.linear_unpack(packed)
            layer = QdqLayer(weight, bias, grid, relu=_LINEAR[target])
        else:
            weight, bias = packed.unpack()
            sizes = _conv_sizes(packed)
            if target in (_Q.conv1d, _Q.conv1d_relu):
                # Packed with an additional leading dimension of size 1.
                weight, sizes = weight.squeeze(2), (*((size[-1],) for size in sizes[:3]), sizes[3])
            layer = QdqLayer(weight, bias, grid, relu=_CONVOLUTIONS[target], sizes=sizes)
        name = f"_{node.name}"
        self.root[name] = layer
        return self.graph.create_node("call_module", name, args[:1], name=node.name)


class _Checked(fx.Interpreter):
    """Runs a translation, compares each value with its quantized tensor, and continues with the kernel's value."""

    def __init__(
        self, translated: fx.GraphModule, stands_for: dict[str, str], values: dict[str, Any], target: Backend
    ) -> None:
        super().__init__(translated)
        self.stands_for, self.values, self.target = stands_for, values, target

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.name not in self.stands_for:
            return value
        kernel = self.values[self.stands_for[n.name]]
        refuse_other(self.stands_for[n.name], kernel, value, self.target)
        return kernel.dequantize().contiguous()


def refuse_other(name: str, kernel: Tensor, value: Tensor, target: Backend) -> None:
    """Compare the output of an op with that of its int8 kernel on the same input.

    Args:
        name: Name for the message.
        kernel: The kernel's output, a quantized tensor of torch.
        value: The op's output, float.
        target: The backend, for its tolerance.

    Raises:
        ExportError: They differ by more than rounding.
    """
    wanted = kernel.dequantize()
    steps = float((wanted - value).abs().max()) / kernel.q_scale() if value.numel() else 0.0
    check = LayerCheck(name, "", sqnr_db(wanted, value), steps)
    if is_faulty(check, target):
        raise ExportError(
            f"{name!r} computes different values in an exported graph than in its kernel of backend {target.name!r}: "
            f"{check.sqnr_db:.1f} dB of SQNR, up to {steps:.0f} steps apart. Keep it float with exclude=, or use "
            "mode='pt2e', whose int8 network is such a graph."
        )


def _batchnorm(module: Any) -> nn.Module:
    dims = 2 if isinstance(module, nnq.BatchNorm2d) else 3
    plain = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](module.num_features, eps=module.eps)
    plain.weight, plain.bias = module.weight, module.bias
    plain.running_mean, plain.running_var = module.running_mean, module.running_var
    relu = type(module) in (nniq.BNReLU2d, nniq.BNReLU3d)
    return nn.Sequential(plain, nn.ReLU()).eval() if relu else plain.eval()


def _as_node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _blaming(node: fx.Node, make: Callable[[], QdqLayer]) -> QdqLayer:
    try:
        return make()
    except ExportError as error:
        raise ExportError(f"{str(node.target)!r}: {error}") from error


def _untranslated(node: fx.Node, what: str) -> ExportError:
    return ExportError(
        f"{node.name!r} is {what}, which cannot be exported: keep it float with exclude=, or use "
        "mode='pt2e', whose int8 network is such a graph."
    )
