"""The loss of a network whose file has no labels among its inputs: a metric of the LightningModule may need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ExportError
from qat_lightning.graph.example import Example
from qat_lightning.graph.inference_call import OUTPUT, InferenceCall, makes_none, output_leaves, place_of
from qat_lightning.modes.structured_tracer import makes_container


@dataclass(frozen=True)
class Completion:
    """Computes what a network returns with labels from what its file returns without them, in PyTorch.

    Attributes:
        call: The call that the file supports.
        rest: From the result of that call and the inputs to the whole result; None if the loss needs other values.
        order: For each tensor of the file's result, the name of the input of ``rest`` that takes it.
        unflatten: Restores the structure of the whole result.
    """

    call: InferenceCall
    rest: fx.GraphModule | None
    order: tuple[str, ...]
    unflatten: Callable[[Any], Any]

    @classmethod
    def of(cls, quantized: QuantizedNetwork, example: Example) -> Completion | None:
        """That of an int8 network.

        Args:
            quantized: The network.
            example: A call of it.

        Returns:
            None if it has no inputs that only its loss reads. A loss is a single number: where other inputs add results
            for each sample, the file has them too.
        """
        network: Any = quantized.network
        call: InferenceCall | None = getattr(network, "inference_call", None)
        if call is None or call.is_made_by(example.args, example.kwargs):
            return None
        results = [leaf for leaf in tree_leaves(quantized(*example.args, **example.kwargs)) if isinstance(leaf, Tensor)]
        kept = {place_of(node) for node in call.outputs.find_nodes(op="placeholder")}
        if any(leaf.numel() != 1 for place, leaf in enumerate(results) if place not in kept):
            return None
        root, flat = (network, False) if call.spec is None else (network.decomposed, True)
        rest = None if call.rest is None or not _has_all(root, call.rest) else fx.GraphModule(root, call.rest)
        leaves = output_leaves(call.outputs.output_node().args[0], makes_none if flat else makes_container)
        order = tuple(f"{OUTPUT}{place_of(node)}" for node in leaves)
        return cls(call, rest, order, network.spec.unflatten if flat else _as_it_is)

    @torch.no_grad()
    def __call__(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The whole result.

        Args:
            result: What the file returned.
            args: Positional inputs of the network.
            kwargs: Keyword inputs.

        Raises:
            ExportError: The loss needs values from within the network.
        """
        names = ", ".join(self.call.without)
        if self.rest is None:
            raise ExportError(
                f"The file is for inference and has no {names} among its inputs, and the loss cannot be computed from "
                "what it returns: call it without."
            )
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = self.call.named(args, kwargs) | dict(zip(self.order, tensors, strict=True))
        wanted = [str(node.target) for node in self.rest.graph.find_nodes(op="placeholder")]
        return self.unflatten(self.rest(**{name: given[name] for name in wanted}))


def _has_all(root: nn.Module, graph: fx.Graph) -> bool:
    """Whether a module has all that a graph reads: in mode pt2e the int8 network has tensors under other names."""
    wanted = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    named = (root.named_modules(), root.named_parameters(), root.named_buffers())
    return wanted <= {name for each in named for name, _ in each}


def _as_it_is(result: Any) -> Any:
    return result
