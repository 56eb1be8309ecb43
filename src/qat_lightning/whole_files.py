"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qat_lightning.storage import Place, filesystem_of, join, told_as_os_error


def write_whole(path: Place, data: bytes | memoryview, *, beside: str = "") -> None:
    """Write a file under a temporary name and rename it, so that the old file stays until the new one is complete.

    In other storage this is a transaction of fsspec: an incomplete upload is discarded.

    Args:
        path: The destination; missing folders are created.
        data: The whole content.
        beside: The temporary name; by default unique to this process. With a fixed name, the next write overwrites what
            a killed process left.

    Raises:
        OSError: It cannot be written; the old file at ``path`` is unchanged.
        MissingExtraError: The package for the protocol of ``path`` is not installed.
    """
    if isinstance(path, str):
        with told_as_os_error(path):
            system, inner = filesystem_of(path)
            system.makedirs(system._parent(inner), exist_ok=True)
            with system.transaction, system.open(inner, "wb") as file:
                file.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(beside or f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def move_whole(made: Sequence[Path], folder: Place) -> list[Place]:
    """Move complete files and folders to their destination, replacing those of the same name.

    Args:
        made: Paths on this machine; if ``folder`` is on this machine too, on its file system.
        folder: The destination; it has to exist if it is on this machine. In other storage, everything is uploaded in
            one transaction, which is committed at the end.

    Returns:
        The new locations.

    Raises:
        OSError: A file or folder cannot be written.
    """
    if isinstance(folder, Path):
        return [_move(one, folder) for one in made]
    with told_as_os_error(folder):
        _upload(made, folder)
    return [join(folder, one.name) for one in made]


def _move(made: Path, folder: Path) -> Path:
    target = folder / made.name
    if made.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    made.replace(target)
    return target


def _upload(made: Sequence[Path], folder: str) -> None:
    system, inner = filesystem_of(folder)
    files = {
        f"{inner.rstrip('/')}/{file.relative_to(one.parent).as_posix()}": file
        for one in made
        for file in ([one] if one.is_file() else sorted(part for part in one.rglob("*") if part.is_file()))
    }
    trees = [f"{inner.rstrip('/')}/{one.name}" for one in made if one.is_dir()]
    before = {file for tree in trees if system.isdir(tree) for file in system.find(tree)}
    for parent in dict.fromkeys(system._parent(target) for target in files):
        system.makedirs(parent, exist_ok=True)
    with system.transaction:
        for target, file in files.items():
            with file.open("rb") as source, system.open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 4_000_000)
    for old in before - {system._strip_protocol(target) for target in files}:
        system.rm_file(old)
