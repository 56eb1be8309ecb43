"""Reading the weights of a checkpoint that also holds objects of classes, without running code of these classes.

``save_hyperparameters()`` stores whatever the LightningModule was created with, such as a configuration object.
``torch.load(weights_only=True)`` refuses such a file as a whole. Here everything but tensors and plain containers is
replaced by `Skipped`, which does nothing, and only the weights are used.
"""

from __future__ import annotations

import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
"""What an unpickler may call: it only creates containers and tensors."""

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Skipped:
    """Stands for an object of any class; it accepts what an unpickler does with one, and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Skipped:
        """Create nothing."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""

    def append(self, value: Any) -> None:
        """Keep nothing."""

    def extend(self, values: Any) -> None:
        """Keep nothing."""

    def add(self, value: Any) -> None:
        """Keep nothing."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), Skipped)


_SKIPPING = types.SimpleNamespace(Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError, __name__="pickle")


def read_weights(path: Path) -> dict[str, Tensor] | None:
    """The weights of a checkpoint, whatever else it holds.

    Args:
        path: A Lightning checkpoint, or a plain ``state_dict``.

    Returns:
        The ``state_dict``, on the CPU, without entries that are no tensors; None if the file holds tensors of other
        classes, or was written before torch 1.6.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "some.ckpt"
        >>> settings = torch.nn.ReLU()  # an object among the hyperparameters
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"act": settings}}, file)
        >>> read_weights(file)
        {'w': tensor([1., 1.])}
    """
    if not zipfile.is_zipfile(path):
        return None
    found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_SKIPPING)
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or any(isinstance(value, Skipped) or value is Skipped for value in state.values()):
        return None
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
