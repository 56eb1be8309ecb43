"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes | memoryview, *, beside: str = "") -> None:
    """Write a file beside its place and rename it, so that what was there stays until the new one is complete.

    Args:
        path: Where to; folders on the way are made.
        data: All of it.
        beside: The name of the file beside it; by default one of this process. With a fixed name, what a killed process
            left is overwritten by the next.

    Raises:
        OSError: It cannot be written; what was at ``path`` is as it was.
    """
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
