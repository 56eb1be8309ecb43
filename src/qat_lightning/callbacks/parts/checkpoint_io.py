"""Checkpoints that appear on the disk whole or not at all, and are read with a word on what is wrong with them."""

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

from qat_lightning.errors import CheckpointFileError
from qat_lightning.storage import Place, copied_here, open_to_read
from qat_lightning.whole_files import write_whole

_CLASS = re.compile(r"Unsupported (?:global|class).*?([\w.]+\.\w+)")
"""The class in torch's message that it does not unpickle."""

_TRUST_IN_TRAINER = "pass weights_only=False beside ckpt_path="

_WEIGHTS_ALONE = "save its weights alone, torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that what was there stays until the new one is complete.

    Lightning writes to Python's folder for temporary files and moves from there. Where that folder is on another file
    system, as ``/tmp`` often is, moving is copying: a process that is killed meanwhile, or a disk that is full, leaves
    a part of a file in the place of ``last.ckpt``, and the checkpoint that was there is lost.

    `QuantizationAwareTraining` uses it during a fit, unless the Trainer was given a plugin of another kind. For a
    Trainer without that callback: ``Trainer(plugins=[WholeFileCheckpointIO()])``.
    """

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, as Lightning does.

        Raises:
            CheckpointFileError: There is none at ``path``, or not all of it; or it holds classes, without
                ``weights_only=False``.
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
        """Save to a local file; paths of other file systems, and options for them, are left to Lightning.

        Raises:
            OSError: The file cannot be written; what was at ``path`` is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        try:
            # Always of the same name: what a killed process left is overwritten by the next that gets as far.
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
    """The ``state_dict`` of ``float_checkpoint=``: a checkpoint of Lightning's, or the state by itself.

    Raises:
        CheckpointFileError: There is none at ``path``, or not all of it.
    """
    said = f"float_checkpoint={str(path)!r}"
    checkpoint = _mapping(said, lambda: read_checkpoint(path), _WEIGHTS_ALONE)
    return _mapping(said, lambda: checkpoint.get("state_dict", checkpoint), _WEIGHTS_ALONE)


def read_checkpoint(path: Place, *, mmap: bool = False, trusted: bool = False) -> Any:
    """What ``torch.save`` wrote, its tensors on the CPU.

    Args:
        path: On this machine or in other storage.
        mmap: Whether tensors may stay on the disk of this machine until they are used.
        trusted: Whether classes in it may be unpickled, which can execute anything.

    Raises:
        OSError: It cannot be read.
        Exception: Whatever unpickling raises of what is no checkpoint.
    """
    if isinstance(path, Path):
        return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=mmap)
    with open_to_read(path) as file:
        return torch.load(file, map_location="cpu", weights_only=not trusted)


def read_sharded(folder: Place, endings: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Tensors of the ``state_dict`` in a checkpoint that each process wrote its part of, whole and on the CPU.

    Args:
        folder: What a strategy such as ``ModelParallelStrategy`` saved.
        endings: Of the keys that are wanted.

    Raises:
        CheckpointFileError: It is no such folder, or not all of it.
        OSError: It is in other storage, and cannot be copied from there.
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
                warnings.filterwarnings("ignore", "torch.distributed is")  # as is asked for
                load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    except Exception as error:  # unpickling what is no pickle may raise anything
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
    except Exception as error:  # unpickling what is no pickle may raise anything
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointFileError(
            f"{said} cannot be read: it is not a checkpoint, or only a part of one ({reason})."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointFileError(f"{said} is not a checkpoint: it holds a {type(found).__name__}.")
    return found


def save_whole_files(trainer: Trainer) -> Callable[[], None]:
    """Let a Trainer save through `WholeFileCheckpointIO`, if it saves as Lightning does by itself.

    Returns:
        What puts the Trainer's own way of saving back.
    """
    strategy = trainer.strategy
    before = strategy.checkpoint_io
    if type(before) is not TorchCheckpointIO:
        return lambda: None
    strategy.checkpoint_io = WholeFileCheckpointIO()

    def put_back() -> None:
        strategy.checkpoint_io = before

    return put_back
