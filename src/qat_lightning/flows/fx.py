"""FX graph mode: functional ops are quantized as well, and the int8 network is a graph of packed kernels.

Upstream's prepare and convert (https://docs.pytorch.org/docs/stable/quantization.html) do the matching and lowering.
Ours are the FakeQuantize, the layers with folded BatchNorm, the folding of ReLU6 and the verification.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.nn.quantized.reference as nnqr
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    ObservationType,
    get_native_backend_config,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.fx.fuse import fuse
from torch.ao.quantization.fx.prepare import prepare as upstream_prepare
from torch.ao.quantization.quantize_fx import convert_fx

from qat_lightning.backends import quantized_engine
from qat_lightning.errors import ConversionError, NetworkError
from qat_lightning.fake_quantize import FakeQuantize, SharedRange
from qat_lightning.flows.base import Converted, Example, LayerCoverage, prepared_state
from qat_lightning.flows.tracing import line_at_fault, trace
from qat_lightning.flows.verify import check_layers
from qat_lightning.graph_network import GraphNetwork
from qat_lightning.qat_modules import (
    FOLDED_OF_FLOAT,
    FOLDED_OF_FUSED,
    make_batchnorm_freezable,
    make_batchnorm_plain,
    refresh_weight_ranges,
)
from qat_lightning.recipe import PreparedState, Recipe

_LEFT_FLOAT: tuple[Any, ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    nn.LayerNorm,
    F.layer_norm,
    nn.GroupNorm,
    F.group_norm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    F.instance_norm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LSTM,
    nn.GRU,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
    nn.Sigmoid,
    torch.sigmoid,
    "sigmoid",
    "sigmoid_",
    nn.Tanh,
    torch.tanh,
    "tanh",
    "tanh_",
    nn.Softmax,
    F.softmax,
    "softmax",
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    torch.mean,
    "mean",
)
"""Ops left float: the native kernels lack them for static quantization, run them on a grid fixed beforehand, or (means)
round them to the grid of their input, which is coarser than what they hold, with ties that no two kernels break alike."""

_WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.LSTM,
    nn.GRU,
)
_REFERENCE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nnqr.Conv1d,
    nn.Conv2d: nnqr.Conv2d,
    nn.Conv3d: nnqr.Conv3d,
    nn.Linear: nnqr.Linear,
}


@dataclass
class FxPlan:
    """What conversion needs of a prepared network besides its layers.

    Attributes:
        graph: The graph as upstream's prepare made it, ReLU6 folded.
        meta: Upstream's notes on it.
        dropped: Names of nodes that the int8 graph does without: ReLU6, which the output range of the op before stands
            for, and dropout.
    """

    graph: fx.Graph
    meta: dict[str, Any]
    dropped: list[str] = field(default_factory=list)


class FxFlow:
    """`Flow` for ``mode="fx"``."""

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> GraphNetwork:
        """See `Flow.prepare`."""
        float_network = copy.deepcopy(network)
        float_keys = set(float_network.state_dict())
        selected = {name: recipe.selects(_join(prefix, name)) for name, _ in network.named_modules() if name}
        graph_module, scopes = trace(network, example, leaves=_leaves(network, selected))
        originals = dict(network.named_modules())
        parameters = dict(network.named_parameters(remove_duplicate=False))
        flags = {module: module.training for module in network.modules()}
        network.train()
        config = _backend_config()
        with warnings.catch_warnings():
            # Upstream deprecates this API in favour of PT2 export on every call.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            try:
                fused = fuse(graph_module, True, None, config)
                prepared = upstream_prepare(
                    fused,
                    _qconfig_mapping(recipe, selected),
                    True,
                    scopes,
                    example_inputs=_flat_example(graph_module, example),
                    prepare_custom_config=PrepareCustomConfig().set_non_traceable_module_names(
                        _leaves(network, selected)
                    ),
                    backend_config=config,
                )
            except Exception as error:
                where = line_at_fault(error)
                raise NetworkError(
                    f"mode='fx' cannot prepare {type(network).__name__}{f' at {where}' if where else ''}: "
                    f"{type(error).__name__}: {error}. Try mode='pt2e' or mode='eager', or exclude the part at fault."
                ) from error
        for module, flag in flags.items():
            module.training = flag
        if not any(isinstance(module, FakeQuantize) for module in prepared.modules()):
            raise NetworkError(
                f"There is nothing to quantize in {type(network).__name__}: no selected convolution, linear layer or "
                "addition. Look at include and exclude, or give another module=."
            )
        plan = FxPlan(prepared.graph, prepared.meta)
        plan.dropped = _observe_only_after_relu6(prepared)
        dropouts, behind_dropout = _observe_only_before_dropout(prepared)
        plan.dropped += dropouts
        result = GraphNetwork(prepared)
        result.set_graph(_without(plan.graph, behind_dropout))
        _observe_each_range_once(result)
        _restore_children(result, originals, parameters, float_keys)
        make_batchnorm_freezable(result)
        result._quantization = PreparedState(recipe, float_network, prefix=prefix, plan=plan)
        return result

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """See `Flow.convert`."""
        state = prepared_state(prepared)
        plan: FxPlan = state.plan
        target = state.recipe.target
        assert isinstance(prepared, GraphNetwork)
        recording = copy.deepcopy(prepared)
        unseen = _never_observed(prepared)
        if unseen:
            raise ConversionError(
                f"No finite range was ever observed for {', '.join(unseen)}: train at least one step in which every "
                "layer runs on finite values, or exclude the layers behind them."
            )
        refresh_weight_ranges(prepared)
        make_batchnorm_plain(prepared)
        _observe_everywhere(prepared)
        graph = copy.deepcopy(plan.graph)
        _drop_nodes(graph, plan.dropped)
        graph_module = fx.GraphModule(prepared, graph)
        graph_module.meta = copy.copy(plan.meta)
        graph_module.eval()
        show_float_ops = _hide_float_ops(graph_module)
        with warnings.catch_warnings(), quantized_engine(target.engine):
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            try:
                int8 = convert_fx(graph_module, backend_config=_backend_config())
            except Exception as error:
                raise ConversionError(
                    f"Upstream's converter failed on {type(state.float_network).__name__} for backend "
                    f"{target.name!r}: {type(error).__name__}: {error}"
                ) from error
        show_float_ops(int8)
        _reshape_views(int8.graph)
        network = GraphNetwork(int8)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        checks = check_layers(recording, network, example, target)
        return Converted(network=network, coverage=_coverage(state, network), checks=checks)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def make_qconfig(recipe: Recipe) -> QConfig:
    """Activation and weight FakeQuantize as upstream's torch.ao code wants them: factories in a QConfig."""
    scheme, target = recipe.scheme, recipe.target
    low, high = target.activation_limits
    activation = functools.partial(
        FakeQuantize,
        dtype=torch.quint8 if target.activation_dtype is torch.uint8 else torch.qint8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.activation_symmetric else torch.per_tensor_affine,
        averaging_constant=scheme.averaging_constant,
    )
    weight = functools.partial(
        FakeQuantize,
        dtype=torch.qint8,
        quant_min=-recipe.weight_quant_max,
        quant_max=recipe.weight_quant_max,
        qscheme=torch.per_channel_symmetric if scheme.per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if scheme.per_channel else -1,
        source="present",
    )
    return QConfig(activation=activation, weight=weight)


@functools.cache
def _backend_config() -> BackendConfig:
    """Upstream's native config, with our folded layers in the place of its own and without the ops left float."""
    config = BackendConfig("qat-lightning")
    weighted = None
    for pattern in get_native_backend_config().configs:
        parts = pattern.pattern if isinstance(pattern.pattern, tuple) else (pattern.pattern,)
        if any(part in _LEFT_FLOAT for part in parts):
            continue
        if pattern.pattern in FOLDED_OF_FUSED:
            pattern.set_qat_module(FOLDED_OF_FUSED[pattern.pattern])
        if pattern.pattern is nn.Conv2d:
            weighted = pattern
        config.set_backend_pattern_config(pattern)
    assert weighted is not None
    for layer, folded in FOLDED_OF_FLOAT.items():
        config.set_backend_pattern_config(
            BackendPatternConfig(folded)
            .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
            .set_dtype_configs(weighted.dtype_configs)
            .set_root_module(layer)
            .set_reference_quantized_module(_REFERENCE[layer])
        )
    return config


def _qconfig_mapping(recipe: Recipe, selected: dict[str, bool]) -> QConfigMapping:
    qconfig = make_qconfig(recipe)
    mapping = QConfigMapping().set_global(None if recipe.include else qconfig)
    for name, chosen in selected.items():
        mapping.set_module_name(name, qconfig if chosen else None)
    return mapping


def _leaves(network: nn.Module, selected: dict[str, bool]) -> list[str]:
    """Submodules that stay float as a whole are called as they are: what is inside need not be traceable."""
    return [
        name
        for name, module in network.named_modules()
        if name
        and not any(selected[inner] for inner in selected if inner == name or inner.startswith(name + "."))
        and any(True for _ in module.children())
    ]


def _flat_example(graph_module: fx.GraphModule, example: Example) -> tuple[Any, ...]:
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = list(example.args)
    return tuple(values + [example.kwargs[name] for name in names[len(values) :] if name in example.kwargs])


def _hide_float_ops(graph_module: fx.GraphModule) -> Callable[[fx.GraphModule], None]:
    """Hide the ops that stay float from upstream's lowering, which has a list of its own and no way to change it.

    Returns:
        What shows them again in the converted graph.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    hidden: dict[str, tuple[str, Any]] = {}
    for node in graph_module.graph.nodes:
        kind = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        if kind in _LEFT_FLOAT:
            hidden[node.name] = (node.op, node.target)
            node.op, node.target = "call_function", _stays_float

    def show(converted: fx.GraphModule) -> None:
        for node in converted.graph.nodes:
            if node.name in hidden:
                node.op, node.target = hidden[node.name]
                if node.op == "call_module":
                    converted.add_submodule(node.target, modules[node.target])

    return show


def _reshape_views(graph: fx.Graph) -> None:
    """Int8 convolutions return channels-last tensors, which ``view`` may refuse where the float ones were contiguous."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"


def _stays_float(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("stands for an op while upstream lowers the graph, and is never run")


def _observe_only_after_relu6(prepared: fx.GraphModule) -> list[str]:
    """Take out the FakeQuantize between an op and its ReLU6: the one behind has a finer grid, from 0 to at most 6."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    folded = []
    for node in list(prepared.graph.nodes):
        if not _is_relu6(node, modules):
            continue
        before = node.args[0]
        after = next((user for user in node.users if _is_fake_quantize(user, modules)), None)
        if not (isinstance(before, fx.Node) and _is_fake_quantize(before, modules)) or after is None:
            continue
        if len(before.users) > 1 or len(node.users) > 1:
            continue
        node.replace_input_with(before, before.args[0])
        prepared.graph.erase_node(before)
        folded.append(node.name)
    prepared.recompile()
    return folded


def _observe_only_before_dropout(prepared: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Round before dropout, not behind it: what it scales up in training never reaches the int8 network.

    Returns:
        The names of the dropouts, which the int8 graph does without, and of the roundings behind them that training does
        without, because they share a range with the rounding before.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    dropped: list[str] = []
    silent: list[str] = []
    for node in list(prepared.graph.nodes):
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _DROPOUT_MODULES):
            continue
        (before,) = node.all_input_nodes
        behind = [user for user in node.users if _is_fake_quantize(user, modules)]
        if not _is_fake_quantize(before, modules):
            if len(behind) != 1 or len(node.users) != 1:
                continue
            with prepared.graph.inserting_before(node):
                moved = prepared.graph.node_copy(behind[0], lambda _, arg=before: arg)
            node.replace_input_with(before, moved)
            before = moved
        for fq in behind:
            replaced = modules[str(fq.target)]
            fq.replace_all_uses_with(node)
            prepared.graph.erase_node(fq)
            for other in prepared.graph.nodes:
                if other is not before and other.op == "call_module" and modules.get(str(other.target)) is replaced:
                    other.target = before.target
                    silent.append(other.name)
        dropped.append(node.name)
    prepared.recompile()
    return dropped, silent


def _without(graph: fx.Graph, names: list[str]) -> fx.Graph:
    """A copy of ``graph`` without some nodes, whose input stands for them."""
    graph = copy.deepcopy(graph)
    _drop_nodes(graph, names)
    return graph


def _observe_each_range_once(network: GraphNetwork) -> None:
    """Where several roundings share a range, let one of them observe it.

    That is the output of a concatenation, which has the range of all its inputs, or else the first of them.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    sharing: dict[nn.Module, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if _is_fake_quantize(node, modules):
            sharing.setdefault(modules[str(node.target)], []).append(node)
    for fq, nodes in sharing.items():
        assert isinstance(fq, FakeQuantize)
        joined = [node for node in nodes if node.all_input_nodes[0].target in _CONCATENATIONS]
        observing = joined[-1] if joined else nodes[0]
        for node in nodes:
            if node is observing:
                continue
            if node.target == observing.target:
                node.target = f"{node.target}_shared_{node.name}"
                network.add_module(str(node.target), SharedRange(fq))
            else:
                network._modules[str(node.target)] = SharedRange(fq)
    network.set_graph(network.graph)


def _observe_everywhere(network: nn.Module) -> None:
    """Undo `_observe_each_range_once`: upstream's converter looks for a FakeQuantize at every place."""
    for name, module in list(network._modules.items()):
        if isinstance(module, SharedRange):
            network._modules[name] = module.__dict__["fq"]


_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def _is_fake_quantize(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), FakeQuantize)


_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _is_relu6(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node clamps to [0, something]."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return isinstance(module, nn.Hardtanh) and module.min_val == 0  # ReLU6 is a Hardtanh
    if node.op == "call_function":
        if node.target is F.relu6:
            return True
        if node.target in (F.hardtanh, F.hardtanh_):
            low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
            return low == 0
    return False


def _drop_nodes(graph: fx.Graph, names: list[str]) -> None:
    for node in list(graph.nodes):
        if node.name in names:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _restore_children(
    result: GraphNetwork, originals: dict[str, nn.Module], parameters: dict[str, nn.Parameter], float_keys: set[str]
) -> None:
    """Put back what upstream's fusion took out of the tree, above all BatchNorm, so that every float key survives."""
    for name, module in originals.items():
        if not name or (not any(True for _ in module.named_parameters(recurse=False)) and not module._buffers):
            continue
        parent, _, leaf = name.rpartition(".")
        holder = _holder(result, parent)
        if leaf not in holder._modules or (not holder._modules[leaf]._parameters and module._parameters):
            holder._modules[leaf] = module
    for name, parameter in parameters.items():
        parent, _, leaf = name.rpartition(".")
        holder = _holder(result, parent)
        if leaf not in holder._parameters:
            holder.register_parameter(leaf, parameter)
    missing = float_keys - set(result.state_dict())
    if missing:
        raise NetworkError(
            f"mode='fx' would lose these entries of the float state_dict: {', '.join(sorted(missing))}. Use mode='pt2e' or "
            "mode='eager' for this network."
        )


def _holder(root: nn.Module, path: str) -> nn.Module:
    from qat_lightning.graph_network import GraphPart

    for name in filter(None, path.split(".")):
        if name not in root._modules:
            root._modules[name] = GraphPart()
        root = root._modules[name]  # type: ignore[assignment]
    return root


def _never_observed(prepared: GraphNetwork) -> list[str]:
    modules = dict(prepared.named_modules(remove_duplicate=False))
    names = []
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(fq := modules.get(str(node.target)), FakeQuantize):
            if fq.source == "moving_average" and not fq.seen:
                source = node.args[0]
                names.append(f"the output of {source.target if source.op == 'call_module' else source.name}")
    return names


def _coverage(state: PreparedState, int8: nn.Module) -> list[LayerCoverage]:
    converted = dict(int8.named_modules())
    rows = []
    for name, module in state.float_network.named_modules():
        if not isinstance(module, _WEIGHTED):
            continue
        now = converted.get(name)
        quantized = (
            now is not None and type(now).__module__.startswith("torch.ao.nn") and "reference" not in str(type(now))
        )
        rows.append(
            LayerCoverage(name, type(module).__name__, quantized, "" if quantized else _why_float(state, name, module))
        )
    return rows


def _why_float(state: PreparedState, name: str, module: nn.Module) -> str:
    if not state.recipe.selects(_join(state.prefix, name)):
        return "excluded"
    if isinstance(module, (*(t for t in _LEFT_FLOAT if isinstance(t, type)), nn.MultiheadAttention)):
        return f"{type(module).__name__} is not quantized in mode='fx'"
    return "not used by forward, or inside a module that is called as a whole"
