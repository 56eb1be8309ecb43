"""A network as one graph of plain ops with a dynamic batch size, from which all formats are made."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, QuantizationError, TraceError
from qat_lightning.export.conversion import int8_of
from qat_lightning.export.plain_ops import in_plain_ops, of_two
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example, apart
from qat_lightning.graph.signature import CallSpec, batch_size, dynamic_shapes, has_batch
from qat_lightning.graph.training_flags import flags_kept
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.prepared import cpu_copy, is_prepared
from qat_lightning.modes.source_lines import reason_of

_GRAPH_MODES = "mode='fx' or mode='pt2e', which capture one path through the network"


def int8_program(network: nn.Module, example: Example | None = None, spell: Spelling | None = None) -> ExportedProgram:
    """Convert the int8 network to a graph of aten ops between pairs of quantize and dequantize ops.

    Inputs and outputs are those of the float network. Weights are int8 constants, each followed by a dequantize op,
    BatchNorm is folded, and the batch size is dynamic. The graph computes what the int8 kernels compute, except for
    rounding differences of single steps; each op is compared with its kernel.

    Args:
        network: A `QuantizedNetwork`, possibly from `qat_lightning.load_quantized`, or a prepared network, which is
            converted first.
        example: A real call; by default the one that the int8 network was verified with.
        spell: How to write integer layers of the kinds without calibration; by default in ops that every runtime of
            such graphs supports.

    Raises:
        ConfigurationError: The network is not quantized, or no real call is available.
        ExportError: A kernel has no equivalent in such a graph; the message names it.
        TraceError: The network cannot be captured as a graph, for example with ``mode="eager"``.

    Example:
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> mode, call = get_mode("fx"), Example((torch.randn(4, 8),))
        >>> prepared = mode.prepare(
        ...     nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), call, Recipe("fx", "x86")
        ... )
        >>> _ = prepared.train()(*call.args)
        >>> program = int8_program(prepared, call)
        >>> [str(node.target).partition(".")[2] for node in program.graph.nodes if "quantized" in str(node.target)][:3]
        ['quantize_per_tensor.default', 'dequantize_per_tensor.default', 'dequantize_per_channel.default']
    """
    quantized = int8_network(network, example)
    call = quantized.example if example is None else example
    call = Example(*tree_map(_to_float32, (call.args, call.kwargs)))
    inner: Any = quantized.network
    if hasattr(inner, "decomposed"):
        return _export(_Called(inner.decomposed, inner.spec), call, inner.spec.name)
    name = "the int8 network" if isinstance(inner, GraphNetwork) else type(inner).__name__
    return _export(in_plain_ops(quantized, call, spell), call, name)


def float_program(network: nn.Module, example: Example) -> ExportedProgram:
    """Convert a float network in evaluation mode to a graph of aten ops with a dynamic batch size.

    Args:
        network: The float network; not changed.
        example: A real call.

    Raises:
        TraceError: The network cannot be exported, or only for a fixed batch size.

    Example:
        >>> program = float_program(nn.Linear(8, 2), Example((torch.randn(4, 8),)))
        >>> program.module()(torch.randn(3, 8)).shape
        torch.Size([3, 2])
    """
    with flags_kept(network):
        network.eval()
        return _export(network, example, type(network).__name__)


def int8_network(network: nn.Module, example: Example | None) -> QuantizedNetwork:
    """Return an int8 network as it is; convert a prepared one.

    Args:
        network: A `QuantizedNetwork`, or the result of a mode's ``prepare``; not changed.
        example: A real call, with which a prepared network is verified.

    Raises:
        ConfigurationError: The network is not quantized, or no real call is available.
        ConversionError: The prepared network cannot be converted.
    """
    if isinstance(network, QuantizedNetwork):
        return network
    if not is_prepared(network):
        what = repr(str(network)) if isinstance(network, str | os.PathLike) else type(network).__name__
        raise ConfigurationError(
            f"{what} is neither an int8 network (a callback's `quantized`, or what "
            "qat_lightning.load_quantized(path) returns) nor one that was prepared for quantization."
        )
    if example is None:
        raise ConfigurationError("A prepared network is converted first, which needs an example call: give example=.")
    return int8_of(cpu_copy(network), example, "a prepared network")


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Called(nn.Module):
    """Calls a graph of flat tensors with the signature of the network that it was captured from."""

    def __init__(self, graph_module: fx.GraphModule, spec: CallSpec) -> None:
        super().__init__()
        self.graph_module = graph_module

        def forward(*args: Any, **kwargs: Any) -> Any:
            return spec.unflatten(self.graph_module(*spec.flatten(args, kwargs)))

        forward.__signature__ = spec.signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward


@torch.no_grad()
def _export(network: nn.Module, example: Example, name: str) -> ExportedProgram:
    args, kwargs = of_two(apart(example))
    size = batch_size(Example(args, kwargs))
    signature = inspect.signature(network.forward)
    shapes = dynamic_shapes(signature, args, kwargs, size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        try:
            program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
        except QuantizationError:
            raise
        except Exception as error:
            raise TraceError(
                f"{name} cannot be exported as one graph {reason_of(error)}. What to do: {_GRAPH_MODES}, or save the "
                "network with save(path)."
            ) from error
    _refuse_fixed_batch(program, (args, kwargs), size, name)
    return program


def _refuse_fixed_batch(program: ExportedProgram, arguments: Any, size: int | None, name: str) -> None:
    leaves = tree_leaves(arguments)
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    for leaf, given in zip(leaves, program.graph_signature.user_inputs, strict=False):
        if not has_batch(leaf, size) or not isinstance(given, str):
            continue
        found = values[given].shape[0]
        if not isinstance(found, torch.SymInt) or found.node.maybe_as_int() is not None:
            raise TraceError(
                f"{name} can be exported only for the batch size {size} of the example, because its forward uses the "
                f"size of {given} as a constant (such as int(x.shape[0]), or a reshape to a fixed first dimension)."
            )
