"""BatchNorm: which modules are one, which layers they fold into, and the arithmetic of folding, in all modes."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qat_lightning.layers.operators import operator_of
from qat_lightning.numerics.fake_quantize import FakeQuantize


def is_batchnorm(module: object) -> TypeGuard[_BatchNorm]:
    """Whether a module is a BatchNorm of any number of dimensions, or of a subclass."""
    return isinstance(module, _BatchNorm)


def has_statistics(module: Any) -> bool:
    """Whether a BatchNorm normalizes with running statistics in evaluation; otherwise it cannot be folded.

    Example:
        >>> has_statistics(nn.BatchNorm2d(3)), has_statistics(nn.BatchNorm2d(3, track_running_stats=False))
        (True, False)
    """
    return module.running_mean is not None and module.running_var is not None


def folds_into(batchnorm: nn.Module, layer: nn.Module) -> bool:
    """Whether a BatchNorm that only follows a layer can be folded into it in evaluation.

    Linear layers have channels last, but BatchNorm normalizes dimension 1, so their outputs have to be two-dimensional.

    Example:
        >>> folds_into(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), folds_into(nn.BatchNorm1d(3), nn.Conv2d(3, 3, 1))
        (True, False)
    """
    row = operator_of(type(layer))
    return row is not None and type(batchnorm) is row.batchnorm and has_statistics(batchnorm)


def folds_into_phases(batchnorm: nn.Module, layer: nn.Module) -> bool:
    """Whether a BatchNorm after a transposed convolution can be folded into the convolution that replaces it.

    Example:
        >>> folds_into_phases(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 2))
        True
    """
    dims = {nn.ConvTranspose1d: nn.BatchNorm1d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.ConvTranspose3d: nn.BatchNorm3d}
    return type(layer) in dims and type(batchnorm) is dims[type(layer)] and has_statistics(batchnorm)  # type: ignore[index]


def fold_factor(gamma: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """The factor by which folding multiplies each output channel of a weight: ``gamma / sqrt(running_var + eps)``.

    Returns:
        float32, shape ``(channels,)``, without gradient: the straight-through gradient of the division cancels it.
    """
    inverse = torch.rsqrt(running_var.detach().float() + eps)
    return inverse if gamma is None else gamma.detach().float() * inverse


def factor_of(batchnorm: Any) -> Tensor:
    """`fold_factor` of a BatchNorm module."""
    return fold_factor(batchnorm.weight, batchnorm.running_var, batchnorm.eps)


def along(factor: Tensor, weight: Tensor, axis: int = 0) -> Tensor:
    """Reshape a factor for each output channel to broadcast with a weight whose channels are dimension ``axis``."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return factor.reshape(shape)


def for_each_row(values: Tensor, weight: Tensor, axis: int = 0) -> Tensor:
    """Repeat BatchNorm's per-channel values for the rows of a weight that has several rows per channel.

    In the convolution that replaces a transposed one, the phases of a channel are adjacent.

    Example:
        >>> for_each_row(torch.tensor([1.0, 2.0]), torch.zeros(4, 3, 2)).tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    phases = weight.shape[axis] // values.shape[0]
    return values if phases == 1 else values.repeat_interleave(phases)


def fake_quantize_folded(weight: Tensor, factor: Tensor, fq: FakeQuantize, *, axis: int = 0) -> Tensor:
    """Round ``weight * factor`` to the grid, and divide by ``factor``.

    Args:
        weight: The plain weight.
        factor: ``fold_factor`` of the BatchNorm after it, shape ``(channels,)``.
        fq: The weight's FakeQuantize; it gets the folded weight.
        axis: Dimension of the output channels.

    Returns:
        A weight of the shape and dtype of ``weight``. Where ``factor`` is 0 it is the plain weight.
    """
    rounded: Tensor = fq(weight, factor, axis)
    return rounded


def folded_weight(weight: Tensor, factor: Tensor, *, axis: int = 0) -> Tensor:
    """The weight with BatchNorm folded in, in float32; training rounds it."""
    return weight.float() * along(factor, weight, axis)


def folded_bias(bias: Tensor | None, running_mean: Tensor, factor: Tensor, beta: Tensor | None) -> Tensor:
    """The bias that goes with `folded_weight`, in float32.

    Args:
        bias: Bias of the layer.
        running_mean: Running mean of the BatchNorm.
        factor: `fold_factor` of the BatchNorm.
        beta: Bias of the BatchNorm.
    """
    shift = -running_mean.float() if bias is None else bias.float() - running_mean.float()
    return shift * factor if beta is None else shift * factor + beta.float()


def unfolded(values: Tensor, factor: Tensor, otherwise: Tensor | float) -> Tensor:
    """Divide by a folding factor that broadcasts with the values.

    Args:
        values: Values of the folded layer.
        factor: `fold_factor` of the BatchNorm.
        otherwise: The result where the factor is 0, or so small that its inverse overflows.

    Example:
        >>> unfolded(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([0.5, 0.0, 1e-40]), 1.0).tolist()
        [4.0, 1.0, 1.0]
    """
    dead = factor.reciprocal().isinf()
    return torch.where(dead, otherwise, values / torch.where(dead, 1.0, factor))


@torch.no_grad()
def folded_parameters(layer: Any, batchnorm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a float layer that is equivalent to ``layer`` and ``batchnorm`` in evaluation.

    The weight is `folded_weight`. The bias is computed in upstream's order of operations, because it is for upstream's
    kernels.

    Args:
        layer: A convolution or a linear layer.
        batchnorm: Has running statistics; weight and bias may be None.
    """
    bn = batchnorm
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
    beta = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
    weight, bias = fuse(layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, gamma, beta)
    return nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
