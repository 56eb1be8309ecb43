"""Conversion between an exported network's flat tensors and the float network's own arguments and results."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.export.completion import Completion
from qat_lightning.export.protocol import Source
from qat_lightning.graph.signature import as_captured, batch_size, canonical, given_parameters, has_batch

TENSOR = object()
"""Placeholder for a tensor among the leaves of arguments or results."""


@dataclass(frozen=True)
class Call:
    """Flattens the arguments and results of a network into lists of tensors, and restores them.

    Attributes:
        signature: Signature of the network's ``forward``.
        in_spec: Pytree structure of ``(args, kwargs)`` as returned by `canonical`.
        values: Leaves of the arguments, with `TENSOR` in place of tensors.
        out_spec: Pytree structure of the result.
        results: Leaves of the result, with `TENSOR` in place of tensors.
        batched: For each input tensor, whether it has a batch dimension.
        batched_results: For each tensor of the result, whether it has a batch dimension.
        completion: Computes the loss of a call that also gives its inputs; None if there are no such inputs.
        dtypes: The dtype of each input tensor.
    """

    signature: inspect.Signature
    in_spec: pytree.TreeSpec
    values: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    results: tuple[Any, ...]
    batched: tuple[bool, ...]
    batched_results: tuple[bool, ...] = ()
    completion: Completion | None = None
    dtypes: tuple[torch.dtype, ...] = ()

    @classmethod
    def of(cls, source: Source) -> Call:
        """Determine this for the network of a source, by calling it with its example."""
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
            source.completion,
            tuple(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)),
        )

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors of a call, in the order of the signature.

        Raises:
            ExportError: The non-tensor arguments, or the dtypes of tensors, differ from those of the exported call.
        """
        if self.completion is not None:
            args, kwargs = (), self.completion.call.arguments(args, kwargs)
        try:
            given = given_parameters(self.signature, self.in_spec)
            leaves = self.in_spec.flatten_up_to(canonical(self.signature, args, kwargs, given))
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"The network was exported with other arguments than it is called with: {error}"
            ) from error
        for leaf, value in zip(leaves, self.values, strict=True):
            if value is TENSOR and not isinstance(leaf, Tensor):
                raise ExportError(f"The network was exported with a tensor where it is called with {leaf!r}.")
            if value is not TENSOR and (isinstance(leaf, Tensor) or leaf != value):
                got = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                raise ExportError(f"The network was exported with {value!r} where it is called with {got}.")
        given_tensors = [leaf for leaf, value in zip(leaves, self.values, strict=True) if value is TENSOR]
        tensors = list(map(as_captured, given_tensors, self.dtypes))
        for tensor, leaf, dtype in zip(tensors, given_tensors, self.dtypes, strict=True):
            if tensor is None:
                raise ExportError(
                    f"The network was exported for an input of {dtype} and is called with {leaf.dtype}: convert it "
                    "before the call, or give example_inputs= like those it is used with."
                )
        return [tensor for tensor in tensors if tensor is not None]

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for the tensors that `flatten` returned."""
        rest = iter(tensors)
        leaves = [next(rest) if value is TENSOR else value for value in self.values]
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        return args, kwargs

    def tensors_of(self, result: Any) -> list[Tensor]:
        """Return the tensors of a result, in order."""
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def result(self, tensors: list[Tensor], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Return the result for the tensors that `tensors_of` returned, with the loss if the call gives its inputs."""
        result = self._restored(tensors)
        if self.completion is None or self.completion.call.is_made_by(args, kwargs or {}):
            return result
        return self.completion(result, args, kwargs or {})

    def _restored(self, tensors: list[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf is TENSOR else leaf for leaf in self.results], self.out_spec)


def _signature(network: nn.Module) -> inspect.Signature:
    inner: Any = getattr(network, "network", network)  # a QuantizedNetwork takes any arguments and passes them on
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
