"""Converting a trained graph to quantize, dequantize and plain ops with int8 weights: PT2E's decomposed form."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e as upstream
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from qat_lightning.errors import ConversionError
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.scopes import scope_of
from qat_lightning.layers.batchnorm import fold_factor, folded_bias, folded_weight, for_each_row
from qat_lightning.layers.qat_modules import round_for_good
from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS
from qat_lightning.modes.pt2e.capture import TRAINING_FLAG
from qat_lightning.modes.pt2e.training import Plan, weight_quantizer
from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize

aten = torch.ops.aten


@dataclass
class Decomposed:
    """The result of conversion.

    Attributes:
        graph_module: The decomposed graph.
        unseen: Names of nodes whose range was never observed, so that ops which read them stayed float.
    """

    graph_module: fx.GraphModule
    unseen: list[str] = field(default_factory=list)


@torch.no_grad()
def decompose(root: nn.Module, plan: Plan, name: str) -> Decomposed:
    """Convert a prepared network, which is modified.

    Args:
        root: The prepared network, on the CPU, in eval mode.
        plan: Plan of its preparation.
        name: The float network's class, for messages.

    Raises:
        ConversionError: No range was ever observed, or upstream's converter failed.
    """
    graph = copy.deepcopy(plan.graph)
    graph_module = fx.GraphModule(root, graph)
    graph_module.meta = dict(plan.meta)
    graph_module.train(False)
    _fold_batchnorm(graph_module, plan)
    evaluate(graph)
    unseen = _leave_unseen_float(graph_module)
    quantizers = [node for node in graph.nodes if _quantizer(graph_module, node) is not None]
    if not quantizers:
        raise ConversionError(
            f"No finite range was ever observed in {name}: train at least one step before converting it."
        )
    visit_weights(graph_module, FakeQuantize.observe)
    graph.lint()
    graph_module.recompile()
    try:
        converted = _upstream_convert(graph_module)
    except Exception as error:
        raise ConversionError(
            f"torchao's converter failed on {name} ({type(error).__name__}: {error}). Use exclude= for the part that "
            "fails, or mode='fx' or mode='eager'."
        ) from error
    return Decomposed(tidy(converted), unseen)


def _fold_batchnorm(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Fold BatchNorm into the weight and bias of the layer before it, with the arithmetic of training."""
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    for pair in plan.folded:
        layer, batchnorm = nodes[pair.layer], nodes[pair.batchnorm]
        axis = CHANNEL_AXIS[layer.target]
        quantizer = weight_quantizer(graph_module, layer)
        weight_node: Any = layer.args[1] if quantizer is None else quantizer.args[0]
        weight = _fixed(graph_module, weight_node)
        assert weight is not None
        gamma, beta, mean, var = (
            None if value is None else for_each_row(value, weight, axis)
            for value in (_tensor(graph_module, arg) for arg in batchnorm.args[1:5])
        )
        assert mean is not None
        assert var is not None
        factor = fold_factor(gamma, var, float(batchnorm.args[7]))
        bias_node: Any = layer.args[2] if len(layer.args) > 2 else None
        derived = _is_derived(graph_module, bias_node)
        bias = _fixed(graph_module, bias_node.args[0] if derived else bias_node)
        multiplied = folded_weight(weight, factor, axis=axis)
        new_weight = _constant(graph_module, weight_node, f"{pair.layer}_weight", multiplied)
        shifted = folded_bias(bias, mean, factor, beta)
        new_bias = _constant(graph_module, weight_node, f"{pair.layer}_bias", shifted)
        if quantizer is None:
            layer.update_arg(1, new_weight)
        else:
            quantizer.update_arg(0, new_weight)
            new_weight.append(quantizer)
        if derived:
            new_bias.append(bias_node)
            bias_node.update_arg(0, new_bias)
            new_bias = bias_node
        layer.args = (*layer.args[:2], new_bias, *layer.args[3:])
        batchnorm.replace_all_uses_with(batchnorm.args[0])
        graph.erase_node(batchnorm)


def _tensor(module: nn.Module, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    holder, _, leaf = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(holder), leaf)
    return value.detach() if isinstance(value, Tensor) else None


def _fixed(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    """A weight or bias, which may be computed from parameters: by a parametrization, or for a transposed layer."""
    if node is None:
        return None
    value = _tensor(graph_module, node)
    return _computed(graph_module, node) if value is None else value


def _constant(graph_module: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Register a tensor in the module, and add a node that reads it."""
    while hasattr(graph_module, name):
        name += "_"
    graph_module.register_buffer(name, value)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    node.meta = dict(before.meta)
    if "val" in node.meta:
        node.meta["val"] = node.meta["val"].new_empty(value.shape)
    return node


def evaluate(graph: fx.Graph) -> None:
    """Switch the remaining nodes to evaluation."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default:
            has_statistics = node.args[3] is not None
            node.update_arg(5, not has_statistics)
        elif node.target is aten.add_.Tensor and str(node.args[0].target).endswith("num_batches_tracked"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (aten.scaled_dot_product_attention.default, aten.rrelu.default):
            argument, in_eval = TRAINING_FLAG[node.target]
            if len(node.args) > argument:
                node.update_arg(argument, in_eval)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "dropout_p"}
        elif node.target in TRAINING_FLAG and node.target is not aten.native_dropout.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    # Attributes that only BatchNorm read; the rest of the graph is as captured.
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _quantizer(module: nn.Module, node: fx.Node) -> FakeQuantize | None:
    if node.op != "call_module":
        return None
    fq = module.get_submodule(str(node.target))
    return fq if isinstance(fq, FakeQuantize) else None


def _is_derived(module: nn.Module, node: Any) -> bool:
    """Whether a node rounds to a grid derived from other grids."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    return isinstance(module.get_submodule(str(node.target)), DerivedFakeQuantize)


def _lacks_range(derived: Any) -> bool:
    """Whether a grid that a derived grid depends on is unknown; weights are observed before conversion."""
    return any(source.left_float or (source.source != "present" and not source.seen) for source in derived.sources)


def _take_out(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _leave_unseen_float(graph_module: fx.GraphModule) -> list[str]:
    """Remove FakeQuantizes that never round or have no range, and those of weights whose input is then float."""
    graph = graph_module.graph
    unseen = []
    without_input = set[fx.Node]()
    for node in list(graph.nodes):
        fq = _quantizer(graph_module, node)
        if fq is None or not (fq.left_float or (fq.source != "present" and not fq.seen)):
            continue
        if not fq.left_float:
            unseen.append(node.args[0].name)
        without_input |= {user for user in node.users if user.args[:1] == (node,)}
        _take_out(node)
    for node in list(graph.nodes):
        if _is_derived(graph_module, node) and _lacks_range(graph_module.get_submodule(str(node.target))):
            _take_out(node)
    for node in without_input:
        weight = weight_quantizer(graph_module, node)
        if weight is None:
            continue
        # The weight stays on its grid, as in training; only its input is float here.
        fq, value = _quantizer(graph_module, weight), _tensor(graph_module, weight.args[0])
        assert fq is not None
        rounded: Any = weight.args[0]
        if value is not None:
            rounded = _constant(graph_module, weight, f"{node.name}_rounded", round_for_good(value, fq))
        node.replace_input_with(weight, rounded)
        if not weight.users:
            graph.erase_node(weight)
    return unseen


def visit_weights(graph_module: fx.GraphModule, visit: Callable[[FakeQuantize, Tensor], None]) -> None:
    """Call ``visit`` for each FakeQuantize of a weight, with its present weight, folded if necessary."""
    for node in graph_module.graph.nodes:
        fq = _quantizer(graph_module, node)
        if fq is not None and fq.source == "present":
            value = _fixed(graph_module, node.args[0])
            assert value is not None
            visit(fq, value)


def _computed(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node that depends only on parameters, such as a parametrized weight."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(source: fx.Node) -> fx.Node:
        if source.op == "placeholder":
            raise ConversionError(f"The weight {node.name!r} is computed from the input, and has no fixed range.")
        if source not in copies:
            for argument in source.all_input_nodes:
                copy_of(argument)
            copies[source] = graph.node_copy(source, lambda inner: copies[inner])
        return copies[source]

    graph.output(copy_of(node))
    value: Tensor = fx.GraphModule(graph_module, graph)()
    return value


def _upstream_convert(graph_module: fx.GraphModule) -> Any:
    """Same as ``convert_pt2e``, without folding upstream's conv-bn pattern, which does not occur here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        converted = upstream._convert_to_reference_decomposed_fx(graph_module)
        for step in (upstream.DuplicateDQPass(), upstream.PortNodeMetaForQDQ()):
            converted = PassManager([step])(converted).graph_module
        _read_once(converted.graph)
        with buffers_copied(converted):  # upstream runs every node that takes constants, also those that write to one
            upstream.constant_fold(converted, upstream._quant_node_constraint)
    return converted


def _read_once(graph: fx.Graph) -> None:
    """Read each attribute with a single node: folding deletes attributes of unused nodes, even if others read them."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        kept = first.setdefault(str(node.target), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def tidy(converted: fx.GraphModule) -> fx.GraphModule:
    """Keep only tensors that the graph reads, as buffers, each once; upstream leaves the float weights behind."""
    root = nn.Module()
    kept: dict[str, tuple[Tensor, list[Any]]] = {}
    graph = copy.deepcopy(converted.graph)
    graph._tracer_cls = None  # export's own tracer, with which a graph module cannot be pickled
    names = _readable_names(graph)
    attributes = graph.find_nodes(op="get_attr")
    grids = {node: _grid_of(converted, node) for node in attributes}
    for node in attributes:
        holder, _, leaf = str(node.target).rpartition(".")
        value: Any = getattr(converted.get_submodule(holder), leaf)
        name = names.get(node, str(node.target).replace(".", "_"))
        if isinstance(value, nn.Module):
            root.add_module(name, value)
        else:
            # The weight of a layer that is called twice is rounded twice, to the same integers on the same grid. Other
            # constants stay
            # separate: a runtime with grids per tensor, rather than per op, would give all of them one grid.
            same = (other for other, known in kept.items() if _same_weight(known, (value, grids[node])))
            name = next(same, name)
            if name not in kept:
                kept[name] = value, grids[node]
                root.register_buffer(name, value.detach())
        node.target = name
    return fx.GraphModule(root, graph).eval()


def _readable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name the tensors of each layer after the layer, where upstream numbers them.

    Upstream's ``_frozen_param0`` is also a name that Inductor uses for its own constants, and confuses with them.
    """
    attributes = graph.find_nodes(op="get_attr")
    names = {
        node: str(node.target).replace("_frozen_param", "constant_")
        for node in attributes
        if "_frozen_param" in str(node.target)
    }
    wanted: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target not in CHANNEL_AXIS:
            continue
        layer = (scope_of(node) or node.name).replace(".", "_")
        parts = dict(zip(("weight", "scale", "zero_point"), node.args[1].args, strict=False))
        parts |= {"bias": node.args[2]} if len(node.args) > 2 else {}
        wanted |= {argument: f"{layer}_{part}" for part, argument in parts.items() if argument in attributes}
    # A weight that other ops read as well stays in float under its own name.
    taken = {str(node.target).replace(".", "_") for node in attributes if node not in {**names, **wanted}}
    for node, name in wanted.items():
        names[node] = _unused(name, {*names.values(), *taken})
    return names


def _unused(name: str, names: set[str]) -> str:
    count = 1
    unused = name
    while unused in names:
        count += 1
        unused = f"{name}_{count}"
    return unused


def _grid_of(converted: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The other arguments of ops that read integers, with tensors among them as lists."""
    integers = _tensor(converted, node)
    if integers is None or integers.dtype is not torch.int8:
        return []

    def plain(value: Any) -> Any:
        tensor = _tensor(converted, value)
        return value if tensor is None else tensor.tolist()

    return [user.target for user in node.users] + [plain(value) for user in node.users for value in user.args[1:]]


def _same_weight(one: tuple[Tensor, list[Any]], other: tuple[Tensor, list[Any]]) -> bool:
    (integers, grid), (others, other_grid) = one, other
    if not integers.dtype is others.dtype is torch.int8 or integers.shape != others.shape:
        return False
    return grid == other_grid and torch.equal(integers, others)
