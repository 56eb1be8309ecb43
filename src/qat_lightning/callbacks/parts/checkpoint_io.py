"""Atomic checkpoint writing, and checkpoint reading with helpful error messages."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from qat_lightning.callbacks.parts.checkpoint_weights import read_weights
from qat_lightning.errors import CheckpointFileError
from qat_lightning.storage import Place, copied_here, open_to_read
from qat_lightning.whole_files import write_whole

_CLASS = re.compile(r"Unsupported (?:global|class).*?([\w.]+\.\w+)")
"""Extracts the class from torch's message about a class that it does not unpickle."""

_TRUST_IN_TRAINER = "pass weights_only=False beside ckpt_path="

_WEIGHTS_ALONE = "save its weights alone, torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside its path and renames it, so that the old file stays until then.

    Lightning writes to Python's folder for temporary files and moves the file from there. If that folder is on another
    file system, as ``/tmp`` often is, moving means copying. A killed process or a full disk then leaves an incomplete
    ``last.ckpt``, and the previous one is lost.

    `QuantizationAwareTraining` uses it during a fit, unless the Trainer was given a plugin of another kind. For a
    Trainer without that callback: ``Trainer(plugins=[WholeFileCheckpointIO()])``.
    """

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, as Lightning does.

        Raises:
            CheckpointFileError: There is no file at ``path``, or it is incomplete, or it contains classes and
                ``weights_only=False`` was not given.
        """
        read = super().load_checkpoint
        checkpoint = _mapping(f"ckpt_path={str(path)!r}", lambda: read(path, *args, **options), _TRUST_IN_TRAINER)
        lacking = [key for key in ("state_dict", "pytorch-lightning_version") if key not in checkpoint]
        if lacking:
            raise CheckpointFileError(
                f"ckpt_path={str(path)!r} is not a Lightning checkpoint: it has no {' and no '.join(lacking)}. "
                "Load plain weights into the LightningModule with load_state_dict, before the fit."
            )
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local file; remote paths and ``storage_options`` are left to Lightning.

        Raises:
            OSError: The file cannot be written; the previous file at ``path`` is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        try:
            # A fixed name: the leftover of a killed process is overwritten by the next save.
            write_whole(target, buffer.getbuffer(), beside=f".{target.name}.part")
        except OSError as error:
            size = buffer.getbuffer().nbytes / 1e6
            raise OSError(
                error.errno,
                f"{error.strerror or error}: a checkpoint of {size:.2f} MB was not written, and the previous file is "
                "unchanged",
                str(path),
            ) from error


def read_float_state(path: Place) -> dict[str, Any]:
    """Read the ``state_dict`` of ``float_checkpoint=``, which is a Lightning checkpoint or a plain ``state_dict``.

    Objects that it also holds, such as hyperparameters, are not created.

    Raises:
        CheckpointFileError: There is no file at ``path``, or it is incomplete, or its weights are objects of classes.
    """
    said = f"float_checkpoint={str(path)!r}"

    def read() -> Any:
        try:
            return read_checkpoint(path)
        except pickle.UnpicklingError:
            with copied_here([path]) as (here,):
                weights = read_weights(here)
            if weights is None:
                raise
            return weights

    checkpoint = _mapping(said, read, _WEIGHTS_ALONE)
    return _mapping(said, lambda: checkpoint.get("state_dict", checkpoint), _WEIGHTS_ALONE)


def read_checkpoint(path: Place, *, mmap: bool = False, trusted: bool = False) -> Any:
    """Load what ``torch.save`` wrote, with tensors on the CPU.

    Args:
        path: A local path, or one in remote storage.
        mmap: Whether tensors of a local file may stay memory-mapped until they are used.
        trusted: Whether to unpickle classes, which can execute arbitrary code.

    Raises:
        OSError: The file cannot be read.
        Exception: Anything that unpickling raises if the file is not a checkpoint.
    """
    if isinstance(path, Path):
        return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=mmap)
    with open_to_read(path) as file:
        return torch.load(file, map_location="cpu", weights_only=not trusted)


def read_sharded(folder: Place, endings: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Read whole tensors, on the CPU, from the ``state_dict`` of a checkpoint that is sharded over processes.

    Args:
        folder: The folder that a strategy such as ``ModelParallelStrategy`` saved.
        endings: Suffixes of the keys to read.

    Raises:
        CheckpointFileError: It is not such a folder, or it is incomplete.
        OSError: It is in remote storage and cannot be copied from there.
    """
    with copied_here([folder]) as (here,):
        return _read_sharded(here, str(folder), endings)


def _read_sharded(folder: Path, shown: str, endings: tuple[str, ...]) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # imports that take seconds
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        metadata = FileSystemReader(folder).read_metadata()
        paths = metadata.planner_data or {}
        found: dict[str, Any] = {
            stored: torch.empty(entry.size, dtype=entry.properties.dtype)
            for stored, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and paths.get(stored, ())[:1] == ("state_dict",)
            and stored.endswith(endings)
        }
        if found:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is")  # reading in one process is intended
                load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    except Exception as error:  # unpickling a file that is not a pickle may raise anything
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointFileError(
            f"{shown!r} is not a checkpoint, or only a part of one ({reason}): give the folder that a Trainer saved."
        ) from error
    return {".".join(map(str, paths[stored][1:])): value for stored, value in found.items()}


def _mapping(said: str, read: Callable[[], Any], trusting: str) -> dict[str, Any]:
    try:
        found = read()
    except FileNotFoundError as error:
        raise CheckpointFileError(f"{said} does not exist.") from error
    except pickle.UnpicklingError as error:
        held = _CLASS.search(str(error))
        reason = (
            f"holds {held[1]}, and torch loads only tensors and plain values by default: if you trust the file, "
            f"{trusting}. self.save_hyperparameters(ignore=[...]) keeps modules and other objects out of checkpoints"
            if held
            else f"cannot be read: it is not a checkpoint, or only a part of one ({type(error).__name__}: {error})"
        )
        raise CheckpointFileError(f"{said} {reason}.") from error
    except Exception as error:  # unpickling a file that is not a pickle may raise anything
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointFileError(
            f"{said} cannot be read: it is not a checkpoint, or only a part of one ({reason})."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointFileError(f"{said} is not a checkpoint: it holds a {type(found).__name__}.")
    return found


def save_whole_files(trainer: Trainer) -> Callable[[], None]:
    """Make a Trainer save through `WholeFileCheckpointIO`, if it uses Lightning's default.

    Returns:
        A function that restores the Trainer's own CheckpointIO.
    """
    strategy = trainer.strategy
    before = strategy.checkpoint_io
    if type(before) is not TorchCheckpointIO:
        return lambda: None
    strategy.checkpoint_io = WholeFileCheckpointIO()

    def put_back() -> None:
        strategy.checkpoint_io = before

    return put_back
