"""Comparing an artifact with fake-quant, output by output, so that a small wrong output is not hidden by a large one.

How close a runtime can be depends on the network, which may amplify small differences. If an output is not close, the
reference is therefore compared with itself, with its inputs changed by less than a step of an 8-bit grid. An artifact
need not be closer than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.graph.example import Example, call_apart
from qat_lightning.measure.metrics import outputs_by_path

DRAWS = 2
MARGIN_DB = 6.0
"""Tolerance in dB below the worst draw, for random variation of a correct artifact."""

MARGIN_SHARE = 0.1
"""The same for the share of equal integers."""

CHANCE = 0.05
"""Significance level: a difference counts as a fault if so many unequal rows are less likely than this."""

_DISTURBANCE = 1e-3
_EQUAL = 1e-6  # float32 rounding differences from another order of summation


class Comparison:
    """Accumulates the differences between outputs and those of a reference, over batches.

    Attributes:
        others: Outputs that only one side has, or whose shapes differ, by path in the result.

    Example:
        >>> found = Comparison()
        >>> found.update({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.tensor([1.0, 1.1])})
        >>> {path: round(ratio, 1) for path, ratio in found.sqnr_db.items()}
        {"['a']": inf, "['b']": 23.0}
    """

    def __init__(self) -> None:
        self.others: set[str] = set()
        self._energies: dict[str, tuple[float, float]] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    def update(self, reference: Any, actual: Any) -> None:
        """Add the results of one call."""
        wanted, got = outputs_by_path(reference), outputs_by_path(actual)
        for path in wanted.keys() | got.keys():
            if path not in wanted or path not in got or wanted[path].shape != got[path].shape:
                self.others.add(path)
            elif wanted[path].is_floating_point() or wanted[path].is_complex():
                before = self._energies.get(path, (0.0, 0.0))
                signal, noise = _energies(wanted[path], got[path])
                self._energies[path] = before[0] + signal, before[1] + noise
            else:
                equal, count = self._counts.get(path, (0, 0))
                same = int((wanted[path] == got[path]).sum())
                self._counts[path] = equal + same, count + wanted[path].numel()

    @property
    def sqnr_db(self) -> dict[str, float]:
        """SQNR in dB of each float output that could be compared."""
        return {path: _decibels(*energies) for path, energies in sorted(self._energies.items())}

    @property
    def equal(self) -> dict[str, float]:
        """Share of equal elements of each integer or bool output."""
        return {path: equal / count for path, (equal, count) in sorted(self._counts.items()) if count}


def too_few_equal(equal: int, rows: int, least: float) -> bool:
    """Whether the share of equal rows is significantly below ``least``.

    For example, 2 of 270 rows differ, which is 99.26 % equal rows. If 99.5 % were equal in the long run, as many would
    differ in 40 % of all samples of this size, so this is no evidence of a fault. The test is exact (binomial,
    one-sided).

    Args:
        equal: Number of equal rows.
        rows: Number of rows.
        least: The required share, from 0 to 1.

    Example:
        >>> too_few_equal(268, 270, least=0.995), too_few_equal(26800, 27000, least=0.995)
        (False, True)
    """
    different, rate = rows - equal, 1 - least
    if different <= rows * rate:
        return False
    if rate <= 0 or different > 60 + 2 * rows * rate:  # far beyond chance: no need to compute the sum
        return True
    known = math.lgamma(rows + 1)
    fewer = (
        math.exp(
            known
            - math.lgamma(count + 1)
            - math.lgamma(rows - count + 1)
            + count * math.log(rate)
            + (rows - count) * math.log1p(-rate)
        )
        for count in range(different)
    )
    return 1 - math.fsum(fewer) < CHANCE


class Judgement(NamedTuple):
    """Whether an artifact computes the same as its reference.

    Attributes:
        wrong: What is wrong with it; empty if nothing is.
        remark: Which outputs were accepted below the limit that was asked for, and from which value; mostly empty.
    """

    wrong: str = ""
    remark: str = ""


def judge(
    found: Comparison, reference: nn.Module, calls: Sequence[Example], *, min_sqnr_db: float, min_equal: float
) -> Judgement:
    """Judge an artifact by its outputs.

    Args:
        found: Its outputs compared with the reference's.
        reference: The reference, compared with itself if an output is not close enough.
        calls: The calls on which they were compared.
        min_sqnr_db: Required SQNR of float outputs.
        min_equal: Required share of equal elements of integer outputs.
    """
    asked = _far(found, [], min_sqnr_db, min_equal)
    if not asked:
        return Judgement()
    draws = [_disturbed(reference, calls, seed) for seed in range(DRAWS)]
    far = _far(found, draws, min_sqnr_db, min_equal)
    if far:
        return Judgement(
            f"{_listed(far)}. Changing the inputs by a thousandth moves the network itself less than that, so rounding "
            "does not explain it (min_sqnr_db)"
        )
    used = {path: _limit(path, found, draws, min_sqnr_db, min_equal) for path in asked}
    return Judgement(
        remark=f"{_listed(asked)}; accepted, because changing the inputs by a thousandth moves the network itself as "
        f"much: the limit used is {', '.join(dict.fromkeys(used.values()))}"
    )


def problem(
    found: Comparison, reference: nn.Module, calls: Sequence[Example], *, min_sqnr_db: float, min_equal: float
) -> str:
    """Return what is wrong with an artifact, see `judge`; empty if nothing is."""
    return judge(found, reference, calls, min_sqnr_db=min_sqnr_db, min_equal=min_equal).wrong


def _listed(outputs: Mapping[str, str]) -> str:
    return "; ".join(f"{path or 'the output'}: {how}" for path, how in outputs.items())


def _far(found: Comparison, draws: Sequence[Comparison], min_sqnr_db: float, min_equal: float) -> dict[str, str]:
    """Return the outputs that are not close enough, with the differences."""
    far = {
        path: "of another shape than fake-quant's"
        for path in sorted(found.others)
        if not any(path in draw.others for draw in draws)
    }
    for path, ratio in found.sqnr_db.items():
        least = _least_db(path, draws, min_sqnr_db)
        if ratio < least:
            far[path] = f"{ratio:.1f} dB of SQNR, where at least {least:.1f} dB are required"
    for path, share in found.equal.items():
        least = _least_share(path, draws, min_equal)
        if share < least:
            far[path] = f"{share:.1%} of the integers are equal, where at least {least:.1%} is required"
    return far


def _limit(path: str, found: Comparison, draws: Sequence[Comparison], min_sqnr_db: float, min_equal: float) -> str:
    """Return the limit for an output that the disturbed network sets, as text."""
    if path in found.sqnr_db:
        return f"{_least_db(path, draws, min_sqnr_db):.1f} dB"
    return f"{_least_share(path, draws, min_equal):.1%}" if path in found.equal else "none for shapes"


def _least_db(path: str, draws: Sequence[Comparison], min_sqnr_db: float) -> float:
    return min([min_sqnr_db, *(draw.sqnr_db.get(path, math.inf) - MARGIN_DB for draw in draws)])


def _least_share(path: str, draws: Sequence[Comparison], min_equal: float) -> float:
    return min([min_equal, *(draw.equal.get(path, 1.0) for draw in draws)]) - MARGIN_SHARE


@torch.no_grad()
def _disturbed(reference: nn.Module, calls: Sequence[Example], seed: int) -> Comparison:
    """Compare the reference with itself on slightly changed inputs."""
    generator = torch.Generator().manual_seed(seed)

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf * (1 + _DISTURBANCE * torch.randn(leaf.shape, generator=generator).to(leaf))

    found = Comparison()
    for call in calls:
        args, kwargs = tree_map(changed, (call.args, call.kwargs))
        found.update(call_apart(reference, call), reference(*args, **kwargs))
    return found


def _energies(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """Return the energy of the reference and of the difference; equal infinities, as in masks, count as equal."""
    wanted, got = (_plain(tensor) for tensor in (wanted, got))
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    same |= (wanted - got).abs() <= _EQUAL
    signal = torch.where(same & ~wanted.isfinite(), 0.0, wanted)
    noise = torch.where(same, 0.0, wanted - got)
    return float(signal.square().sum()), float(noise.square().sum())


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if not math.isfinite(noise) or not math.isfinite(signal) or signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)
