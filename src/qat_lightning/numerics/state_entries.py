"""Plain values encoded as one tensor, and back: for entries of a ``state_dict``, whose readers expect only tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import CheckpointMismatchError


def to_tensor(values: Mapping[str, Any]) -> Tensor:
    """Encode plain values as the bytes of their JSON, one per int32.

    Wider than a byte, so that scripts which average checkpoints can add them up as they do BatchNorm's counters: the
    mean of equal entries is the same entry.

    Example:
        >>> to_tensor({"bits": 8})
        tensor([123,  34,  98, 105, 116, 115,  34,  58,  32,  56, 125],
               dtype=torch.int32)
        >>> from_entry(to_tensor({"bits": 8}).float() / 3 * 3)
        {'bits': 8}
    """
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.int32)


def without_placeholders(state: MutableMapping[str, Any]) -> bool:
    """Remove the placeholders of ``torch.distributed.checkpoint`` from a part of a ``state_dict``.

    Its ``set_model_state_dict``, called with only some tensors of a module, loads an object without a value for each
    extra state of that module. Such a part does not say how a network was quantized.

    Args:
        state: Changed in place.

    Returns:
        Whether there was one, so ``state`` is such a part.
    """
    # Importing it takes seconds; if nobody has imported it, there are no placeholders.
    placeholder = getattr(sys.modules.get("torch.distributed.checkpoint.state_dict"), "_EXTRA_STATE", ())
    placeholders = [key for key, value in state.items() if isinstance(value, placeholder)]
    for key in placeholders:
        del state[key]
    return bool(placeholders)


def from_entry(entry: Any) -> dict[str, Any]:
    """Inverse of `to_tensor`; a mapping, as earlier releases stored it, is returned unchanged.

    Raises:
        CheckpointMismatchError: It is neither, or was changed since it was saved.
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
