"""JSON files that are written completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat_lightning.errors import ConfigurationError
from qat_lightning.whole_files import write_whole


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote.

    Raises:
        ConfigurationError: The file is not one of these.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): remove it.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} has other content: remove it.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete."""
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
