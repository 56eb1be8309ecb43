"""When two values count as equal: by SQNR if they are float, by steps of their grid if not.

A correct int8 kernel rounds to the nearest step. If the exact value is in the middle between two steps, the last bits
of a float decide, and both are correct. So a value that is one step off is judged by its distance from fake-quant's
value before rounding, and not by SQNR: one such value in a small output costs more decibels than a wrong channel in a
large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat_lightning.checks import LayerCheck
from qat_lightning.errors import VerificationError
from qat_lightning.layers.kernels import engine_of_packed, packed_weights
from qat_lightning.modes.bias_range import scales_of
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import STAND_IN, engine_here

ONE_STEP = 1.01
"""Margin in steps: a layer that is off by one step somewhere has rounded the other way, which is no fault; more is."""

MARGIN_DB = 6.0
"""By how much a correct result can be worse than the worst of a few draws by chance."""

MIDDLE = 0.1
"""How far from the middle between two steps, in steps, a kernel may still round the other way. Correct kernels of every
engine do so within 0.004; one that is a step off, truncates, or has a scale that is 1 % off does so anywhere."""


@dataclass(frozen=True)
class Grid:
    """The grid of a tensor.

    Attributes:
        scale: Size of a step.
        zero_point: The integer that represents 0.
    """

    scale: float
    zero_point: int

    def same(self, other: Grid) -> bool:
        """Whether two grids are equal, except for the last bit of a scale."""
        return self.zero_point == other.zero_point and math.isclose(self.scale, other.scale, rel_tol=1e-6)


def decibels(wanted: Tensor, got: Tensor) -> float:
    """SQNR of tensors that may differ in shape (minus infinity), or be NaN or infinite in the same places (equal).

    Example:
        >>> decibels(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
        inf
        >>> decibels(torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]))
        -inf
    """
    if wanted.shape != got.shape:
        return -math.inf
    if wanted.dtype == got.dtype == torch.float32 and not math.isnan(ratio := _in_float32(wanted, got)):
        return ratio
    wanted, got = wanted.double(), got.double()
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    finite = wanted.isfinite() & got.isfinite()
    if not bool((same | finite).all()):
        return -math.inf
    return sqnr_db(torch.where(finite, wanted, 0.0), torch.where(finite, got, 0.0))


_RIGHT_IN_FLOAT32 = (1e-20, 1e30)
"""Between these limits, an energy in float32 has six correct digits, with no relevant under- or overflow."""


def _in_float32(wanted: Tensor, got: Tensor) -> float:
    """SQNR to four digits of a decibel, in an eighth of the time of `sqnr_db`; NaN if float32 is not precise enough."""
    least, most = _RIGHT_IN_FLOAT32
    signal, noise = (float(values.square().sum()) for values in (wanted, wanted - got))
    return 10 * math.log10(signal / noise) if least < signal < most and least < noise < most else math.nan


def beyond_rounding(exact: Tensor, wanted: Tensor, got: Tensor, grid: Grid) -> float:
    """By how many steps the worst value is farther from the exact one than rounding to nearest explains.

    Args:
        exact: Fake-quant's values before rounding.
        wanted: Their integers after rounding. At an end of the grid they represent all values beyond it.
        got: Integers of the same shape.
        grid: The grid of both.

    Example:
        >>> exact, wanted, got = torch.tensor([0.5, 0.75, 9.0]), torch.tensor([0, 1, 2]), torch.tensor([1, 1, 2])
        >>> beyond_rounding(exact, wanted, got, Grid(1.0, 0))
        0.0
        >>> beyond_rounding(exact, wanted, torch.tensor([1, 0, 2]), Grid(1.0, 0))
        0.25
    """
    off = wanted != got
    if not bool(off.any()):
        return 0.0
    rounded = wanted[off].double()
    position = exact[off].double() / grid.scale + grid.zero_point
    position = torch.minimum(torch.maximum(position.nan_to_num(), rounded - 0.5), rounded + 0.5)
    return max(0.0, float((got[off] - position).abs().max()) - 0.5)


def bias_rounding(layer: Any, in_scale: float, out_scale: float, target: Backend) -> float:
    """By how many steps of its output a layer may be off because QNNPACK stores its bias as an integer.

    Args:
        layer: Torch's quantized layer, or anything else.
        in_scale: Scale of its input.
        out_scale: Scale of its output.
        target: The backend.
    """
    if engine_here(target.engine) != STAND_IN or not callable(getattr(layer, "weight", None)):
        return 0.0
    if STAND_IN not in {engine_of_packed(packed, target.engine) for *_, packed in packed_weights(layer)}:
        return 0.0
    return 0.5 * in_scale * float(scales_of(layer.weight()).max()) / out_scale


def compare_integers(
    name: str, op: str, exact: Tensor, wanted: Tensor, got: Tensor, *, allowed: Callable[[], float] = lambda: 0.0
) -> LayerCheck:
    """Compare two of torch's quantized tensors on one grid.

    Args:
        name: The layer.
        op: The op that ran.
        exact: Fake-quant's values before rounding.
        wanted: Fake-quant's values after rounding.
        got: The values of the kernel.
        allowed: Number of additional steps that are no fault; called only if there would be one.

    Returns:
        The row, with its fault if there is one.
    """
    if wanted.shape != got.shape:
        return LayerCheck(name, op, -math.inf, math.inf, f"its shape is {tuple(got.shape)}, not {tuple(wanted.shape)}")
    one, other = wanted.int_repr(), got.int_repr()
    if torch.equal(one, other):
        return LayerCheck(name, op, math.inf, 0.0)
    one, other = one.int(), other.int()
    grid = Grid(got.q_scale(), got.q_zero_point())
    ratio = decibels((one - grid.zero_point).float(), (other - grid.zero_point).float())
    steps = float((one - other).abs().max())
    beyond = beyond_rounding(exact, one, other, grid)
    fault = ""
    if beyond > MIDDLE and beyond > MIDDLE + allowed():
        share = float((one != other).double().mean())
        fault = f"{share:.2%} of its values are up to {steps:.0f} steps apart, {beyond:.1f} more than rounding explains"
    return LayerCheck(name, op, ratio, steps, fault)


def is_faulty(check: LayerCheck, target: Backend) -> bool:
    """Whether a layer exceeds the tolerance by more than single roundings of a small output."""
    least = min(target.tolerance_db, check.chance_db - MARGIN_DB)
    return bool(check.fault) or (check.sqnr_db < least and not check.max_steps <= ONE_STEP)


@dataclass(frozen=True)
class Names:
    """Names of layers in messages, and in the ``exclude`` that they suggest.

    Attributes:
        prefix: The network's name in the LightningModule, to which ``exclude`` is relative.
        modules: The names of the float network's modules.
        feeding: The nearest layers before an op, by the op's name.
    """

    prefix: str = ""
    modules: Collection[str] = ()
    feeding: Callable[[str], Sequence[str]] = lambda name: ()

    def layers(self, name: str) -> tuple[str, ...]:
        """A layer; for an op, the op and the layers before it."""
        return (name,) if name in self.modules else (name, *self.feeding(name))

    def excluding(self, names: Sequence[str]) -> str:
        """The ``exclude`` that leaves these layers float; empty if there is none."""
        paths = [".".join(filter(None, (self.prefix, name))) for name in names if name in self.modules]
        return f"exclude={paths}" if paths and all(paths) else ""


def raise_if_faulty(
    checks: Sequence[LayerCheck],
    target: Backend,
    names: Names = Names(),  # frozen
    wanted: str = "fake-quant computed in training",
) -> None:
    """Raise an error for the worst layer that exceeds the tolerance of ``target`` by more than a rounding.

    Args:
        checks: The rows.
        target: The backend.
        names: Names of the layers.
        wanted: The reference, for the message.

    Raises:
        VerificationError: A layer exceeds the tolerance.
    """
    faulty = sorted((check for check in checks if is_faulty(check, target)), key=lambda check: check.sqnr_db)
    if not faulty:
        return
    worst = faulty[0]
    apart = "" if math.isnan(worst.max_steps) else f", up to {worst.max_steps:.0f} steps apart"
    found = f"{worst.sqnr_db:.1f} dB of SQNR on the same input{apart}"
    least = f", where {target.tolerance_db:.0f} dB is the least for backend {target.name!r}"
    if worst.sqnr_db >= target.tolerance_db:
        found, least = worst.fault, f" ({worst.sqnr_db:.1f} dB of SQNR on the same input, backend {target.name!r})"
    layers = tuple(dict.fromkeys(name for check in faulty for name in names.layers(check.name)))
    remedy = names.excluding(names.layers(worst.name))
    if remedy and worst.name not in names.modules:
        remedy += ", the layers around it"
    raise VerificationError(
        f"Layer {worst.name!r} does not compute in int8 what {wanted}: {found}{least}. Its kernel is {worst.op}. "
        f"{len(faulty)} of {len(checks)} layers exceed the tolerance. What to do: "
        f"{f'{remedy}, or another backend' if remedy else 'another backend, or another mode'}.",
        layers,
        checks,
    )
