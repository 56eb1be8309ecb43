"""The file of an int8 network: written completely or not at all, and read without executing anything in it.

The file is a zip with two entries: ``network.json``, plain values that describe the network and its verification, and
``tensors.bin``, the bytes of its tensors. It contains no pickle and no code. Graphs of the modes fx and pt2e are
rebuilt node by node from lists of known operations and layers; in mode eager the network's own code runs, and has to be
passed when loading.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from dataclasses import replace
from typing import Any, BinaryIO, Literal

import torch
from torch import nn

from qat_lightning.artifact.container import DESCRIPTION, FORMAT, TENSORS, digest, own_version
from qat_lightning.artifact.network import decode_network
from qat_lightning.artifact.progress import Reading
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.artifact.tensors import TensorReader
from qat_lightning.artifact.values import decode, no_tag
from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import ArtifactError, ConfigurationError, QuantizationError, in_brief
from qat_lightning.graph.example import Example
from qat_lightning.graph.lazy import refuse_lazy
from qat_lightning.layers.kernels import choose_kernels
from qat_lightning.modes.protocol import Converted, LayerCoverage
from qat_lightning.settings.backends import require
from qat_lightning.settings.engines import packing_engine
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.runtimes import Runtime
from qat_lightning.storage import Place, open_to_read, place

_LARGEST_DESCRIPTION = 512_000_000
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Exceptions that a damaged or malicious description may cause inside PyTorch."""


def load_quantized(
    path: str | os.PathLike[str],
    network: nn.Module | None = None,
    trusted: bool = False,
    runtime: Runtime | None = None,
) -> QuantizedNetwork:
    """Read an int8 network from its file, without a Trainer and without data.

    Nothing in the file is executed: the network is rebuilt from allow-lists of operations and layers.

    Args:
        path: A file written by `save_quantized`, or a URL of fsspec's (``s3://bucket/model.int8``).
        network: An instance of the float network, trained or not. Required in mode eager, which runs your Python code,
            and where a graph calls one of your modules as a whole. It is copied, not changed.
        trusted: Also import and call functions that the file names. Needed only for a network that calls functions or
            custom operators from outside PyTorch (saving reports this). Use it only for files from people whose code
            you would run.
        runtime: ``"plain"`` runs a network of mode pt2e on oneDNN's ops on plain tensors, without compilation; by
            default the runtime that it was saved with.

    Returns:
        The network as it was saved, bit for bit, with the weights packed for its backend.

    Raises:
        ArtifactError: The file is missing, damaged, of a newer format, or not an int8 network; or ``network`` or
            ``trusted`` is needed.
        ConfigurationError: This build of PyTorch cannot run the backend, or the network does not support the runtime.
        MissingExtraError: The package for the protocol of a URL is not installed.
        NetworkError: ``network`` has lazy modules that were not called yet.
    """
    return _load(place(path), path, network, trusted, runtime)


def quantized_from_bytes(data: bytes, network: nn.Module | None = None, trusted: bool = False) -> QuantizedNetwork:
    """Inverse of `artifact_bytes`; arguments and errors are those of `load_quantized`."""
    return _load(io.BytesIO(data), "what another process sent", network, trusted, None)


def _load(
    source: Place | io.BytesIO, path: Any, network: nn.Module | None, trusted: bool, runtime: Runtime | None
) -> QuantizedNetwork:
    if network is not None and not isinstance(network, nn.Module):
        raise ConfigurationError(
            f"network={network!r} is not a network: give an instance of the float network, such as network=Net()."
        )
    if network is not None:
        refuse_lazy(network)
    description, data = _read(source, path)
    try:
        recipe = _with_runtime(_decode_recipe(description["recipe"]), runtime)
        if recipe.detour:
            warnings.warn(recipe.detour, stacklevel=3)
        reading = Reading(TensorReader(description["tensors"], data), network, trusted)
        return _decode(description, recipe, reading)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}.") from error
    except QuantizationError:
        raise
    except _DAMAGE as error:
        raise ArtifactError(
            f"{path} cannot be loaded: it is damaged, or was not written by qat-lightning "
            f"({in_brief(error)}). Save the network again."
        ) from error


def _decode_coverage(
    name: Any, kind: Any, quantized: Any, reason: Any, what: Any = "layer", calls: Any = 1, macs: Any = None
) -> LayerCoverage:
    of_layer: Literal["layer", "op"] = "op" if what == "op" else "layer"
    counted = None if macs is None else int(macs)
    return LayerCoverage(str(name), str(kind), bool(quantized), str(reason), of_layer, int(calls), counted)


def _with_runtime(recipe: Recipe, runtime: Runtime | None) -> Recipe:
    if runtime is None:
        return recipe
    chosen = replace(recipe, runtime=runtime)
    if recipe.mode != "pt2e":
        raise ConfigurationError(
            f"runtime={runtime!r} is for files of mode 'pt2e', and this is of mode {recipe.mode!r}: load it without "
            "runtime=, and qat_lightning.to_plain_tensors(network) makes one of mode 'pt2e' of it."
        )
    return chosen


def _decode(description: dict[str, Any], recipe: Recipe, reading: Reading) -> QuantizedNetwork:
    packs = traits_of(recipe.mode).packs
    if packs:
        require(recipe.target)
    with packing_engine(recipe.target.engine if packs else None), torch.no_grad():
        module = decode_network(description["network"], recipe, reading)
        choose_kernels(module, recipe.target.engine if packs else None)
    converted = Converted(
        network=module,
        coverage=[_decode_coverage(*values) for values in description["coverage"]],
        checks=[LayerCheck(str(n), str(o), float(decode(s)), float(decode(m))) for n, o, s, m in description["checks"]],
        notes=[str(note) for note in description["notes"]],
        operations=[_decode_coverage(*values) for values in description.get("operations", [])],
        whole=_decode_whole(description.get("whole")),
    )
    return QuantizedNetwork(
        converted, recipe, _decode_example(description["example"]), source=str(description["source"])
    )


def _decode_whole(data: Any) -> WholeCheck | None:
    if data is None:  # also in files of releases that did not store it
        return None
    ratio, draws, output = data
    return WholeCheck(float(decode(ratio)), tuple(float(decode(draw)) for draw in draws), str(output))


def _decode_recipe(data: Any) -> Recipe:
    try:
        return Recipe.from_dict(data)
    except QuantizationError as error:
        raise ArtifactError(f"its recipe is invalid. {str(error).removesuffix('.')}") from error


def _read(source: Place | io.BytesIO, shown: Any) -> tuple[dict[str, Any], bytes]:
    """The two entries of the file; an error says what the file is instead."""
    try:
        with _opened(source) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if sorted(names) != sorted((DESCRIPTION, TENSORS)):
                raise ArtifactError(_what_else(archive, shown))
            _check_entries(archive.getinfo(DESCRIPTION), archive.getinfo(TENSORS), shown)
            description = json.loads(archive.read(DESCRIPTION))
            _check_format(description, shown)
            data = archive.read(TENSORS)
    except QuantizationError:
        raise
    except FileNotFoundError as error:
        raise ArtifactError(f"{shown} does not exist: give the path that the int8 network was saved to.") from error
    except OSError as error:
        raise ArtifactError(f"{shown} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # each compression method, and each kind of damage, raises other exceptions
        raise ArtifactError(_describe_non_zip(source, shown)) from error
    # Files of the first releases have no digest.
    if "digest" in description and description["digest"] != digest(description, data):
        raise ArtifactError(f"{shown} is damaged: it was changed after it was written. Save the network again.")
    return description, data


def _opened(source: Place | io.BytesIO) -> BinaryIO:
    return io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else open_to_read(source)


def _check_entries(description: zipfile.ZipInfo, tensors: zipfile.ZipInfo, shown: Any) -> None:
    """Raise an error before anything is unpacked that would not fit into memory."""
    if tensors.compress_type != zipfile.ZIP_STORED:
        raise ArtifactError(f"{shown} is damaged: its tensors are compressed, which no release writes.")
    if description.file_size > _LARGEST_DESCRIPTION:
        raise ArtifactError(
            f"{shown} is damaged: its description would take {description.file_size / 1e6:.0f} MB, and none takes "
            f"more than {_LARGEST_DESCRIPTION / 1e6:.0f} MB. Save the network again."
        )


def _check_format(description: Any, shown: Any) -> None:
    found = description.get("format") if isinstance(description, dict) else None
    if type(found) is not int or found < 1:
        raise ArtifactError(f"{shown} is damaged: it has no format number. Save the network again.")
    if found > FORMAT:
        writer = str(description.get("qat_lightning"))[:40]
        raise ArtifactError(
            f"{shown} has format {found}, written by qat-lightning {writer}, and this release ({own_version()}) reads "
            f"formats up to {FORMAT}: pip install -U qat-lightning."
        )


def _what_else(archive: zipfile.ZipFile, shown: Any) -> str:
    """Describe a zip that is not an int8 network, without unpickling it."""
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if not pickles:
        return f"{shown} is a zip file, but not an int8 network: give what qat.save(path) wrote."
    if any(b"pytorch-lightning_version" in archive.read(name) for name in pickles):
        return (
            f"{shown} is a Lightning checkpoint, which holds the network in training: restore it with "
            "trainer.test(model, ckpt_path=...), then qat.save(path) writes the int8 network."
        )
    return (
        f"{shown} was written by torch.save or torch.jit.save (perhaps a state_dict), and is not an int8 network: "
        "give what qat.save(path) wrote."
    )


def _describe_non_zip(source: Place | io.BytesIO, shown: Any) -> str:
    try:
        with _opened(source) as file:
            start = file.read(4)
    except OSError:
        start = b""
    if start == b"PK\x03\x04":
        return f"{shown} is damaged: it was cut off or changed after it was written. Copy it or save the network again."
    return f"{shown} is not an int8 network: give a file that qat.save(path) wrote."


def _decode_example(data: Any) -> Example:
    """Zeros of the stored shapes."""

    def special(tag: str, content: Any) -> Any:
        if tag != "input":
            return no_tag(tag, content)
        shape, dtype = content
        return torch.zeros([int(size) for size in shape], dtype=decode(dtype))

    if data is None:
        return Example()
    args, kwargs = (decode(part, special) for part in data)
    return Example(args, kwargs)
