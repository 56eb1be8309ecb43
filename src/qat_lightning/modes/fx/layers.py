"""Coverage of the layers in an FX network: which are int8, and why others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from qat_lightning.graph.scopes import join
from qat_lightning.layers.integer import IntegerLayer
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.modes.fx.config import LEFT_FLOAT
from qat_lightning.modes.left_float import layer_of
from qat_lightning.modes.own_weights import float_rows
from qat_lightning.modes.prepared import PreparedState
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage
from qat_lightning.settings.engines import engine_here
from qat_lightning.settings.recipe import Recipe

UNSEEN = "no finite range was observed for its input or its output"

_UNREAD = "its output is not used"


def no_kernel(module: nn.Module, recipe: Recipe) -> str:
    """Why a layer of a supported type cannot be quantized; empty if it can. Padding given by name becomes numbers."""
    if is_parametrized(module):
        return (
            "its weight is computed (parametrized) and is not a parameter; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it one"
        )
    if isinstance(module, nn.Conv3d) and engine_here(recipe.target.engine) == "qnnpack":
        return "QNNPACK cannot save the weight of a Conv3d"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} has no int8 kernel"
        if isinstance(module.padding, str) and not _pad_with_numbers(module):
            return f"padding={module.padding!r} of an even kernel has no int8 kernel"
    return ""


def _pad_with_numbers(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Replace ``padding="same"`` or ``"valid"`` by numbers, if the padding is symmetric."""
    totals = [
        0 if conv.padding == "valid" else d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ]
    if any(total % 2 for total in totals):
        return False
    conv.padding = tuple(total // 2 for total in totals)
    return True


def layer_rows(state: PreparedState, network: nn.Module, used: set[str], unseen: set[str]) -> list[LayerCoverage]:
    """The rows of layers of a prepared or an int8 network.

    Args:
        state: State of the prepared network.
        network: The prepared network, or the converted one.
        used: Names of the modules that a call of the float network uses.
        unseen: Names of layers without an observed finite range.
    """
    modules = dict(network.named_modules())
    calls = state.plan.graph.find_nodes(op="call_module")
    called = [str(node.target) for node in calls]
    unread = _layers_of(calls) - _layers_of(read_nodes(state.plan.graph).intersection(calls))
    rows = []
    for name, module in state.float_network.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        layer = modules.get(name)
        module_name = type(layer).__module__
        is_int8 = (".quantized." in module_name and ".reference." not in module_name) or isinstance(layer, IntegerLayer)
        is_trained = layer is not None and "weight_fake_quant" in layer._modules
        quantized = is_int8 or (is_trained and name not in unread)
        if quantized:
            why = ""
        elif any(f"{left}.".startswith(f"{name}.") for left in unseen):
            why = UNSEEN
        elif name in unread and state.recipe.selects(join(state.prefix, name)):
            why = _UNREAD
        else:
            why = _why_float(state, name, module, used, called)
        rows.append(LayerCoverage(name, type(module).__name__, quantized, why))
    return rows


def _why_float(state: PreparedState, name: str, module: nn.Module, used: set[str], called: Sequence[str]) -> str:
    if not state.recipe.selects(join(state.prefix, name)):
        return EXCLUDED
    if name not in used:
        return "not used by forward"
    if why := no_kernel(module, state.recipe) or state.plan.tables.get(name, ""):
        return why
    if name in called and isinstance(module, module_types("transposed")) and _is_given_a_size(state.plan.graph, name):
        return "it is called with output_size=, which int8 kernels do not support: use output_padding= instead"
    whole = next((outer for outer in called if name.startswith(f"{outer}.")), None)
    if whole is not None:
        return f"inside {whole!r}, which is called as a whole: mode='eager' and mode='pt2e' may reach it"
    if isinstance(module, (*(t for t in LEFT_FLOAT if isinstance(t, type)), nn.MultiheadAttention)):
        return f"{type(module).__name__} is not quantized in mode='fx'"
    if name not in called and type(module).__module__.startswith("torch."):
        return _UNREAD
    return f"mode='fx' has no int8 kernel for {type(module).__name__}"


def _layers_of(calls: Iterable[fx.Node]) -> set[str]:
    return {layer_of(str(node.target)) for node in calls}


def read_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output depends on, and those with an effect: upstream's conversion drops all others."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        has_effect = node.op != "call_module" and node.is_impure()
        if has_effect or not found.isdisjoint(node.users):
            found.add(node)
    return found


def _is_given_a_size(graph: fx.Graph, name: str) -> bool:
    """Whether a transposed convolution is called with the size of its output."""
    calls = [node for node in graph.find_nodes(op="call_module") if layer_of(str(node.target)) == name]
    return any(len(node.args) > 1 or node.kwargs.get("output_size") is not None for node in calls)


def read_by_ops(layers: Sequence[LayerCoverage], graph: fx.Graph, weights: Mapping[str, str]) -> list[LayerCoverage]:
    """Rows in which layers that are not called, but whose weights ops read, are int8 if these ops are.

    Args:
        layers: The rows of the layers.
        graph: The graph of the prepared network.
        weights: See `Operations.weights`.
    """
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    reasons: dict[str, list[str]] = {}
    for name, reason in weights.items():
        reasons.setdefault(name.rpartition(".")[0], []).append(reason)
    rows = []
    for row in layers:
        if row.name in reasons and row.name not in called and not row.quantized and not row.excluded:
            reason = next(filter(None, reasons[row.name]), "")
            row = replace(row, quantized=not reason, reason=reason)
        rows.append(row)
    return rows


def custom_rows(
    state: PreparedState, custom: Mapping[str, Sequence[str]], weights: Mapping[str, str]
) -> list[LayerCoverage]:
    """Rows of custom modules with weights of their own that stay float.

    Args:
        state: State of the prepared network.
        custom: See `FloatRun.custom`.
        weights: See `Operations.weights`.
    """
    called = [str(node.target) for node in state.plan.graph.find_nodes(op="call_module")]

    def why(parameter: str) -> str | None:
        if parameter in weights:
            return weights[parameter]
        whole = next((outer for outer in called if parameter.startswith(f"{outer}.")), None)
        if whole is None:
            return None
        return (
            f"its weight is used in {whole!r}, which is called as a whole: as a layer, such as nn.Linear, it would be "
            "quantized in mode='eager'"
        )

    return float_rows(state.float_network, custom, lambda name: state.recipe.selects(join(state.prefix, name)), why)


def each_once(
    layers: Sequence[LayerCoverage], operations: Sequence[LayerCoverage]
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """Rows without duplicates.

    A layer of a subclass is traced through: the ops in it, which have its name, show whether it is int8. Products of a
    module that is called as a whole are mostly those of layers in it.

    Args:
        layers: The rows of the layers, with their multiply-accumulates.
        operations: The rows of the ops.
    """
    inside: dict[str, list[LayerCoverage]] = {row.name: [] for row in layers}
    others = []
    for row in operations:
        if row.name in inside:
            inside[row.name].append(row)
            continue
        counted = sum(layer.macs or 0 for layer in layers if layer.name.startswith(f"{row.name}."))
        others.append(replace(row, macs=max(0, (row.macs or 0) - counted) or None))
    return [_of_ops(row, inside[row.name]) for row in layers], others


def _of_ops(layer: LayerCoverage, ops: Sequence[LayerCoverage]) -> LayerCoverage:
    if layer.quantized or not ops or layer.excluded:
        return layer
    deciding = [row for row in ops if row.macs] or list(ops)
    reason = next((row.reason for row in deciding if not row.quantized), "")
    return replace(layer, quantized=not reason, reason=reason)
