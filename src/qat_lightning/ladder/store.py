"""What a ladder keeps on disk, so that nothing is measured twice: one whole file for each thing that was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from qat_lightning.errors import ConfigurationError
from qat_lightning.json_files import read_json, write_json

IDENTITY = "identity.json"
NETWORK = "model.int8"
EXPORTED = "exported.json"
FLOAT_WEIGHTS = "float.ckpt"


class Store:
    """The folder of a ladder.

    ``identity.json`` says what it is about; ``float.json``, ``sources.json``, ``ranking.json``, ``bits.json`` and
    ``cost_<part>.json`` what was measured of the float network; ``rungs/<name>/made.json``, ``exported.json`` and
    ``measured.json`` how far each rung has got; ``test.json`` what the test said. Each is written to a temporary file
    and renamed: what is there is complete.

    Args:
        folder: It is made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(
        self, identity: Mapping[str, Any], steps: Mapping[str, Any], *, resume: bool, usual: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Say what the folder is about, or check that it is about that.

        Args:
            identity: What it is about.
            steps: How a new search chooses its steps; one in the folder goes on as it began.
            resume: Whether a search may be in it already.
            usual: Defaults of settings, laid out as in ``identity``, for a folder of a version that did not have them.

        Returns:
            How the search in the folder chooses its steps, with None for what an earlier version did not write.

        Raises:
            ConfigurationError: A ladder is in it and ``resume`` was not asked for, or it is about something else.
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
        """What is known under a name; None if it is not."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep something, whole or not at all."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(content))

    def rung(self, name: str) -> Path:
        """The folder of a rung."""
        return self.folder / "rungs" / name


def _filled(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, with the usual value for each that is not given."""
    filled = {**usual, **given}
    inner = {key: value for key, value in usual.items() if isinstance(value, Mapping) and key in given}
    return filled | {key: _filled(given[key], value) for key, value in inner.items()}


def digest_of(model: LightningModule) -> str:
    """A digest of everything in the ``state_dict``."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(bytes(flat.untyped_storage()) if flat.numel() else b"")
    return digest.hexdigest()
