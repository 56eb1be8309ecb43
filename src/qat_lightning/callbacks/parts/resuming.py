"""Reading a checkpoint before Lightning restores it: decisions about its networks, and their weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from qat_lightning.callbacks.parts.checkpoint_io import read_checkpoint, read_sharded
from qat_lightning.callbacks.parts.checkpoints import STATE_KEY, prepared_entry
from qat_lightning.graph.scopes import dotted
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import Place, is_file, is_folder, place


def checkpoint_to_restore(trainer: Trainer) -> Place | None:
    """Return the checkpoint that a Trainer is about to restore, during setup; None if there is none.

    Networks have to be prepared before Lightning restores the checkpoint, and at that time ``trainer.ckpt_path`` is
    still that of the previous run. The path is therefore read from the arguments of the Trainer method on the stack.
    """
    path = _under_way(trainer).get("ckpt_path")
    found = place(path) if path else None
    return found if found is not None and (is_file(found) or is_folder(found)) else None


def _under_way(trainer: Trainer) -> dict[str, Any]:
    """Return the arguments of the Trainer method that is running; empty outside of one."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def trusts_checkpoint(trainer: Trainer) -> bool:
    """Whether Lightning will unpickle classes in the checkpoint: with ``weights_only=False``, or before 2.6."""
    return _under_way(trainer).get("weights_only", False) is False


def peek(path: Place | None, *, trusted: bool = False) -> dict[str, Any]:
    """Return a checkpoint's ``state_dict``, memory-mapped if it is local; empty if it cannot be read.

    For a sharded checkpoint, which is a folder, only the entries that describe prepared networks are read. Errors in
    the file are reported when Lightning restores it.

    Args:
        path: The checkpoint; None for none.
        trusted: Whether to unpickle classes in it.
    """
    if path is None:
        return {}
    try:
        if is_folder(path):
            return read_sharded(path, (STATE_KEY,))
        checkpoint = read_checkpoint(path, mmap=True, trusted=trusted)
    except Exception:  # noqa: BLE001 - a file that is not a pickle may raise anything; restoring it reports the error
        return {}
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    return dict(state) if isinstance(state, Mapping) else {}


def decision_in(state: Mapping[str, Any], prefix: str) -> Decision | None:
    """Return the decision about a network in the run that wrote a ``state_dict``; None if the network was float.

    Args:
        state: ``state_dict`` of the checkpoint.
        prefix: The network's dotted name in it.
    """
    entry = prepared_entry(state, prefix)
    if entry is None:
        return None
    recipe = Recipe.from_dict(entry)
    return Decision(recipe.mode, left_float=dict(entry.get("left_float", ())), families=recipe.families)


def with_weights(network: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Load the weights of a ``state_dict`` into a copy of a network, if all are present with the same shapes."""
    start = dotted(prefix)
    own = network.state_dict()
    found = {key: state.get(start + key) for key in own}
    if all(_fits(found[key], value) for key, value in own.items()):
        network.load_state_dict(found)


def _fits(value: Any, own: Any) -> bool:
    if not isinstance(own, torch.Tensor):
        return value is not None
    return isinstance(value, torch.Tensor) and value.shape == own.shape
