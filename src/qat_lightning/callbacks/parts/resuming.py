"""What a checkpoint says before Lightning restores it: what was decided of its networks, and their weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from qat_lightning.callbacks.parts.checkpoint_io import read_checkpoint, read_sharded
from qat_lightning.callbacks.parts.checkpoints import STATE_KEY, prepared_entry
from qat_lightning.rehearsal.auto import Decision
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import Place, is_file, is_folder, place


def checkpoint_to_restore(trainer: Trainer) -> Place | None:
    """The checkpoint that a Trainer is going to restore, while it sets up; None if there is none.

    Lightning tells nobody before it restores it, when networks have to be prepared already: ``trainer.ckpt_path`` is
    that of the run before. So it is looked up in the call of the Trainer that is under way.
    """
    path = _under_way(trainer).get("ckpt_path")
    found = place(path) if path else None
    return found if found is not None and (is_file(found) or is_folder(found)) else None


def _under_way(trainer: Trainer) -> dict[str, Any]:
    """What the call of a Trainer that is under way was given; empty outside of one."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def trusts_checkpoint(trainer: Trainer) -> bool:
    """Whether Lightning is going to unpickle classes in that checkpoint: with ``weights_only=False``, or before 2.6."""
    return _under_way(trainer).get("weights_only", False) is False


def peek(path: Place | None, *, trusted: bool = False) -> dict[str, Any]:
    """The ``state_dict`` in a checkpoint, its tensors still on the disk of this machine; empty if it cannot be read.

    Of one that is sharded, a folder, it is only what prepared networks say of themselves. What is wrong with a file is
    for whoever restores it to say.

    Args:
        path: The checkpoint; None for none.
        trusted: Whether classes in it may be unpickled.
    """
    if path is None:
        return {}
    try:
        if is_folder(path):
            return read_sharded(path, (STATE_KEY,))
        checkpoint = read_checkpoint(path, mmap=True, trusted=trusted)
    except Exception:  # noqa: BLE001 - unpickling what is no pickle may raise anything, and restoring will
        return {}
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    return dict(state) if isinstance(state, Mapping) else {}


def decision_in(state: Mapping[str, Any], prefix: str) -> Decision | None:
    """What was decided of a network in the run that wrote a ``state_dict``; None if it was float there.

    Args:
        state: The checkpoint's.
        prefix: The network's dotted name in it.
    """
    entry = prepared_entry(state, prefix)
    if entry is None:
        return None
    recipe = Recipe.from_dict(entry)
    return Decision(recipe.mode, left_float=dict(entry.get("left_float", ())), families=recipe.families)


def with_weights(network: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Give a copy of a network the weights of a ``state_dict``, if it has all of them in the same shapes."""
    dotted = f"{prefix}." if prefix else ""
    own = network.state_dict()
    found = {key: state.get(dotted + key) for key in own}
    if all(_fits(found[key], value) for key, value in own.items()):
        network.load_state_dict(found)


def _fits(value: Any, own: Any) -> bool:
    if not isinstance(own, torch.Tensor):
        return value is not None
    return isinstance(value, torch.Tensor) and value.shape == own.shape
