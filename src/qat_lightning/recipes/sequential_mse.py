"""Sequential MSE: choosing the range of each weight so that its layer best reproduces its float output.

The search of AIMET's ``apply_seq_mse`` (Qualcomm): layer by layer, in the order of the network, candidates for the
range of a weight are compared by the layer's output, on inputs from layers whose ranges were already chosen. In
contrast, ``weight_observer="mse"`` compares the weight itself, so that all errors count alike, whether inputs are large
or small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.recipes.layers import RoundedLayer, rounded_layers
from qat_lightning.recipes.sequence import Unit, units
from qat_lightning.settings.scheme import Scheme

_SHARES = torch.linspace(1.0, 0.2, 33)
"""The candidates: shares of a range."""


@dataclass(frozen=True)
class RangeSearch:
    """How much a layer's output differs from the float network's on the calibration data, relative to its mean square.

    Attributes:
        before: With the previous range.
        after: With the chosen range; never larger.
        share: Chosen share of the weight's full range, averaged over its scales.
    """

    before: float
    after: float
    share: float


def clipping(scheme: Scheme | None) -> Scheme:
    """The scheme with a weight observer that can represent a share of the range.

    Args:
        scheme: None for the default; anything other than a scheme is returned, and rejected where all settings are
            checked.

    Raises:
        ConfigurationError: The scheme asks for the full range, for all layers or some.

    Example:
        >>> clipping(Scheme()).weight_observer
        'mse'
    """
    scheme = Scheme() if scheme is None else scheme
    if not isinstance(scheme, Scheme):
        return scheme
    where = [("", scheme), *((f".overrides[{pattern!r}]", own) for pattern, own in scheme.own())]
    for name, each in where:
        if each.weight_observer == "min_max":
            raise ConfigurationError(
                f"sequential MSE chooses the share of each weight's range, and scheme{name}.weight_observer='min_max' "
                "asks for all of it: use 'auto' or 'mse', or leave sequential MSE out."
            )
    return replace(scheme, weight_observer="mse") if scheme.weight_observer == "auto" else scheme


@torch.no_grad()
def sequential_mse(
    prepared: nn.Module,
    batches: Sequence[Any],
    *,
    progress: Callable[[int, int, str, RangeSearch], None] | None = None,
) -> dict[str, RangeSearch]:
    """Choose the range of each weight by the error of its layer's output, layer by layer, in place.

    The weights do not change, only the buffer ``clip`` of each weight's FakeQuantize, which is the represented share of
    the range. Each scale chooses separately, and keeps its share if no candidate is better.

    Args:
        prepared: The network with fake-quant, prepared with ``Scheme(weight_observer="mse")``; calibrated or not.
        batches: Calls of the network, as for `qat_lightning.calibrate`, on its device. The inputs of one layer at a
            time are kept for all of them.
        progress: Called after each layer with its number from 1, the total number, its name and the result.

    Returns:
        For each layer by name, the errors before and after.

    Raises:
        ConversionError: There is no batch.
        ConfigurationError: A layer was prepared for the full range.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
        >>> recipe = Recipe("fx", "x86", Scheme(weight_bits=4), kind="static")
        >>> result = sequential_mse(get_mode("fx").prepare(network, Example((x,)), recipe), [x])["0"]
        >>> result.after <= result.before
        True
    """
    if not batches:
        raise ConversionError("Sequential MSE measures outputs: give at least one batch.")
    for layer in rounded_layers(prepared):
        if not layer.fq.clipped:
            raise ConfigurationError(
                f"{layer.name!r} was prepared for the whole range of its weight, and sequential MSE chooses a share: "
                "prepare with Scheme(weight_observer='mse')."
            )
    results: dict[str, RangeSearch] = {}
    for unit in units(prepared, batches):
        results[unit.name] = _search(unit)
        if progress is not None:
            progress(unit.number, unit.of, unit.name, results[unit.name])
    return results


def _search(unit: Unit) -> RangeSearch:
    (layer,) = unit.layers
    folded = layer.folded()
    layer.rounded()  # the first rounding chooses the share to compare with
    before = layer.fq.clip.clone()

    def errors(share: Tensor) -> Tensor:
        """For each scale, the squared error of all outputs."""
        weight, total = _rounded(layer, folded, share), torch.zeros(len(folded), dtype=torch.float64)
        for inputs, (target,) in unit.parts():
            (output,) = unit.outputs(inputs, [weight])
            total = total.to(output.device) + _sum_squares(output - target, unit.channels(output))
        return total if layer.fq.per_channel else total.sum()

    best = start = errors(before)
    chosen = before
    for share in _candidates(before):
        error = errors(share)
        chosen = torch.where(error < best, share, chosen)
        best = torch.minimum(error, best)
    layer.fq.take_share(chosen)
    size = sum(float(target.double().square().sum()) for _, (target,) in unit.parts())
    scale = max(size, torch.finfo(torch.float32).tiny)
    return RangeSearch(float(start.sum()) / scale, float(best.sum()) / scale, float(chosen.mean()))


def _sum_squares(difference: Tensor, channels: int) -> Tensor:
    """The sum of squares for each channel: of each sample in float32, of all in float64. Changes the tensor."""
    squares = difference.square_()
    if channels == 1 and squares.dim() > 2:
        return squares.flatten(2).sum(2).sum(0, dtype=torch.float64)
    return squares.flatten(0, -2).sum(0, dtype=torch.float64)


def _candidates(like: Tensor) -> Iterator[Tensor]:
    for share in _SHARES.tolist():
        yield torch.full_like(like, share)


def _rounded(layer: RoundedLayer, folded: Tensor, share: Tensor) -> Tensor:
    """The folded weight, rounded to the grid of a share of its range."""
    grid = layer.fq.grid
    low, high = grid.ends(folded)
    return grid.round(folded, *grid.qparams(low * share, high * share))
