"""Upstream's prepare and convert of FX graphs, with workarounds for what they do not support.

https://docs.pytorch.org/docs/stable/quantization.html
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.fx.fuse import fuse
from torch.ao.quantization.fx.prepare import prepare
from torch.ao.quantization.quantize_fx import convert_fx

from qat_lightning.errors import ConversionError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.layers.qat_modules import make_batchnorm_freezable
from qat_lightning.layers.quantized_tensors import without_deprecation
from qat_lightning.modes.fx.batchnorm import as_upstream_wants
from qat_lightning.modes.fx.calls import unfoldable_batchnorms
from qat_lightning.modes.fx.config import backend_config, qconfig_mapping
from qat_lightning.modes.fx.created import hide_created
from qat_lightning.modes.fx.draws import hide_lasting_dropouts
from qat_lightning.modes.fx.tree import with_batchnorms
from qat_lightning.modes.fx.weights import hide_parametrized, set_aside
from qat_lightning.modes.source_lines import line_at_fault
from qat_lightning.modes.tracing import outer_parts, take_out_constants
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import packing_engine
from qat_lightning.settings.recipe import Recipe


class Hidden:
    """Nodes and modules that upstream's prepare would refuse, fuse or misinterpret, hidden from it.

    While they are hidden, every module is in training mode, as upstream's fusion for training requires.

    Args:
        network: The float network.
        graph_module: Its trace, about to be prepared; changed in place.
        example: One call of it.

    Attributes:
        read: Tensors of called modules that the graph reads directly, by their temporary names; see `set_aside`.
        originals: The modules by name before fusion.
        unfoldable: BatchNorms that cannot be folded.
    """

    def __init__(self, network: nn.Module, graph_module: fx.GraphModule, example: Example) -> None:
        self.unfoldable = unfoldable_batchnorms(graph_module, example)
        self._show_dropouts = hide_lasting_dropouts(graph_module.graph)
        self._show_created = hide_created(graph_module, example)
        self.read = set_aside(graph_module, graph_module.graph)
        self._put_constants_back = take_out_constants(graph_module.graph)
        self._show_parametrized = hide_parametrized(graph_module)
        self.originals = with_batchnorms(graph_module, dict(network.named_modules()))
        self._flags = {module: module.training for root in (network, graph_module) for module in root.modules()}
        for module in self._flags:
            module.training = True
        # A class that upstream's fusion does not match, with the flag.
        for batchnorm in self.unfoldable:
            make_batchnorm_freezable(batchnorm)

    def show(self, prepared: fx.GraphModule) -> list[str]:
        """Restore what was hidden.

        Args:
            prepared: The result of upstream's prepare; changed in place.

        Returns:
            The names of dropouts that are active in evaluation too.
        """
        self._show_parametrized(prepared)
        lasting = self._show_dropouts(prepared.graph)
        self._show_created(prepared.graph)
        self._put_constants_back(prepared.graph)
        for module, flag in self._flags.items():
            module.training = flag
        return lasting


def prepare_upstream(
    graph_module: fx.GraphModule,
    network: nn.Module,
    example: Example,
    recipe: Recipe,
    selected: dict[str, bool],
    scopes: dict[str, Any],
) -> fx.GraphModule:
    """Fuse modules, and insert a FakeQuantize wherever the kernels of the backend use integers.

    Args:
        graph_module: The trace, after `Hidden` was applied.
        network: The traced network.
        example: One call of it.
        recipe: Recipe with the selection and the backend.
        selected: Whether each module is to be quantized, by its name.
        scopes: The module whose ``forward`` created each node.

    Raises:
        NetworkError: Upstream fails; the message has the line of the network.
    """
    config = backend_config()
    custom = PrepareCustomConfig().set_non_traceable_module_names(outer_parts(network, selected))
    with warnings.catch_warnings():
        # Upstream warns on every call that this API is deprecated in favour of PT2 export.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Hardsigmoid: its kernel always uses its own grid.
        warnings.filterwarnings("ignore", message="QConfig must specify a FixedQParams")
        try:
            with as_upstream_wants(graph_module):
                fused = fuse(graph_module, True, None, config)
            return prepare(
                fused,
                qconfig_mapping(recipe, selected),
                True,
                scopes,
                example_inputs=_flat_example(graph_module, example),
                prepare_custom_config=custom,
                backend_config=config,
            )
        except Exception as error:
            where = line_at_fault(error)
            raise NetworkError(
                f"mode='fx' cannot prepare {type(network).__name__}{f' at {where}' if where else ''}: "
                f"{type(error).__name__}: {error}. Try mode='pt2e' or mode='eager', or use exclude= for the part that "
                "fails."
            ) from error


def convert_upstream(graph_module: fx.GraphModule, target: Backend, name: str) -> fx.GraphModule:
    """Lower a prepared graph to the kernels of a backend.

    Args:
        graph_module: Its weights have been rounded for conversion.
        target: The backend.
        name: Name of the network, for the message.

    Raises:
        ConversionError: Upstream fails.
    """
    with warnings.catch_warnings(), without_deprecation(), packing_engine(target.engine):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            return convert_fx(graph_module, backend_config=backend_config())
        except Exception as error:
            raise ConversionError(
                f"PyTorch's converter failed on {name} for backend {target.name!r}: {type(error).__name__}: {error}"
            ) from error


def _flat_example(graph_module: fx.GraphModule, example: Example) -> tuple[Any, ...]:
    names = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = list(example.args)
    return tuple(values + [example.kwargs[name] for name in names[len(values) :] if name in example.kwargs])
