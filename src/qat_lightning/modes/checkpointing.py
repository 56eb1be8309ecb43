"""Refusing activation checkpointing in modes whose graph would not preserve it."""

from __future__ import annotations

import contextlib
import copy
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from qat_lightning.errors import TraceError
from qat_lightning.graph.example import Example
from qat_lightning.modes.source_lines import line_at_fault
from qat_lightning.numerics.recomputation import Checkpointed, no_checkpoints

_Error = TypeVar("_Error", bound=Exception)


def loses_checkpoints(network: nn.Module, mode: str, where: str) -> TraceError:
    """The error for a network that recomputes activations in the backward pass.

    Args:
        network: The float network.
        mode: The mode that captures it as one graph.
        where: The line that begins a checkpointed part, if known.
    """
    return TraceError(
        f"{type(network).__name__} recomputes activations in the backward pass "
        f"(torch.utils.checkpoint{f' at {where}' if where else ''}), which the graph of mode={mode!r} would not do, "
        "so that the memory would not be saved. What to do: use mode='eager', which keeps it, or turn it off if there "
        "is enough memory (gradient_checkpointing_disable() in transformers, set_grad_checkpointing(False) in timm)."
    )


def refuse_checkpoints(network: nn.Module, example: Example, mode: str) -> None:
    """Run a copy of a network in training mode until it begins a checkpointed part.

    Args:
        network: The float network.
        example: One call.
        mode: Mode for the message.

    Raises:
        TraceError: There is a checkpointed part.
    """
    error = raised_in_training(network, example, no_checkpoints(), Checkpointed)
    if error is not None:
        raise loses_checkpoints(network, mode, line_at_fault(error))


def raised_in_training(
    network: nn.Module, example: Example, watching: AbstractContextManager[None], kind: type[_Error]
) -> _Error | None:
    """Run a copy of a network in training mode, and return the error of one kind that this raises.

    Args:
        network: The float network.
        example: One call.
        watching: Raises the error.
        kind: Its class.
    """
    cuda = [parameter.device for parameter in network.parameters() if parameter.is_cuda][:1]
    args, kwargs = copy.deepcopy((example.args, example.kwargs))
    # Any other error here also occurs in the export, which reports the line.
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=cuda), torch.enable_grad(), watching:
        try:
            copy.deepcopy(network).train()(*args, **kwargs)
        except kind as error:
            return error
    return None
