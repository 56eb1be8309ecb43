"""Weights that functions multiply by: those of custom modules, which are no layers, have no other row in reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.eager.observation import function_name
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage

PRODUCTS = {
    *("linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "bilinear"),
    *("__matmul__", "__rmatmul__", "_grouped_mm", "multi_head_attention_forward", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
"""Names of functions whose weight could be stored as integers."""

CUSTOM = (
    "is a custom class, and multiplies by its own weight in a function: a layer, such as nn.Linear, can be quantized"
)
"""Why such a weight stays float, after the name of the class."""


class ParameterUses(TorchFunctionMode):
    """Records which parameters functions read, and which they multiply by, directly or after computing with them.

    Args:
        network: The network that runs.

    Attributes:
        used: Names of the modules whose parameters are read.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.used = set[str]()
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._network = network
        self._factors = set[str]()
        self._computed: dict[int, set[str]] = {}
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if name is not None:
            read = [self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names]
            self.used |= {parameter.rpartition(".")[0] for parameter in read}
        sources = [self._sources(tensor) for tensor in tensors]
        if name in PRODUCTS:
            self._factors |= set().union(*sources)
        result = func(*args, **(kwargs or {}))
        if sources and all(sources):
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in self._names]
            self._computed |= dict.fromkeys(map(id, made), set().union(*sources))
            self._alive += made  # so that no other tensor gets the same id
        return result

    def _sources(self, tensor: Tensor) -> set[str]:
        """The names of the parameters that a tensor is, or was computed from without anything else."""
        own = self._names.get(id(tensor))
        return self._computed.get(id(tensor), set()) if own is None else {own}

    def of_custom_modules(self) -> dict[str, list[str]]:
        """The parameters of two or more dimensions that functions multiplied by, by the module that holds them.

        Layers with a row of their own are omitted, and modules in them.
        """
        layers = [name for name, module in self._network.named_modules() if isinstance(module, WEIGHTED)]
        found: dict[str, list[str]] = {}
        for name, parameter in self._network.named_parameters():
            holder = name.rpartition(".")[0]
            inside = any(f"{holder}.".startswith(f"{layer}.") or not layer for layer in layers)
            if name in self._factors and parameter.dim() > 1 and not inside:
                found.setdefault(holder, []).append(name)
        return found


def float_rows(
    network: nn.Module,
    custom: Mapping[str, Sequence[str]],
    selects: Callable[[str], bool],
    why: Callable[[str], str | None] = lambda parameter: None,
) -> list[LayerCoverage]:
    """A row for each custom module that multiplies by a weight of its own which stays float.

    The rows have no multiply-accumulates: those are in the rows of the ops.

    Args:
        network: The float network.
        custom: The result of `ParameterUses.of_custom_modules`.
        selects: Whether a module is to be quantized, by its name.
        why: Why a parameter stays float; empty if it is int8, None for the general reason.
    """
    rows = []
    for name, parameters in custom.items():
        kind = type(network.get_submodule(name)).__name__
        reasons = [f"{kind} {CUSTOM}" if reason is None else reason for reason in map(why, parameters)]
        left = next(filter(None, reasons), "")
        if left:
            rows.append(LayerCoverage(name, kind, False, left if selects(name) else EXCLUDED))
    return rows


def parameters_behind(graph: fx.Graph) -> dict[fx.Node, set[str]]:
    """The names of the parameters and buffers that values of a graph were computed from without any input."""
    found: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = {str(node.target)}
        elif node.all_input_nodes and all(source in found for source in node.all_input_nodes):
            found[node] = set().union(*(found[source] for source in node.all_input_nodes))
    return found
