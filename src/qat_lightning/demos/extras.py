"""Importing optional dependencies of the demos, with an error that says what to install."""

import importlib
from types import ModuleType

from qat_lightning.errors import MissingExtraError


def require(module: str, *, needed_for: str, extra: str = "demos") -> ModuleType:
    """Import an optional dependency, or raise an error that names the extra to install.

    Args:
        module: Dotted name of the module to import.
        needed_for: What needs it; the message begins with this.
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
            raise  # installed, but a package that it imports is missing: keep the original error
        raise MissingExtraError(
            f"{needed_for} needs the package {module.partition('.')[0]!r}, which is not installed. "
            f"Install it with: pip install 'qat-lightning[{extra}]'"
        ) from error
