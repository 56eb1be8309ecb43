"""Paths on this machine and in other storage (``s3://…``, ``gs://…``), which fsspec reads as it does for Lightning."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeAlias

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from qat_lightning.errors import ConfigurationError, MissingExtraError

Place: TypeAlias = Path | str
"""The location of a file or folder: a `Path` on this machine, or a ``str`` with a protocol in other storage."""


def place(path: str | os.PathLike[str]) -> Place:
    """Distinguish a path on this machine from one in other storage.

    Args:
        path: A path, or a URL of fsspec's such as ``s3://bucket/folder``.

    Returns:
        A `Path`, also for ``file://``; a URL is returned unchanged.

    Raises:
        ConfigurationError: It is no path, or a `Path` that was made from a URL.

    Example:
        >>> place("runs/model.int8"), place("s3://bucket/model.int8")
        (PosixPath('runs/model.int8'), 's3://bucket/model.int8')
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"{path!r} is not a path: give a str or a Path.")
    text = os.fspath(path)
    if isinstance(path, str) and "://" in text:
        protocol, _, rest = text.partition("://")
        return Path(rest) if protocol in ("file", "local") else text
    was = re.match(r"([a-z0-9]+):/", text)
    if was and was[1] in known_implementations:
        raise ConfigurationError(
            f"{text!r} is not a path: give {was[1]}://... as a str, since a Path leaves out a slash."
        )
    return Path(text)


def require_storage(path: str | os.PathLike[str]) -> None:
    """Check that the packages for a path's protocol are installed; nothing is opened.

    Raises:
        MissingExtraError: The package for its protocol is not installed; the message names it.
        ConfigurationError: There is no such protocol.
    """
    where = place(path)
    if isinstance(where, Path):
        return
    for part in where.split("::"):  # such as simplecache::s3://bucket/file
        protocol = part.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            raise MissingExtraError(
                f"{where!r} cannot be reached without a package for {protocol}: {error}."
            ) from error
        except ValueError as error:
            raise ConfigurationError(
                f"{where!r} is not valid: fsspec does not know the protocol {protocol!r}. It knows s3, gs, abfs "
                "and others (fsspec.available_protocols())."
            ) from error


def require_folder(path: str | os.PathLike[str]) -> None:
    """Check that a folder exists or can be created; as `require_storage` for other storage.

    Raises:
        MissingExtraError: The package for its protocol is not installed; the message names it.
        ConfigurationError: It is a file or below one, cannot be written, or has an unknown protocol.
    """
    require_storage(path)
    where = place(path)
    if not isinstance(where, Path):
        return
    existing = next(part for part in (where.absolute(), *where.absolute().parents) if part.exists())
    if not existing.is_dir():
        raise ConfigurationError(f"{where} cannot be a folder, because {existing} is a file: give another path.")
    if not os.access(existing, os.W_OK):
        raise ConfigurationError(
            f"{where} cannot be written: there is no permission for {existing}. Give another path."
        )


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        MissingExtraError: The package for its protocol is not installed.
        ConfigurationError: There is no such protocol.
    """
    require_storage(url)
    system, inner = url_to_fs(url)
    return system, inner


@contextmanager
def told_as_os_error(url: str) -> Iterator[None]:
    """Within the block, turn exceptions of a protocol's package into OSErrors."""
    try:
        yield
    except (OSError, MissingExtraError, ConfigurationError):
        raise
    except Exception as error:  # boto, aiohttp, paramiko and others have no base class of exceptions in common
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def join(folder: Place, *names: str) -> Place:
    """A path below a folder.

    Example:
        >>> join("s3://bucket/run/", "export", "model.onnx")
        's3://bucket/run/export/model.onnx'
    """
    return Path(folder, *names) if isinstance(folder, Path) else "/".join((folder.rstrip("/"), *names))


def name_of(path: Place) -> str:
    """The last part of a path.

    Example:
        >>> name_of("gs://bucket/run/model.onnx")
        'model.onnx'
    """
    return path.name if isinstance(path, Path) else path.rstrip("/").rpartition("/")[2]


def is_file(path: Place) -> bool:
    """Whether a file exists at the path.

    Raises:
        OSError: The storage does not answer.
    """
    return _ask(path, "isfile") if isinstance(path, str) else path.is_file()


def is_folder(path: Place) -> bool:
    """Whether a folder exists, or a prefix of files where storage has no folders.

    Raises:
        OSError: The storage does not answer.
    """
    return _ask(path, "isdir") if isinstance(path, str) else path.is_dir()


def _ask(url: str, what: str) -> bool:
    with told_as_os_error(url):
        system, inner = filesystem_of(url)
        return bool(getattr(system, what)(inner))


def open_to_read(path: Place) -> BinaryIO:
    """Open a file for a ``with`` block; a file in other storage is downloaded first.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        MissingExtraError: The package for its protocol is not installed.
    """
    if isinstance(path, Path):
        return path.open("rb")
    with told_as_os_error(path):
        system, inner = filesystem_of(path)
        return io.BytesIO(system.cat_file(inner))


@contextmanager
def open_to_append(path: Place) -> Iterator[TextIO]:
    """Within the block, append lines to a text file; the file and its folder are created if missing.

    Raises:
        OSError: It cannot be written.
        MissingExtraError: The package for its protocol is not installed.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            yield file
        return
    with told_as_os_error(path):
        system, inner = filesystem_of(path)
        system.makedirs(system._parent(inner), exist_ok=True)
        with system.open(inner, "a", newline="") as file:
            yield file


@contextmanager
def copied_here(paths: Sequence[Place]) -> Iterator[list[Path]]:
    """Within the block, have files and folders on this machine; those in other storage are copied into one folder.

    Raises:
        OSError: One cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield [path if isinstance(path, Path) else _copy(path, Path(folder)) for path in paths]


def _copy(url: str, folder: Path) -> Path:
    target = folder / name_of(url)
    with told_as_os_error(url):
        system, inner = filesystem_of(url)
        # With the trailing slash it means the contents of the folder, on every file system.
        whole = f"{inner.rstrip('/')}/" if system.isdir(inner) else inner
        system.get(whole, f"{target}/" if whole != inner else str(target), recursive=whole != inner)
    return target
