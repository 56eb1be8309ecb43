"""AdaRound: learning for each weight whether to round up or down, so that each layer reproduces its float output.

Nagel et al., 2020, "Up or down? Adaptive rounding for post-training quantization", https://arxiv.org/abs/2004.10568:
reconstruction with the rectified sigmoid (equations 21 to 25), on inputs from layers that are already rounded. With
blocks, as in BRECQ (Li et al., 2021, https://arxiv.org/abs/2102.05426), the layers of a block are learned together so
that the block reproduces its output; all errors of the output count alike, without the Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.recipes.blocks import blocks_of
from qat_lightning.recipes.rounding import Rounding
from qat_lightning.recipes.sequence import Unit, float_copy, plain_weight, units


@dataclass(frozen=True)
class AdaRound:
    """Settings of `adaround`.

    Args:
        iterations: Steps for each layer or block.
        batch_size: Number of samples per step.
        learning_rate: Learning rate of Adam.
        regularization: Weight of the term that pulls each weight to one of its two grid points.
        warm_up: Share of the iterations before that term is enabled.
        blocks: ``"none"``: each layer is learned by itself. ``"auto"``: the layers of each residual block, or of each
            other submodule that is repeated, are learned together; see `qat_lightning.recipes.blocks.found_blocks`. Or
            the names of such submodules, relative to the LightningModule. A step of a block takes one calibration batch
            instead of ``batch_size`` samples.

    Raises:
        ConfigurationError: A value is invalid.

    Example:
        >>> AdaRound(iterations=500).iterations
        500
    """

    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 0.01
    regularization: float = 0.01
    warm_up: float = 0.2
    blocks: Literal["none", "auto"] | Sequence[str] = "none"

    def __post_init__(self) -> None:
        """Reject invalid values."""
        for name in ("iterations", "batch_size"):
            value: Any = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"adaround.{name}={value!r} is not valid: give an integer of at least 1.")
        for name in ("learning_rate", "regularization", "warm_up"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "learning_rate" and value == 0):
                raise ConfigurationError(f"adaround.{name}={value!r} is not valid: give a number above 0.")
        if self.warm_up >= 1:
            raise ConfigurationError(f"adaround.warm_up={self.warm_up!r} is not valid: give a share below 1.")
        self._check_blocks()

    def _check_blocks(self) -> None:
        given = self.blocks
        if given in ("none", "auto"):
            return
        names = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigurationError(
                f"adaround.blocks={given!r} is not valid: use 'none', 'auto', or a list of names of submodules, "
                "like ['net.layer1.0', 'net.layer1.1']."
            )
        object.__setattr__(self, "blocks", names)


@dataclass(frozen=True)
class Reconstruction:
    """How much the output of a layer or block differs from the float network's, on the calibration data.

    Both errors are mean squares, relative to the mean square of the float network's output.

    Attributes:
        nearest: With weights rounded to nearest.
        learned: With the rounding that is in use now; never larger.
        flipped: Share of the weights that are not rounded to nearest now.
    """

    nearest: float
    learned: float
    flipped: float


def adaround(
    prepared: nn.Module,
    batches: Sequence[Any],
    settings: AdaRound | None = None,
    *,
    progress: Callable[[int, int, str, Reconstruction], None] | None = None,
) -> dict[str, Reconstruction]:
    """Learn for each weight whether it is rounded up or down, layer by layer or block by block, in place.

    The weights are moved to the learned grid points, so that rounding to nearest, in the network and in conversion,
    returns these points; the grid does not change. A layer or block that does not improve is left unchanged.

    Args:
        prepared: The network with fake-quant, calibrated or not.
        batches: Calls of the network, as for `qat_lightning.calibrate`, on its device. The inputs of one layer or block
            at a time are kept for all of them.
        settings: See `AdaRound`.
        progress: Called after each layer or block with its number from 1, the total number, its name and the result.

    Returns:
        For each layer and block by name, the errors before and after.

    Raises:
        ConversionError: There is no batch.
        ConfigurationError: A name in ``blocks`` is invalid; raised before anything is learned.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.registry import get_mode
        >>> from qat_lightning.settings.recipe import Recipe
        >>> network, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
        >>> prepared = get_mode("fx").prepare(network, Example((x,)), Recipe("fx", "x86", kind="static"))
        >>> result = adaround(prepared, [x], AdaRound(iterations=50))["0"]
        >>> result.learned <= result.nearest
        True
    """
    if not batches:
        raise ConversionError("AdaRound needs data: give at least one batch.")
    settings = settings or AdaRound()
    results: dict[str, Reconstruction] = {}
    prefix = prepared_state(prepared).prefix
    blocks = blocks_of(float_copy(prepared), batches[0], settings.blocks, prefix)
    for unit in units(prepared, batches, blocks):
        results[unit.name] = _learn(unit, settings)
        if progress is not None:
            progress(unit.number, unit.of, unit.name, results[unit.name])
    return results


def _learn(unit: Unit, settings: AdaRound) -> Reconstruction:
    """Optimize equation 25 of the paper, and keep the result if it is better than rounding to nearest."""
    roundings = [Rounding(layer) for layer in unit.layers]
    variables = [rounding.variable.clone().requires_grad_() for rounding in roundings]
    optimizer = torch.optim.Adam(variables, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(0)
    warm = int(settings.warm_up * settings.iterations)
    with torch.enable_grad():
        for step in range(settings.iterations):
            inputs, targets = unit.draw(settings.batch_size, generator)
            shares = [rounding.share(variable) for rounding, variable in zip(roundings, variables, strict=True)]
            weights = [rounding.weight(share) for rounding, share in zip(roundings, shares, strict=True)]
            loss = unit.distance(unit.outputs(inputs, weights), targets)
            if step >= warm:
                done = (step - warm) / max(1, settings.iterations - warm)
                beta = 2 + (20 - 2) * 0.5 * (1 + math.cos(math.pi * done))
                for rounding, share in zip(roundings, shares, strict=True):
                    decided = 1 - (2 * share - 1).abs().pow(beta)
                    loss = loss + settings.regularization * torch.where(rounding.fixed, 0.0, decided).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _keep_if_better(unit, roundings, [variable.detach() for variable in variables])


@torch.no_grad()
def _keep_if_better(unit: Unit, roundings: list[Rounding], variables: list[Tensor]) -> Reconstruction:
    nearest = unit.error([rounding.nearest for rounding in roundings])
    before = [layer.module.weight.detach().clone() for layer in unit.layers]
    for layer, rounding, variable, weight in zip(unit.layers, roundings, variables, before, strict=True):
        layer.module.weight.copy_(plain_weight(rounding.final(variable), layer, weight))
    # Read back, because the network and its conversion will use the stored weights.
    stored = [layer.rounded() for layer in unit.layers]
    learned = unit.error(stored)
    if not learned < nearest:
        for layer, weight in zip(unit.layers, before, strict=True):
            layer.module.weight.copy_(weight)
            layer.rounded()
        return Reconstruction(nearest, nearest, 0.0)
    moved = [
        ((weight - rounding.nearest).abs() > 0.5 * rounding.scale).flatten()
        for weight, rounding in zip(stored, roundings, strict=True)
    ]
    return Reconstruction(nearest, learned, float(torch.cat(moved).float().mean()))
