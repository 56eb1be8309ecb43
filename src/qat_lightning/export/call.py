"""How an exported network is called: flat tensors for the runtime, the float network's own arguments for the user."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.export.protocol import Source
from qat_lightning.graph.signature import batch_size, canonical, has_batch

TENSOR = object()
"""Stands for a tensor among the leaves of arguments or results."""


@dataclass(frozen=True)
class Call:
    """The arguments and results of a network as flat lists of tensors, and back.

    Attributes:
        signature: That of the network's ``forward``.
        in_spec: Structure of ``(args, kwargs)`` as `canonical` gives them.
        values: The leaves of the arguments; `TENSOR` where there is one.
        out_spec: Structure of the result.
        results: Its leaves; `TENSOR` where there is one.
        batched: Which of the input tensors have a batch dimension.
        batched_results: Which of the tensors of the result have one.
    """

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    values: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    results: tuple[Any, ...]
    batched: tuple[bool, ...]
    batched_results: tuple[bool, ...] = ()

    @classmethod
    def of(cls, source: Source) -> Call:
        """How the network of a source is called, found by calling it with its example."""
        signature = _signature(source.network)
        args, kwargs = source.example.args, source.example.kwargs
        leaves, in_spec = pytree.tree_flatten(canonical(signature, args, kwargs))
        with torch.no_grad():
            result = source.network(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        results, out_spec = pytree.tree_flatten(result)
        size = batch_size(source.example)
        return cls(
            signature,
            in_spec,
            tuple(map(_if_no_tensor, leaves)),
            out_spec,
            tuple(map(_if_no_tensor, results)),
            tuple(has_batch(leaf, size) for leaf in leaves if isinstance(leaf, Tensor)),
            tuple(has_batch(leaf, size) for leaf in results if isinstance(leaf, Tensor)),
        )

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of the signature.

        Raises:
            ExportError: The call has other arguments than the one that was exported.
        """
        try:
            leaves = self.in_spec.flatten_up_to(canonical(self.signature, args, kwargs))
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"The network was exported with other arguments than it is called with: {error}"
            ) from error
        for leaf, value in zip(leaves, self.values, strict=True):
            if value is not TENSOR and leaf != value:
                raise ExportError(f"The network was exported with {value!r} where it is called with {leaf!r}.")
        return [leaf for leaf, value in zip(leaves, self.values, strict=True) if value is TENSOR]

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Undo `flatten`."""
        rest = iter(tensors)
        leaves = [next(rest) if value is TENSOR else value for value in self.values]
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        return args, kwargs

    def tensors_of(self, result: Any) -> list[Tensor]:
        """The tensors of a result, in order."""
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def result(self, tensors: list[Tensor]) -> Any:
        """Undo `tensors_of`."""
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf is TENSOR else leaf for leaf in self.results], self.out_spec)


def _signature(network: nn.Module) -> inspect.Signature:
    inner: Any = getattr(network, "network", network)  # a QuantizedNetwork takes whatever its network takes
    spec = getattr(inner, "spec", None)
    if spec is not None:
        found: inspect.Signature = spec.signature
        return found
    run = inner.__dict__.get("_run")
    if run is None:
        return inspect.signature(inner.forward)
    parameters = list(inspect.signature(run).parameters.values())[1:]  # without self
    return inspect.Signature(parameters)


def _if_no_tensor(leaf: Any) -> Any:
    return TENSOR if isinstance(leaf, Tensor) else leaf
