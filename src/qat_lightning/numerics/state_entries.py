"""Plain values as one tensor, and back: entries of a ``state_dict`` whose readers expect nothing but tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import CheckpointMismatchError


def to_tensor(values: Mapping[str, Any]) -> Tensor:
    """Plain values as the bytes of their JSON, one to an int32.

    Wider than a byte, so that scripts which average checkpoints can add them up as they do BatchNorm's counters: the
    mean of equal entries is that entry.

    Example:
        >>> to_tensor({"bits": 8})
        tensor([123,  34,  98, 105, 116, 115,  34,  58,  32,  56, 125],
               dtype=torch.int32)
        >>> from_entry(to_tensor({"bits": 8}).float() / 3 * 3)
        {'bits': 8}
    """
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.int32)


def without_placeholders(state: MutableMapping[str, Any]) -> bool:
    """Take out of a part of a ``state_dict`` what ``torch.distributed.checkpoint`` puts in the place of entries.

    Its ``set_model_state_dict``, called with some tensors of a module, loads an object without a value for each extra
    state of that module. Such a part says nothing of how a network was quantized.

    Args:
        state: Changed in place.

    Returns:
        Whether there was one: then ``state`` is such a part.
    """
    # Its import takes seconds, and where nobody has imported it there is none.
    placeholder = getattr(sys.modules.get("torch.distributed.checkpoint.state_dict"), "_EXTRA_STATE", ())
    placeholders = [key for key, value in state.items() if isinstance(value, placeholder)]
    for key in placeholders:
        del state[key]
    return bool(placeholders)


def from_entry(entry: Any) -> dict[str, Any]:
    """Undo `to_tensor`; a mapping, which releases before had in its place, is taken as it is.

    Raises:
        CheckpointMismatchError: It is neither, or not what was saved any more.
    """
    if isinstance(entry, Mapping):
        return dict(entry)
    try:
        values = json.loads(bytes(entry.detach().cpu().double().round().int().tolist()))
    except (AttributeError, ValueError) as error:
        values = error
    if not isinstance(values, dict):
        raise CheckpointMismatchError(
            "The entry of a state_dict that says how its network was quantized ('…_quantization._extra_state') cannot "
            "be read: it was changed since it was saved. Take this entry from the checkpoint unchanged."
        )
    return values
