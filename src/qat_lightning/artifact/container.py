"""The container of an int8 network: a zip of a JSON description and of tensors, with a digest of both."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT = 2
"""The newest format that this release reads; format 2 has tensors with two values per byte (`TensorWriter.packs`)."""

PLAIN_FORMAT = 1
"""The format of a file without such tensors, which every release reads."""

DESCRIPTION = "network.json"
TENSORS = "tensors.bin"


def digest(description: dict[str, Any], data: bytes) -> str:
    """Digest of everything in the file, which detects values that were changed later.

    It detects damage, but not an attacker, who can compute a new one; so loading still uses only allow-lists.
    """
    said = {key: value for key, value in description.items() if key != "digest"}
    hashed = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())
    hashed.update(data)
    return hashed.hexdigest()


def own_version() -> str:
    """The installed version of this package."""
    try:
        return version("qat-lightning")
    except PackageNotFoundError:
        return "unknown"
