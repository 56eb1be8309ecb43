"""Importing what only the demos need, with a message that says what to install."""

import importlib
from types import ModuleType

from qat_lightning.errors import MissingExtraError


def require(module: str, *, needed_for: str, extra: str = "demos") -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: Dotted name of the module to import.
        needed_for: What the user asked for that needs it; the message begins with it.
        extra: The extra of qat-lightning that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module is not installed.

    Example:
        >>> require("json", needed_for="reading JSON").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # installed, but something that it imports is missing: its own message is the right one
        raise MissingExtraError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which is not installed. "
            f"Install it with: pip install 'qat-lightning[{extra}]'"
        ) from error
