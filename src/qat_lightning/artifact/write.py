"""Writing an int8 network to its file."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qat_lightning.artifact.container import DESCRIPTION, FORMAT, PLAIN_FORMAT, TENSORS, digest, own_version
from qat_lightning.artifact.network import encode_network
from qat_lightning.artifact.progress import Writing
from qat_lightning.artifact.values import encode
from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.example import Example
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.settings.engines import quantized_engine
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import is_folder, place, require_storage
from qat_lightning.whole_files import write_whole


class Savable(Protocol):
    """Interface of networks that can be saved, implemented by `QuantizedNetwork`."""

    network: nn.Module
    recipe: Recipe
    coverage: Sequence[LayerCoverage]
    operations: Sequence[LayerCoverage]
    checks: Sequence[LayerCheck]
    whole: WholeCheck | None
    notes: Sequence[str]
    source: str
    example: Example


def save_quantized(quantized: Savable, path: str | os.PathLike[str]) -> None:
    """Write an int8 network to one file.

    The file is written under a temporary name and then renamed, so that an existing file at ``path`` stays until the
    new one is complete. Missing folders are created.

    Args:
        quantized: The callback's ``quantized``, or a result of `load_quantized`.
        path: The destination; ``.int8`` is a good suffix. A URL of fsspec's (``s3://bucket/model.int8``) is written in
            one transaction.

    Raises:
        ArtifactError: The network contains something that no file can store, or the file cannot be written.
        MissingExtraError: The package for the protocol of a URL is not installed.
    """
    require_storage(path)
    target = place(path)
    target = target if isinstance(target, str) else target.resolve()
    data = artifact_bytes(quantized)
    try:
        if is_folder(target) or (not isinstance(target, str) and target.exists() and not target.is_file()):
            raise ArtifactError(f"{path} is not a file: give the name of one to save the int8 network to.")
        write_whole(target, data)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror or error}): the int8 network takes {len(data) / 1e6:.2f} MB. "
            "The previous file is unchanged. Give another path, or free space."
        ) from error


def artifact_size_mb(quantized: Savable) -> float:
    """Size of the file that `save_quantized` writes.

    Returns:
        MB of 1,000,000 bytes.
    """
    return len(artifact_bytes(quantized)) / 1e6


def artifact_bytes(quantized: Savable) -> bytes:
    """The contents of the file.

    Raises:
        ArtifactError: The network contains something that no file can store; the message names it.
    """
    writing = Writing()
    try:
        with quantized_engine(quantized.recipe.target.engine):
            network = encode_network(quantized.network, quantized.recipe.mode, writing)
    except ArtifactError as error:
        raise ArtifactError(f"The int8 network cannot be saved: {error}.") from error
    if writing.needs_trust:
        warnings.warn(
            f"The int8 network calls {', '.join(sorted(set(writing.needs_trust)))}, which files are not allowed to "
            "call by default: loading it needs load_quantized(path, trusted=True).",
            stacklevel=3,
        )
    description = {
        "format": FORMAT if writing.tensors.packs else PLAIN_FORMAT,
        "qat_lightning": own_version(),
        "torch": str(torch.__version__),
        "recipe": quantized.recipe.to_dict(),
        "coverage": [list(astuple(row)) for row in quantized.coverage],
        "operations": [list(astuple(row)) for row in quantized.operations],
        "checks": [[row.name, row.op, encode(row.sqnr_db), encode(row.max_steps)] for row in quantized.checks],
        "whole": _encode_whole(quantized.whole),
        "notes": list(quantized.notes),
        "source": quantized.source,
        "example": _encode_example(quantized.example),
        "needs_network": writing.needs_network,
        "needs_trust": sorted(set(writing.needs_trust)),
        "network": network,
        "tensors": writing.tensors.table,
    }
    description["digest"] = digest(description, bytes(writing.tensors.data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = json.dumps(description, separators=(",", ":"), allow_nan=False)
        # Constant timestamps: the same network gives the same file.
        archive.writestr(zipfile.ZipInfo(DESCRIPTION), text, zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo(TENSORS), bytes(writing.tensors.data), zipfile.ZIP_STORED)
    return buffer.getvalue()


def _encode_whole(whole: WholeCheck | None) -> list[Any] | None:
    if whole is None:
        return None
    return [encode(whole.sqnr_db), [encode(draw) for draw in whole.draws], whole.output]


def _encode_example(example: Example) -> Any:
    """Shapes and dtypes of the inputs, without their values."""

    def special(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {"input": [list(value.shape), encode(value.dtype)]}

    try:
        return [encode(example.args, special), encode(example.kwargs, special)]
    except ArtifactError:
        # Inputs of custom classes are left out: only latency measurements need them.
        return None
