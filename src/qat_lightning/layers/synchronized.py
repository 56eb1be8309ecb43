"""BatchNorm over the batches of all processes that train together, on any device.

Same arithmetic as ``nn.SyncBatchNorm``, which does not support CPU tensors and is not one of the classes that
quantization knows: mean and variance are those of all samples, and gradients flow to the samples of every process
(Zhang et al., 2018, "Context Encoding for Semantic Segmentation", section 3.3; variances are merged as by Chan et al.,
1979). With gradients averaged over processes, as in DistributedDataParallel, this equals one process with all samples
in its batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qat_lightning.processes import process_count


def batch_norm_over_all(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` in training, with the statistics of all processes; a collective, in the backward pass too.

    Args:
        x: Shape ``(N, C, ...)``; ``N`` may differ between processes, and be 0 in some.
        running_mean: Updated in place, shape ``(C,)``; None for none.
        running_var: Running variance, updated with the unbiased variance.
        weight: Shape ``(C,)``, or None.
        bias: Shape ``(C,)``, or None.
        momentum: Momentum of the running statistics.
        eps: Added to the variance.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: All processes together have only one value per channel.

    Example:
        In one process it is ``F.batch_norm``:

        >>> x = torch.randn(4, 3, 5)
        >>> ours = batch_norm_over_all(x, None, None, None, None, 0.1, 1e-5)
        >>> torch.allclose(ours, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-6)
        True
    """
    normalized, mean, variance, count = _Normalize.apply(x, eps)  # type: ignore[no-untyped-call]
    if x.numel() <= x.shape[1] and count <= 1:  # only then is the device synchronized
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        normalized = normalized * weight.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    result: Tensor = normalized.to(x.dtype)
    return result


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps)`` over all processes; returns mean, biased variance and count as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        values = x.to(dtype)
        dims = [0, *range(2, x.dim())]
        own = x.numel() // x.shape[1]
        mean = values.mean(dims) if own else values.new_zeros(x.shape[1])
        variance = values.var(dims, correction=0) if own else torch.zeros_like(mean)
        count = values.new_full((1,), own)
        if process_count() > 1:
            total = _sum_over_all(torch.cat([mean * own, count]))
            count = total[-1:]
            whole = total[:-1] / count
            # Deviations from the common mean: sums of squares would lose precision for a small variance.
            variance = _sum_over_all((variance + (mean - whole).square()) * own) / count
            mean = whole
        inverse = torch.rsqrt(variance + eps)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        normalized = (values - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normalized, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.dtype = x.dtype
        return normalized, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        normalized, inverse, count = ctx.saved_tensors
        grad = grads[0]
        dims = [0, *range(2, grad.dim())]
        sums = torch.cat([grad.sum(dims), (grad * normalized).sum(dims)])
        if process_count() > 1:
            sums = _sum_over_all(sums)
        shape = (1, -1) + (1,) * (grad.dim() - 2)
        mean, along = ((part / count).view(shape) for part in sums.chunk(2))
        return ((grad - mean - normalized * along) * inverse.view(shape)).to(ctx.dtype), None


def _sum_over_all(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
