"""What the file of an int8 network is: a zip of a description in JSON and of tensors, with a digest of both."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT = 2
"""The newest that this release reads: 2 has tensors with two values in a byte (`tensors.TensorWriter.packs`)."""

PLAIN_FORMAT = 1
"""What a file without such tensors is written as, which every release reads."""

DESCRIPTION = "network.json"
TENSORS = "tensors.bin"


def digest(description: dict[str, Any], data: bytes) -> str:
    """Of all that the file says, so that a value that was changed later is not taken for a trained one.

    It keeps out damage and not an attacker, who can write it anew: what runs is on lists all the same.
    """
    said = {key: value for key, value in description.items() if key != "digest"}
    hashed = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
    hashed.update(data)
    return hashed.hexdigest()


def own_version() -> str:
    """The version of this package, as installed."""
    try:
        return version("qat-lightning")
    except PackageNotFoundError:
        return "unknown"
