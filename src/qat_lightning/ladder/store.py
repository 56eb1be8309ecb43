"""The files of a search, so that nothing is measured twice: one file, written completely, for each measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json, write_json

IDENTITY = "identity.json"
NETWORK = "model.int8"
EXPORTED = "exported.json"
FLOAT_WEIGHTS = "float.ckpt"


class Store:
    """The folder of a search.

    ``identity.json`` identifies the search. ``float.json``, ``sources.json``, ``ranking.json``, ``bits.json`` and
    ``cost_<part>.json`` hold measurements of the float network; ``rungs/<name>/made.json``, ``exported.json`` and
    ``measured.json`` the progress of each rung; ``test.json`` the result of the test. Each is written to a temporary
    file and renamed, so a file that exists is complete.

    Args:
        folder: The folder; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(
        self, identity: Mapping[str, Any], steps: Mapping[str, Any], *, resume: bool, usual: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the identity of a new search, or check that the folder holds the same search.

        Args:
            identity: The network and settings of the search.
            steps: How a new search chooses its steps; a search in the folder continues as it began.
            resume: Whether the folder may hold a search.
            usual: Defaults of settings, nested as in ``identity``, for a folder of a version that did not have them.

        Returns:
            How the search in the folder chooses its steps, with None for what an earlier version did not write.

        Raises:
            ConfigurationError: The folder holds a search and ``resume`` is False, or it holds another search.
        """
        path = self.folder / IDENTITY
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {**identity, **steps})
            return dict(steps)
        if not resume:
            raise ConfigurationError(
                f"{self.folder} already holds a search: resume=True continues it, and another folder= starts a new one."
            )
        was = _filled(read_json(path), usual)
        as_begun = {name: was.pop(name, None) for name in steps}
        others = sorted(key for key in {*was, *identity} if was.get(key) != identity.get(key))
        if others:
            raise ConfigurationError(
                f"The search in {self.folder} has other settings ({', '.join(others)} differ): resume=True needs the "
                "same network, data and settings; otherwise give another folder=."
            )
        return as_begun

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a file by its name; None if there is no such file."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file, completely or not at all."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(content))

    def rung(self, name: str) -> Path:
        """The folder of a rung."""
        return self.folder / "rungs" / name


def _filled(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, with the default for each that is not given."""
    filled = {**usual, **given}
    inner = {key: value for key, value in usual.items() if isinstance(value, Mapping) and key in given}
    return filled | {key: _filled(given[key], value) for key, value in inner.items()}


def digest_of(model: LightningModule) -> str:
    """A digest of the whole ``state_dict``."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
