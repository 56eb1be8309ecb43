"""What several processes send each other: ranges, and what only the first has to convert and to compile."""

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


def take_over_from_first(prepared: Mapping[str, nn.Module]) -> None:
    """Each process looked at its share of the data; all go on with the ranges and weights of the first."""
    for network in prepared.values():
        for tensor in (*network.buffers(), *(parameter.data for parameter in network.parameters())):
            dist.broadcast(tensor, src=0)


def take_over_buffers_from_first(prepared: Mapping[str, nn.Module]) -> None:
    """All hold the ranges and statistics that checkpoints have: those of the first."""
    for network in prepared.values():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def reduce_ranges_while_observed(prepared: Mapping[str, nn.Module], processes: int) -> None:
    """Let observers of several processes agree at every call; not in eager mode, see `go_on_alike`."""
    for network in prepared.values():
        reduce_ranges(network, processes > 1 and not _takes_ways(network))


def go_on_alike(prepared: Mapping[str, nn.Module], *, ranges: bool) -> None:
    """After a step let all go on with the same ranges, where they are not reduced as they are observed.

    Likewise with BatchNorm's statistics, those of the first process, where no DistributedDataParallel hands them on.

    Args:
        prepared: The networks.
        ranges: Whether they move.
    """
    for network in prepared.values():
        if ranges and _takes_ways(network):
            merge_ranges(network)
        if is_sharded(network):
            take_over_statistics(network)


@torch.no_grad()
def take_over_statistics(network: nn.Module) -> None:
    """Let all processes have the BatchNorm statistics of the first, as long as these move; one collective a dtype."""
    moving = [module for module in network.modules() if isinstance(module, FreezableBatchNorm) and not module.frozen]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in (buffer for module in moving for buffer in module.buffers(recurse=False)):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(together, src=0)
        for buffer, first in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(first.view_as(buffer))


def _takes_ways(network: nn.Module) -> bool:
    """In eager mode processes may take different ways through a network."""
    return not traits_of(prepared_state(network).recipe.mode).captures


def pack(quantized: QuantizedNetwork) -> bytes:
    """An int8 network for the other processes, as its file holds it; empty if no file can hold it."""
    try:
        with warnings.catch_warnings():
            # What a file from elsewhere may not call, the code of this very training may.
            warnings.simplefilter("ignore")
            return artifact_bytes(quantized)
    except ArtifactError as error:
        rank_zero_info(f"{error} It cannot be sent to the other processes, so each of them converts its own network.")
        return b""


def unpack(packed: bytes, float_network: nn.Module, example: Example) -> QuantizedNetwork:
    """Undo `pack`.

    Args:
        packed: Not empty.
        float_network: The code that runs the layers of mode eager, which every process has.
        example: A real call, which the file does not hold.
    """
    quantized = quantized_from_bytes(packed, float_network, trusted=True)
    quantized.example = example
    return quantized


def compile_once(trainer: Trainer, networks: Mapping[str, QuantizedNetwork]) -> None:
    """Let the first process compile what is to be compiled, and the others on its machine load it; a collective.

    Processes on other machines compile at their first call: what was compiled is for the first one's processor.
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
    """The network inside, if it is of a kind that is compiled when it is first called."""
    return quantized.network if hasattr(quantized.network, "compiled_package") else None


def _is_to_be_compiled(quantized: QuantizedNetwork) -> bool:
    return getattr(_compiling(quantized), "runs", "") == "not compiled yet"


def _package(quantized: QuantizedNetwork) -> bytes:
    network = _compiling(quantized)
    example = quantized.example
    return b"" if network is None else bytes(network.compiled_package(*example.args, **example.kwargs))
