"""Plain values as one tensor."""

from __future__ import annotations

import re

import pytest
import torch

from qat_lightning.errors import CheckpointMismatchError
from qat_lightning.numerics.state_entries import from_entry, to_tensor, without_placeholders

VALUES = {"format": 1, "mode": "fx", "scheme": {"bits": 8}, "exclude": ["héad.*"], "folded": {}}


def test_values_come_back_from_a_tensor_a_mapping_and_an_average() -> None:
    entry = to_tensor(VALUES)
    assert from_entry(entry) == from_entry(VALUES) == VALUES
    assert from_entry((entry + entry + entry) / 3) == VALUES
    assert from_entry(torch.lerp(entry.half(), entry.half(), 0.1)) == VALUES


@pytest.mark.parametrize("entry", [to_tensor(VALUES) + 1, to_tensor(VALUES)[1:], torch.tensor(3), None, "x"])
def test_what_was_changed_is_refused(entry: object) -> None:
    with pytest.raises(CheckpointMismatchError, match=re.escape("_extra_state")):
        from_entry(entry)


def test_a_part_that_torch_loads_by_itself_says_nothing_of_other_entries() -> None:
    """``set_model_state_dict`` passes placeholders for missing extra states."""
    from torch.distributed.checkpoint.state_dict import _EXTRA_STATE

    whole = {"net.weight": torch.ones(1), "net._quantization._extra_state": to_tensor(VALUES)}
    assert not without_placeholders(whole)
    assert len(whole) == 2
    part = whole | {"net._quantization._extra_state": _EXTRA_STATE()}
    assert without_placeholders(part)
    assert part.keys() == {"net.weight"}
