"""The entry point of all modes: checks the settings, and calls the mode's implementation."""

from __future__ import annotations

from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.other_quantization import refuse_other_quantization
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.uncalibrated.adapters import of_inner_network, refuse_adapters, whole
from qat_lightning.modes.uncalibrated.eager import Shares
from qat_lightning.settings.backends import require
from qat_lightning.settings.kinds import DIRECT, check_kind
from qat_lightning.settings.recipe import Recipe


def quantize(
    network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "", shares: Shares | None = None
) -> Converted:
    """Quantize a float network without training or calibration.

    Every layer of the result is compared with its reference on ``example``: a dynamic one with the same rounding in
    float64, a weight-only one with the float layer with dequantized weights.

    Args:
        network: The float network; not changed.
        example: One call, of any batch size.
        recipe: Kind (``"dynamic"`` or ``"weight_only"``), mode, backend and scheme.
        prefix: The network's dotted name in the LightningModule, to which the recipe's globs are relative.
        shares: The shares of clipped ranges that training chose; None for a network that was not trained with
            fake-quant.

    Returns:
        The integer network on the CPU in evaluation, with coverage, checks and notes.

    Raises:
        ConfigurationError: The mode and backend do not support the kind.
        NetworkError: There is nothing to quantize, or the network does not run on the example.
        TraceError: The network cannot be captured in this mode.
        ConversionError: The network does not run once its layers are replaced.
        VerificationError: A layer exceeds the backend's tolerance.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> converted = quantize(network, Example((torch.randn(8, 32),)), Recipe("eager", "x86", kind="dynamic"))
        >>> [row.quantized for row in converted.coverage]
        [True, True]
    """
    if recipe.kind not in DIRECT:
        raise ConfigurationError(f"kind={recipe.kind!r} needs ranges of activations: use one of {', '.join(DIRECT)}.")
    check_kind(recipe)
    require(recipe.target)
    refuse_other_quantization(network)
    refuse_adapters(network, recipe)

    def of_mode(network: nn.Module, example: Example, prefix: str, shares: Shares) -> Converted:
        return _quantize(network, example, recipe, prefix, shares)

    return of_inner_network(of_mode, whole(network, recipe), example, prefix, shares or {})


def _quantize(network: nn.Module, example: Example, recipe: Recipe, prefix: str, shares: Shares) -> Converted:
    # Imported here, so that each mode is imported only if used.
    if recipe.mode == "eager":
        from qat_lightning.modes.uncalibrated.eager import quantize_eager

        return quantize_eager(network, example, recipe, prefix=prefix, shares=shares)
    if recipe.mode == "fx":
        from qat_lightning.modes.uncalibrated.fx import quantize_fx

        return quantize_fx(network, example, recipe, prefix=prefix, shares=shares)
    from qat_lightning.modes.uncalibrated.pt2e import quantize_pt2e

    return quantize_pt2e(network, example, recipe, prefix=prefix, shares=shares)
