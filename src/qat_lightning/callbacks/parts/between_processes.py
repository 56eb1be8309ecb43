"""Communication between processes: ranges, statistics, and int8 networks that the first process converts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qat_lightning.artifact import artifact_bytes, quantized_from_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.example import Example
from qat_lightning.layers.qat_modules import FreezableBatchNorm
from qat_lightning.modes.prepared import merge_ranges, prepared_state, reduce_ranges
from qat_lightning.modes.sharded import is_sharded
from qat_lightning.processes import any_process, in_first
from qat_lightning.settings.modes import traits_of


def copy_from_first_process(prepared: Mapping[str, nn.Module]) -> None:
    """Broadcast ranges and weights from the first process, since each process observed only its share of the data."""
    for network in prepared.values():
        for tensor in (*network.buffers(), *(parameter.data for parameter in network.parameters())):
            dist.broadcast(tensor, src=0)


def copy_buffers_from_first_process(prepared: Mapping[str, nn.Module]) -> None:
    """Broadcast from the first process the ranges and statistics that checkpoints store."""
    for network in prepared.values():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def reduce_ranges_while_observed(prepared: Mapping[str, nn.Module], processes: int) -> None:
    """Make observers reduce their ranges over all processes in each call; eager mode has `synchronize_processes`."""
    for network in prepared.values():
        reduce_ranges(network, processes > 1 and not _may_branch(network))


def synchronize_processes(prepared: Mapping[str, nn.Module], *, ranges: bool) -> None:
    """After a step, synchronize ranges where observers do not reduce them in each call.

    Also broadcasts the first process's BatchNorm statistics where no DistributedDataParallel does.

    Args:
        prepared: The prepared networks by name.
        ranges: Whether ranges are being updated.
    """
    for network in prepared.values():
        if ranges and _may_branch(network):
            merge_ranges(network)
        if is_sharded(network):
            take_over_statistics(network)


@torch.no_grad()
def take_over_statistics(network: nn.Module) -> None:
    """Broadcast BatchNorm statistics from the first process while they are updated; one collective per dtype."""
    moving = [module for module in network.modules() if isinstance(module, FreezableBatchNorm) and not module.frozen]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in (buffer for module in moving for buffer in module.buffers(recurse=False)):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(together, src=0)
        for buffer, first in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(first.view_as(buffer))


def _may_branch(network: nn.Module) -> bool:
    """Whether processes may take different branches, which is possible in eager mode only."""
    return not traits_of(prepared_state(network).recipe.mode).captures


def pack(quantized: QuantizedNetwork) -> bytes:
    """Serialize an int8 network for the other processes, in its file format; empty if the format cannot hold it."""
    try:
        with warnings.catch_warnings():
            # This network's own code is trusted; the restrictions are for files from elsewhere.
            warnings.simplefilter("ignore")
            return artifact_bytes(quantized)
    except ArtifactError as error:
        rank_zero_info(f"{error} It cannot be sent to the other processes, so each of them converts its own network.")
        return b""


def unpack(packed: bytes, float_network: nn.Module, example: Example) -> QuantizedNetwork:
    """Restore the int8 network from the bytes of `pack`.

    Args:
        packed: The bytes; not empty.
        float_network: The float network, whose code runs mode eager; every process has it.
        example: A real call, which the file does not contain.
    """
    quantized = quantized_from_bytes(packed, float_network, trusted=True)
    quantized.example = example
    return quantized


def compile_once(trainer: Trainer, networks: Mapping[str, QuantizedNetwork]) -> None:
    """Compile in the first process; the others on the same machine load the result. A collective operation.

    Processes on other machines compile at their first call, because compiled code is specific to a processor.
    """
    waiting = [name for name, quantized in networks.items() if _is_to_be_compiled(quantized)]
    if not any_process(bool(waiting)):
        return
    packages = in_first(lambda: {name: _package(quantized) for name, quantized in networks.items()})
    if trainer.node_rank > 0:
        return
    for name in waiting:
        quantized = networks[name]
        if packages[name] and _is_to_be_compiled(quantized):
            _compiling(quantized).use_package(packages[name], *quantized.example.args, **quantized.example.kwargs)


def _compiling(quantized: QuantizedNetwork) -> Any:
    """Return the inner network if it compiles at its first call, else None."""
    return quantized.network if hasattr(quantized.network, "compiled_package") else None


def _is_to_be_compiled(quantized: QuantizedNetwork) -> bool:
    return getattr(_compiling(quantized), "runs", "") == "not compiled yet"


def _package(quantized: QuantizedNetwork) -> bytes:
    network = _compiling(quantized)
    example = quantized.example
    return b"" if network is None else bytes(network.compiled_package(*example.args, **example.kwargs))
