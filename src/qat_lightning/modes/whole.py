"""The comparison of the whole network, which sees what no comparison of single layers can: two grids for one tensor.

Int8 is compared with fake-quant, and fake-quant with itself, its values disturbed by a millionth. A network can be
right and far from fake-quant, where it makes much of little: then it is as far from itself.
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
"""A network that is this close to fake-quant needs no further look."""

DRAWS = 3

_MAY_DIFFER = 0.02
"""The share of an output of integers that may differ, whatever the draws are."""

_DISTURBANCE = 1e-6


class Disturbance:
    """Random relative changes of values by a millionth.

    Args:
        seed: Which draw.

    Example:
        >>> x = torch.tensor([1.0, 1000.0])
        >>> changed = Disturbance(0)(x)
        >>> bool(torch.allclose(x, changed, rtol=1e-5)), torch.equal(x, changed)
        (True, False)
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Any) -> Any:
        """``value`` if it is no float tensor, else a changed copy."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        # Uniform, with this standard deviation: drawn and applied in two passes over the memory.
        around = math.sqrt(3) * _DISTURBANCE
        factors = torch.empty(value.shape, dtype=value.dtype).uniform_(1 - around, 1 + around, generator=self.generator)
        return factors.mul_(value)


Way = Callable[[Disturbance], Any]
"""What fake-quant returns once more, disturbed in some way."""


def check_whole(expected: Any, actual: Any, ways: Sequence[Way]) -> WholeCheck | None:
    """Compare the outputs of an int8 network with fake-quant's.

    Args:
        expected: What fake-quant returns, tensors in any structure.
        actual: What int8 returns.
        ways: Tried in their order, draw by draw, as long as the network is not right: more draws leave nothing that
            is right wrong.

    Returns:
        The row of the output that is farthest from what the draws explain (`is_right` judges it); None if there is no
        output to compare. One whose shape differs is right if disturbing alone changes its shape as well.
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
    """Whether an output is close, or no farther from fake-quant than fake-quant from itself."""
    return row.sqnr_db >= row.enough_db or (bool(row.draws) and _margin(row) >= -MARGIN_DB)


def _margin(row: WholeCheck) -> float:
    """How much better it is than the worst draw; without draws, than what is close enough."""
    least = min(row.draws, default=row.enough_db)
    # A shape that changes is minus infinity on both sides.
    return 0.0 if row.sqnr_db == least else row.sqnr_db - least


def _ratio(wanted: Tensor, got: Tensor) -> float:
    """Decibels of two outputs; of integers, where the share of those that differ stands for the noise.

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
    """From where on an output is right; of integers, a few may differ.

    Two values that are close change places in an argmax where one of them is rounded the other way.
    """
    if wanted.is_floating_point():
        return ENOUGH_DB
    return -10 * math.log10(min(1.0, max(_MAY_DIFFER, 1.01 / max(1, wanted.numel()))))


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, by where they are in it; complex ones apart.

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
    """Raise for a network whose layers are right and which is not.

    Args:
        row: Of its worst output.
        suspects: Where the difference begins.
        checks: Of the layers.
        names: Of the layers.
        wanted: What it is compared with, for the message.

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
