"""The graph that trains: the prepared one, with BatchNorm, dropout and folded weights as modules with flags.

Conversion needs the graph from upstream's prepare, and training needs one in which `train` and `eval` work as in any
module. Both use the same modules, parameters and buffers, under the names of the float network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from qat_lightning.errors import NetworkError
from qat_lightning.graph.portable_graph import HoldsGraphs
from qat_lightning.graph.scopes import scope_of
from qat_lightning.layers.batchnorm import fake_quantize_folded, fold_factor, folded_bias, for_each_row, unfolded
from qat_lightning.layers.qat_modules import (
    Counter,
    FreezableBatchNorm,
    FunctionalBatchNorm,
    make_batchnorm_freezable,
)
from qat_lightning.modes.decomposed.ops import CHANNEL_AXIS
from qat_lightning.modes.pt2e.capture import TRAINING_FLAG
from qat_lightning.modes.pt2e.folding import Folded
from qat_lightning.modes.pt2e.shared_ranges import observe_once
from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize

aten = torch.ops.aten


_ROUNDS = (FakeQuantize, DerivedFakeQuantize)
"""Ops that preparation inserts into a graph."""


class FoldedWeight(nn.Module):
    """Rounds the weight of a layer as it will be with BatchNorm folded in.

    Args:
        fq: The weight's FakeQuantize; it gets the folded weight.
        eps: ``eps`` of the BatchNorm.
        axis: Output channel dimension of the weight.
    """

    def __init__(self, fq: FakeQuantize, eps: float, axis: int) -> None:
        super().__init__()
        self.__dict__["fq"] = fq  # not a child: it is registered under the weight's name
        self.eps = eps
        self.axis = axis

    def forward(self, weight: Tensor, gamma: Tensor | None, running_var: Tensor) -> Tensor:
        """The rounded weight, divided by the folding factor."""
        factor = for_each_row(fold_factor(gamma, running_var, self.eps), weight, self.axis)
        return fake_quantize_folded(weight, factor, self.__dict__["fq"], axis=self.axis)


class FoldedBias(nn.Module):
    """Rounds the bias of a layer as it will be with BatchNorm folded in.

    In training, BatchNorm subtracts the mean of the batch, and with it the rounding error that is common to a channel.

    Args:
        derived: The FakeQuantize of the bias; it gets the folded bias.
        eps: ``eps`` of the BatchNorm.
    """

    def __init__(self, derived: DerivedFakeQuantize, eps: float) -> None:
        super().__init__()
        self.__dict__["derived"] = derived  # not a child: it is registered under the bias's name
        self.eps = eps

    def forward(
        self, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, running_mean: Tensor, running_var: Tensor
    ) -> Tensor:
        """The bias that BatchNorm maps to the rounded one; gradients are those of the bias."""
        with torch.no_grad():
            factor = fold_factor(gamma, running_var, self.eps)
            shifted = folded_bias(bias, running_mean, factor, beta)
            change = unfolded(self.__dict__["derived"](shifted) - shifted, factor, 0.0)
        return bias + change


class TrainingOnly(nn.Module):
    """An op with an argument for training mode, which is replaced by the module's flag.

    Args:
        op: An op such as ``aten.dropout.default``.
        argument: Position of the argument.
        in_eval: Its value in evaluation.
    """

    def __init__(self, op: Any, argument: int, in_eval: Any) -> None:
        super().__init__()
        self.op = op
        self.argument = argument
        self.in_eval = in_eval

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op."""
        if self.training:
            return self.op(*args, **kwargs)
        given = list(args)
        if len(given) > self.argument:
            given[self.argument] = self.in_eval
        return self.op(*given, **{name: value for name, value in kwargs.items() if name != "dropout_p"})

    def extra_repr(self) -> str:
        """The op's name."""
        return str(self.op)


@dataclass
class Plan(HoldsGraphs):
    """Data of the preparation that conversion needs.

    Attributes:
        graph: The graph from upstream's prepare.
        meta: Its graph module's ``meta``, read by upstream's convert.
        folded: Layers and their BatchNorms.
        weights: For each weighted op, the name of its weight's FakeQuantize.
        spec: Signature of the network.
    """

    graph: fx.Graph
    meta: dict[str, Any]
    folded: list[Folded]
    weights: dict[str, str]
    spec: Any


def adopt(network: nn.Module, prepared: fx.GraphModule) -> nn.Module:
    """A copy of ``network``'s tree that shares its tensors, with the modules that preparation added.

    All names of the float network stay, also of modules that the graph does not use. FakeQuantizes go into a child
    ``fake_quantize``, under the name of the rounded tensor.

    Args:
        network: The float network.
        prepared: Its captured graph with FakeQuantize; the graph is changed to the new names.
    """
    root = share(network)
    make_batchnorm_freezable(root)
    holder = nn.Module()
    child = "fake_quantize" if not hasattr(root, "fake_quantize") else "_fake_quantize"
    root.add_module(child, holder)
    names: dict[int, str] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(fq := prepared.get_submodule(node.target), _ROUNDS):
            if id(fq) not in names:
                leaf = node.args[0].name
                while hasattr(holder, leaf):
                    leaf += "_"  # such as the result of x.to(...), which is no valid name of a module
                names[id(fq)] = f"{child}.{leaf}"
                holder.add_module(leaf, fq)
            node.target = names[id(fq)]
        elif node.op == "get_attr":
            _adopt_attribute(root, prepared, str(node.target))
    return root


def share(network: nn.Module) -> nn.Module:
    """The same tree of modules with the same classes, parameters and buffers."""
    copies: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        copied = module.__class__.__new__(module.__class__)
        copies[id(module)] = copied
        copied.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            copied.__dict__[name] = module.__dict__[name].copy()
        copied.__dict__["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        return copied

    return twin(network)


def _adopt_attribute(root: nn.Module, prepared: fx.GraphModule, target: str) -> None:
    """Take over a constant or a subgraph that export or the quantizer created."""
    holder: Any = root
    source: Any = prepared
    *path, leaf = target.split(".")
    for part in path:
        source = getattr(source, part)
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder._modules[part]
    if hasattr(holder, leaf):
        return
    value = getattr(source, leaf)
    if isinstance(value, nn.Module):
        holder.add_module(leaf, value)
    else:
        # Not part of the state: it is created in every preparation.
        holder.register_buffer(leaf, value, persistent=False)


def weight_quantizers(root: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """For each weighted op, by node name, the name of its weight's FakeQuantize."""
    found = {node.name: weight_quantizer(root, node) for node in graph.nodes}
    return {name: str(quantizer.target) for name, quantizer in found.items() if quantizer is not None}


def weight_quantizer(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node of the FakeQuantize of a weighted op's weight, if it has one."""
    if node.op != "call_function" or node.target not in CHANNEL_AXIS:
        return None
    source = node.args[1]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    return source if isinstance(root.get_submodule(str(source.target)), FakeQuantize) else None


def training_graph(root: nn.Module, plan: Plan) -> fx.Graph:
    """Derive the graph that trains from the prepared one; modules that it needs are added to ``root``."""
    graph = copy.deepcopy(plan.graph)
    nodes = {node.name: node for node in graph.nodes}
    for pair in plan.folded:
        if pair.layer in plan.weights:
            _fold_weight(root, graph, nodes[pair.layer], nodes[pair.batchnorm])
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default and node.args[5]:
            _own_batchnorm(root, node)
        elif node.target in TRAINING_FLAG:
            _own_training_flag(root, node)
    _count_batches(root, graph)
    observe_once(root, graph)
    _follow_device(graph)
    graph.lint()
    return graph


def _fold_weight(root: nn.Module, graph: fx.Graph, layer: fx.Node, batchnorm: fx.Node) -> None:
    quantizer: Any = layer.args[1]
    fq: Any = root.get_submodule(str(quantizer.target))
    name = f"{quantizer.target}_folded"
    gamma, running_var, eps = batchnorm.args[1], batchnorm.args[4], float(batchnorm.args[7])  # type: ignore[arg-type]
    _put(root, name, FoldedWeight(fq, eps, CHANNEL_AXIS[layer.target]))
    with graph.inserting_before(layer):
        rounded = graph.call_module(name, (quantizer.args[0], gamma, running_var))
    layer.replace_input_with(quantizer, rounded)
    if not quantizer.users:
        graph.erase_node(quantizer)
    bias: Any = layer.args[2] if len(layer.args) > 2 else None
    if bias is not None and bias.op == "call_module":
        _fold_bias(root, layer, bias, batchnorm)


def _fold_bias(root: nn.Module, layer: fx.Node, bias: fx.Node, batchnorm: fx.Node) -> None:
    """Round the bias with BatchNorm's shift folded in, because that is what kernels add."""
    derived: Any = root.get_submodule(str(bias.target))
    name = f"{bias.target}_folded"
    _put(root, name, FoldedBias(derived, float(batchnorm.args[7])))  # type: ignore[arg-type]
    with layer.graph.inserting_before(layer):
        rounded = layer.graph.call_module(name, (bias.args[0], *batchnorm.args[1:5]))
    layer.replace_input_with(bias, rounded)
    layer.graph.erase_node(bias)


def _own_batchnorm(root: nn.Module, node: fx.Node) -> None:
    """Call the network's own BatchNorm module if there is one, otherwise a module that calls ``F.batch_norm``."""
    input, weight, bias, mean, var, _, momentum, eps, _ = node.args
    name = scope_of(node)
    module = _submodule(root, name)
    is_own = type(module) in FreezableBatchNorm.__subclasses__() and module.track_running_stats
    parts = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    if is_own and all(_is_attribute(part, root, module, key) for key, part in parts.items()):
        _call_instead(node, name, (input,))
        return
    target = _put_in_scope(root, node, FunctionalBatchNorm(momentum, eps))  # type: ignore[arg-type]
    _call_instead(node, target, (input, weight, bias, mean, var))


def _own_training_flag(root: nn.Module, node: fx.Node) -> None:
    argument, in_eval = TRAINING_FLAG[node.target]
    given: Any = node.args[argument] if len(node.args) > argument else node.kwargs.get("dropout_p", in_eval)
    if given == in_eval:
        return
    name = scope_of(node)
    module = _submodule(root, name)
    if isinstance(module, _DropoutNd) and type(module).__module__ == _DropoutNd.__module__:
        module.inplace = False  # its output may have several readers now
        _call_instead(node, name, (node.args[0],))
        return
    target = _put_in_scope(root, node, TrainingOnly(node.target, argument, in_eval))
    _call_instead(node, target, node.args, node.kwargs)


def _count_batches(root: nn.Module, graph: fx.Graph) -> None:
    """Remove the counting of batches for BatchNorms that count themselves, and make the rest follow a flag."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for node in graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        counter = node.args[0]
        if counter.op != "get_attr" or not str(counter.target).endswith("num_batches_tracked"):
            continue
        if scope_of(node) in called and isinstance(_submodule(root, scope_of(node)), FreezableBatchNorm):
            if node.users:
                node.replace_all_uses_with(counter)
            graph.erase_node(node)
        else:
            _call_instead(node, _put_in_scope(root, node, Counter()), node.args)


def _follow_device(graph: fx.Graph) -> None:
    """Create tensors on the device of the input instead of the CPU, where the graph was traced."""
    placeholders = graph.find_nodes(op="placeholder")
    created = [node for node in graph.nodes if node.op == "call_function" and node.kwargs.get("device") is not None]
    if not created or not placeholders:
        return
    with graph.inserting_after(placeholders[-1]):
        device = graph.call_function(getattr, (placeholders[0], "device"))
    for node in created:
        node.kwargs = {**node.kwargs, "device": device}


def _submodule(root: nn.Module, name: str) -> Any:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _is_attribute(node: Any, root: nn.Module, module: nn.Module, key: str) -> bool:
    """Whether ``node`` reads the tensor ``module.key``, under any of its names."""
    own = getattr(module, key)
    if not isinstance(node, fx.Node):
        return own is None
    if node.op != "get_attr":
        return False
    holder, _, leaf = str(node.target).rpartition(".")
    return getattr(root.get_submodule(holder), leaf) is own


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    holder, _, leaf = name.rpartition(".")
    root.get_submodule(holder).add_module(leaf, module)


def _put_in_scope(root: nn.Module, node: fx.Node, module: nn.Module) -> str:
    """Add a module to the one whose forward created ``node``, so that it follows that module's flags."""
    scope = scope_of(node) if _submodule(root, scope_of(node)) is not None else ""
    name = f"{scope}.{node.name}_op" if scope else f"{node.name}_op"
    if _submodule(root, name) is not None:
        raise NetworkError(f"The network already has a module {name!r}: rename it to prepare it in mode='pt2e'.")
    _put(root, name, module)
    return name


def _call_instead(node: fx.Node, target: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Make ``node`` call the module ``target``."""
    # In place, so that the node keeps its name, by which conversion and verification find it.
    node.op, node.target = "call_module", target
    node.args, node.kwargs = args, kwargs or {}
