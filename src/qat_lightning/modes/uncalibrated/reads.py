"""Weights that a network's code reads outside of their layers, where training would not round them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qat_lightning.graph.example import Example
from qat_lightning.modes.uncalibrated.checking import run_float

READ_ELSEWHERE = "forward also reads its weight directly, where training would not quantize it"


def read_elsewhere(network: nn.Module, names: Iterable[str], example: Example) -> set[str]:
    """The layers whose parameters are passed to functions outside of those layers.

    Args:
        network: The float network, which is called once.
        names: Names of layers.
        example: The call.

    Example:
        >>> import torch
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = nn.Embedding(4, 2)
        ...
        ...     def forward(self, ids):
        ...         return self.words(ids) @ self.words.weight.T
        >>> read_elsewhere(Tied(), ["words"], Example((torch.tensor([0, 1]),)))
        {'words'}
    """
    wanted = set(names)
    layers = {name: layer for name, layer in network.named_modules() if layer._parameters}
    owners: dict[int, set[str]] = {}
    for name, layer in layers.items():
        for parameter in layer._parameters.values():
            owners.setdefault(id(parameter), set()).add(name)
    watch = _Watch(layers, {key: found for key, found in owners.items() if found & wanted})
    with watch:
        run_float(network, example)
    return watch.found & wanted


class _Watch(TorchFunctionMode):
    def __init__(self, layers: Mapping[str, nn.Module], owners: Mapping[int, set[str]]) -> None:
        super().__init__()
        self.owners = owners
        self.found: set[str] = set()
        self._inside: list[str] = []
        self._handles = [
            handle
            for name, layer in layers.items()
            for handle in (
                layer.register_forward_pre_hook(lambda module, args, name=name: self._inside.append(name)),
                layer.register_forward_hook(lambda module, args, output: self._inside.pop() and None, always_call=True),
            )
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A property such as ``weight.shape`` reads no values.
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim") or _gives_tensor(func):
            for leaf in tree_leaves((args, kwargs)):
                owners = self.owners.get(id(leaf), set()) if isinstance(leaf, Tensor) else set()
                if not owners & set(self._inside):
                    self.found |= owners
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def _gives_tensor(func: Any) -> bool:
    return func in (Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.data.__get__)  # type: ignore[attr-defined]
