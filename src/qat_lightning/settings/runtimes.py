"""The runtime of an int8 network in this process, if not the fastest one."""

from __future__ import annotations

from typing import Any, Literal, get_args

from qat_lightning.errors import CombinationError, ConfigurationError

Runtime = Literal["plain"]
"""``"plain"``: oneDNN's ops on plain uint8 and int8 tensors, called one by one."""

_BACKENDS = ("x86", "onednn")


def check_runtime(runtime: Any, mode: str, backend: str, kind: str) -> None:
    """Reject an unknown runtime, and one that does not support a mode, backend and kind.

    Raises:
        ConfigurationError: There is no such runtime.
        CombinationError: The runtime does not run such networks.

    Example:
        >>> check_runtime("plain", "fx", "onednn", "static")
    """
    if runtime is None:
        return
    if runtime not in get_args(Runtime):
        raise ConfigurationError(f"runtime={runtime!r} is unknown: use 'plain', or None for the fastest.")
    if backend not in _BACKENDS:
        raise CombinationError(
            f"runtime='plain' runs oneDNN's kernels, and backend={backend!r} has other ones: use backend='x86' (or "
            "'onednn' in modes eager and fx), or runtime=None."
        )
    if mode == "parts":
        raise CombinationError(
            "runtime='plain' needs one graph of the whole network, and mode='parts' makes several: use mode='fx', "
            "'eager' or 'pt2e', or runtime=None."
        )
    if kind not in ("qat", "static"):
        raise CombinationError(
            f"runtime='plain' is for fixed ranges of activations, and this is kind={kind!r}: use kind='static', or "
            "runtime=None."
        )
