"""Comparing the whole network, which finds faults that no single layer shows, such as two grids for one tensor.

Int8 is compared with fake-quant, and fake-quant with itself under disturbances of a millionth. A correct network can be
far from fake-quant if it amplifies small differences: then fake-quant is as far from its own disturbed runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import SequenceKey, keystr, tree_flatten_with_path, tree_leaves

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import VerificationError
from qat_lightning.graph.structures import look_into
from qat_lightning.modes.judging import MARGIN_DB, Names, decibels

ENOUGH_DB = 50.0
"""SQNR from which on a network is correct without further comparison."""

DRAWS = 3

_MAY_DIFFER = 0.02
"""Share of the values of an integer output that may differ in any case."""

_DISTURBANCE = 1e-6


class Disturbance:
    """Random relative changes of values by a millionth.

    Args:
        seed: Seed of the draw.

    Example:
        >>> x = torch.tensor([1.0, 1000.0])
        >>> changed = Disturbance(0)(x)
        >>> bool(torch.allclose(x, changed, rtol=1e-5)), torch.equal(x, changed)
        (True, False)
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Any) -> Any:
        """A disturbed copy of a float tensor; any other value itself."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        # Uniform with this standard deviation: two passes over the memory.
        around = math.sqrt(3) * _DISTURBANCE
        factors = torch.empty(value.shape, dtype=value.dtype).uniform_(1 - around, 1 + around, generator=self.generator)
        return factors.mul_(value)


Way = Callable[[Disturbance], Any]
"""Computes the result of fake-quant again, with some disturbance."""


def check_whole(expected: Any, actual: Any, ways: Sequence[Way]) -> WholeCheck | None:
    """Compare the outputs of an int8 network with those of fake-quant.

    Args:
        expected: The result of fake-quant, tensors in any structure.
        actual: The result of int8.
        ways: Tried in order, draw by draw, until the network is found correct: more draws never make a correct network
            fail.

    Returns:
        The row of the output that is farthest from what the draws explain (see `is_right`); None if there is no output
        to compare. An output whose shape differs is correct if a disturbance alone changes its shape as well.
    """
    wanted, got = outputs_of(expected), outputs_of(actual)
    if wanted.keys() != got.keys():
        others = sorted(wanted.keys() ^ got.keys())
        return WholeCheck(-math.inf, (), others[0])
    rows = [WholeCheck(_ratio(wanted[path], got[path]), (), path, _enough(wanted[path])) for path in wanted]
    if not rows:
        return None
    draws: list[dict[str, Tensor]] = []
    for way, seed in product(ways, range(DRAWS)):
        if all(is_right(row) for row in rows):
            break
        draws.append(outputs_of(way(Disturbance(seed))))
        rows = [
            replace(row, draws=tuple(_ratio(wanted[row.output], d[row.output]) for d in draws if row.output in d))
            for row in rows
        ]
    return min(rows, key=lambda row: (is_right(row), _margin(row)))


def is_right(row: WholeCheck) -> bool:
    """Whether an output is close to fake-quant, or no farther from it than fake-quant from its disturbed runs."""
    return row.sqnr_db >= row.enough_db or (bool(row.draws) and _margin(row) >= -MARGIN_DB)


def _margin(row: WholeCheck) -> float:
    """By how much it is better than the worst draw; without draws, than the SQNR that is enough."""
    least = min(row.draws, default=row.enough_db)
    # If the shape changes in both, both are minus infinity.
    return 0.0 if row.sqnr_db == least else row.sqnr_db - least


def _ratio(wanted: Tensor, got: Tensor) -> float:
    """SQNR of two outputs; for integers, the share of differing values takes the place of the noise.

    Example:
        >>> _ratio(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4])), _ratio(torch.zeros(2), torch.zeros(2).int())
        (inf, -inf)
        >>> round(_ratio(torch.arange(10), torch.arange(10).clamp(max=8)), 1)
        10.0
    """
    if wanted.is_floating_point() and got.is_floating_point():
        return decibels(wanted, got)
    if wanted.dtype != got.dtype or wanted.shape != got.shape:
        return -math.inf
    differ = float((wanted != got).double().mean()) if wanted.numel() else 0.0
    return -10 * math.log10(differ) if differ else math.inf


def _enough(wanted: Tensor) -> float:
    """SQNR from which on an output is correct; for integers, a few values may differ.

    In an argmax, two close values can swap places if one of them is rounded the other way.
    """
    if wanted.is_floating_point():
        return ENOUGH_DB
    return -10 * math.log10(min(1.0, max(_MAY_DIFFER, 1.01 / max(1, wanted.numel()))))


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, by their paths in it, without complex ones.

    Example:
        >>> sorted(outputs_of({"logits": torch.zeros(2), "count": 3, "both": [torch.ones(1), torch.zeros(0)]}))
        ["['both'][0]", "['both'][1]", "['logits']"]
    """
    look_into(result)
    try:
        leaves, _ = tree_flatten_with_path(result)
    except ValueError:  # a class that was registered without names for its parts
        leaves = [((SequenceKey(index),), leaf) for index, leaf in enumerate(tree_leaves(result))]
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_complex()}


def raise_if_wrong(
    row: WholeCheck,
    suspects: Sequence[str],
    checks: Sequence[LayerCheck],
    names: Names,
    wanted: str = "fake-quant computed in training",
) -> None:
    """Raise an error for a network that is wrong as a whole although its layers are correct.

    Args:
        row: The row of its worst output.
        suspects: The layers where the difference begins.
        checks: Checks of the layers.
        names: Names of the layers.
        wanted: The reference, for the message.

    Raises:
        VerificationError: Always.
    """
    classes = row.enough_db != ENOUGH_DB
    found, *drawn = (f"{1 - 10 ** (-db / 10):.1%}" if classes else f"{db:.1f}" for db in (row.sqnr_db, *row.draws))
    unit = " equal values" if classes else " dB"
    draws = ", ".join(drawn)
    itself = f"a disturbance of a millionth gives {draws}{unit}" if draws else "its outputs are others"
    where = f" in its output {row.output}" if row.output else ""
    begins = f" The difference begins at {', '.join(map(repr, suspects))}." if suspects else ""
    remedy = names.excluding(suspects)
    raise VerificationError(
        f"The int8 network as a whole does not compute what {wanted}, although each of its layers does: "
        f"{found}{unit if classes else ' dB of SQNR'}{where}, where {itself}. The fault is between the layers, for "
        f"example two grids for one tensor.{begins} What to do: "
        f"{f'{remedy}, or another mode' if remedy else 'another mode'}.",
        suspects,
        checks,
    )
