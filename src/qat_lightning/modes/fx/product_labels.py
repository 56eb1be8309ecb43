"""The factors of ``einsum`` and similar functions, with a letter for each dimension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Terms = tuple[list[fx.Node], list[str], str]
"""The factors, a letter for each of their dimensions, and for each dimension of the result."""

_FIRST = 0x400
"""Letters that no equation uses, for dimensions without one."""


def written_by_labels(node: fx.Node) -> bool:
    """Whether `terms_of` may support a node."""
    return node.op in ("call_function", "call_method") and node.target in _BY_LABELS


def terms_of(node: fx.Node, values: Mapping[str, Any]) -> Terms | None:
    """The factors of a node; None if it is not a product of float tensors that sums over a dimension.

    Args:
        node: The call.
        values: Values of the nodes on the example.
    """
    found: Terms | None = _BY_LABELS[node.target](node, values)
    if found is None:
        return None
    factors, labels, result = found
    if len(factors) < 2 or not all(isinstance(factor, fx.Node) for factor in factors):
        return None
    tensors = [values[factor.name] for factor in factors]
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return None
    if any(tensor.dim() != len(its) for tensor, its in zip(tensors, labels, strict=True)):
        return None
    return found if _is_product(tensors, labels, result) else None


def _is_product(tensors: Sequence[Tensor], labels: Sequence[str], result: str) -> bool:
    """Whether each factor shares summed dimensions, in full, with the product of the factors before it."""
    if any(max(Counter(its).values(), default=0) > 1 for its in (*labels, result)):
        return False
    sizes: dict[str, set[int]] = {}
    for tensor, its in zip(tensors, labels, strict=True):
        for label, size in zip(its, tensor.shape, strict=True):
            sizes.setdefault(label, set()).add(size)
    have = labels[0]
    for number, its in enumerate(labels[1:], start=1):
        keep = set(result).union(*labels[number + 1 :])
        summed = [label for label in have if label in its and label not in keep]
        alone = [label for label in have + its if (label in have) != (label in its)]
        if not summed or any(len(sizes[label]) > 1 for label in summed) or not keep.issuperset(alone):
            return False
        have = "".join(dict.fromkeys(label for label in have + its if label in keep))
    return set(have) == set(result)


def _of_einsum(node: fx.Node, values: Mapping[str, Any]) -> Terms | None:
    if node.kwargs or len(node.args) < 2 or not isinstance(node.args[0], str):
        return None
    operands: Any = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        (operands,) = operands
    given, arrow, result = node.args[0].replace(" ", "").partition("->")
    parts, factors = given.split(","), _nodes(operands)
    if factors is None or len(parts) != len(factors):
        return None
    dims = [values[factor.name].dim() for factor in factors]
    rest = [dim - len(part.replace("...", "")) if "..." in part else 0 for part, dim in zip(parts, dims, strict=True)]
    most = max(rest, default=0)
    if not arrow:
        counts = Counter("".join(parts).replace(".", ""))
        alone = "".join(sorted(label for label, count in counts.items() if count == 1))
        result = ("..." if "..." in given else "") + alone
    letters = _letters(most)
    labels = [part.replace("...", letters[most - count :]) for part, count in zip(parts, rest, strict=True)]
    return factors, labels, result.replace("...", letters)


def _of_tensordot(node: fx.Node, values: Mapping[str, Any]) -> Terms | None:
    given: dict[str, Any] = dict(zip(("a", "b", "dims"), node.args, strict=False)) | node.kwargs
    factors, dims = _nodes([given.pop("a", None), given.pop("b", None)]), given.pop("dims", 2)
    if factors is None or given.pop("out", None) is not None or given:
        return None
    ranks = [values[factor.name].dim() for factor in factors]
    if isinstance(dims, int):
        dims = ([*range(ranks[0] - dims, ranks[0])], [*range(dims)])
    if not isinstance(dims, (list, tuple)) or len(dims) != 2:
        return None
    pairs = [[part] if isinstance(part, int) else part for part in dims]
    if not all(isinstance(part, (list, tuple)) and all(isinstance(dim, int) for dim in part) for part in pairs):
        return None
    letters = _letters(sum(ranks))
    first, second = list(letters[: ranks[0]]), list(letters[ranks[0] :])
    for one, other in zip(*pairs, strict=True):
        second[other] = first[one]
    kept = [label for label in (*first, *second) if (label in first) != (label in second)]
    return factors, ["".join(first), "".join(second)], "".join(kept)


def _of_inner(node: fx.Node, values: Mapping[str, Any]) -> Terms | None:
    factors = _nodes(node.args)
    if node.kwargs or factors is None or len(factors) != 2:
        return None
    ranks = [values[factor.name].dim() for factor in factors]
    if not all(ranks):
        return None
    letters = _letters(sum(ranks))
    first, second = letters[: ranks[0]], letters[ranks[0] : -1] + letters[ranks[0] - 1]
    return factors, [first, second], first[:-1] + second[:-1]


def _nodes(values: Sequence[Any]) -> list[fx.Node] | None:
    nodes = [value for value in values if isinstance(value, fx.Node)]
    return nodes if len(nodes) == len(values) else None


def _letters(count: int) -> str:
    return "".join(map(chr, range(_FIRST, _FIRST + count)))


_BY_LABELS: dict[Any, Any] = {
    torch.einsum: _of_einsum,
    torch.functional.einsum: _of_einsum,
    torch.tensordot: _of_tensordot,
    torch.inner: _of_inner,
    "inner": _of_inner,
}
