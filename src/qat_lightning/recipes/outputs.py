"""Choosing the tensors of a network's output that distillation compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import ConfigurationError
from qat_lightning.measure.metrics import class_axis as find_axis

Loss = Literal["kl", "mse"]
LOSSES: tuple[Loss, ...] = ("kl", "mse")

_SCORES = "logits"


def chosen_outputs(
    outputs: Any, chosen: Sequence[str] | None, loss: Loss, inputs: Any = (), class_axis: int | None = None
) -> list[Tensor]:
    """The tensors of a network's output to compare.

    Args:
        outputs: The network's output: a tensor, or a mapping, sequence or object of tensors.
        chosen: Keys, positions or attributes; None for all that the loss can compare. In a mapping (such as a
            ``ModelOutput`` of transformers), class scores are then the entries with ``logits`` in their name, if there
            are any.
        loss: ``"kl"`` needs an axis of classes, see `qat_lightning.measure.metrics.class_axis`.
        inputs: The inputs of the network.
        class_axis: The class axis, if it is known.

    Raises:
        ConfigurationError: There are none, or a chosen one does not exist or has no classes.

    Example:
        >>> import torch
        >>> [t.shape for t in chosen_outputs({"logits": torch.zeros(2, 5), "state": torch.zeros(2, 8)}, None, "kl")]
        [torch.Size([2, 5])]
    """

    def comparable(output: Any) -> bool:
        if not isinstance(output, Tensor):
            return False
        if loss == "kl":
            return find_axis(output, inputs, class_axis) is not None
        return output.is_floating_point()

    if chosen is None:
        found = [leaf for leaf in _candidates(outputs, loss) if comparable(leaf)]
        if not found:
            raise ConfigurationError(
                "Distillation finds no class scores in the output of the network (a floating-point tensor (N, "
                "classes, ...) with two classes or more): use loss='mse' for other outputs, class_axis= where the "
                "classes are along another axis, or weight=0 and features=[...]."
            )
        return found
    tensors = []
    for name in chosen:
        output = _pick(outputs, name)
        if not comparable(output):
            raise ConfigurationError(
                f"outputs={list(chosen)} of Distillation: {name!r} is not "
                + ("a tensor of scores (N, classes, ...)." if loss == "kl" else "a floating tensor.")
                + f" The network returns {_describe(outputs)}."
            )
        tensors.append(output)
    return tensors


def _candidates(outputs: Any, loss: Loss) -> list[Any]:
    if isinstance(outputs, Mapping):
        if loss == "kl":
            named = [value for key, value in outputs.items() if _SCORES in str(key) and isinstance(value, Tensor)]
            if named:
                return named
        outputs = {key: value for key, value in outputs.items() if not _is_loss(key, value)}
    return tree_leaves(outputs)


def _is_loss(key: Any, value: Any) -> bool:
    """Whether an entry is a loss that the network computed from outputs and labels."""
    return key == "loss" and isinstance(value, Tensor) and value.dim() == 0


def _pick(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, Sequence) and name.isdecimal():
        return outputs[int(name)] if int(name) < len(outputs) else None
    return getattr(outputs, name, None)


def _describe(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, outputs))}"
    if isinstance(outputs, Sequence):
        return f"a {type(outputs).__name__} of {len(outputs)}"
    return f"a {type(outputs).__name__}"
