"""Folders of sharded checkpoints, as `torch.distributed.checkpoint` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from qat_lightning import Example, Recipe, float_state_dict, prepare
from qat_lightning.callbacks.parts.checkpoint_io import read_sharded
from qat_lightning.callbacks.parts.checkpoints import note_added_keys
from qat_lightning.callbacks.parts.resuming import decision_in, peek
from qat_lightning.errors import CheckpointFileError
from tests.callbacks.lit import Lit, Net


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Lit]:
    """What Lightning saves of a LightningModule with a prepared network."""
    module, path = Lit(Net()), tmp_path / "a.ckpt"
    recipe = Recipe("eager", "x86", kind="dynamic", trained=True)
    module.net = prepare(Net(), Example((torch.randn(2, 1, 8, 8),)), recipe)
    note_added_keys(module.net)
    save({"state_dict": module.state_dict(), "optimizer_0": {"momentum": torch.ones(3)}}, checkpoint_id=path)
    return path, module


def test_a_folder_is_read_whole(saved: tuple[Path, Lit]) -> None:
    path, module = saved
    found = read_sharded(path)
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in module.state_dict().items())


def test_the_float_part_of_a_folder_loads_into_the_float_model(saved: tuple[Path, Lit]) -> None:
    path, module = saved
    model = Lit()
    model.load_state_dict(float_state_dict(path))
    assert torch.equal(model.net.head.weight, module.net.head.weight)


def test_only_what_networks_say_of_themselves_is_looked_at(saved: tuple[Path, Lit]) -> None:
    found = peek(saved[0])
    assert list(found) == ["net._quantization._extra_state"]
    decision = decision_in(found, "net")
    assert decision is not None
    assert decision.mode == "eager"


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFileError, match="give the folder that a Trainer saved"):
        read_sharded(tmp_path)
    assert peek(tmp_path) == {}
