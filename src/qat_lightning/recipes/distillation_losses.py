"""Losses of distillation; for class scores, memory is limited to one gradient and a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat_lightning.errors import ConfigurationError

_CHUNK = {"cpu": 2**20}
"""Number of scores per chunk, by type of device: on a CPU, as many as fit into its caches."""
_CHUNK_ELSEWHERE = 2**23
_UNIT = {torch.float16: 2.0**15}
"""Factor by which differences of probabilities are stored, by dtype: a loss is only scaled in the backward pass, and
without this most classes of a large vocabulary would be 0 in float16.
"""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler would write the loop over chunks out
def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, class_axis: int = 1, *, overwrite_teacher: bool = False
) -> Tensor:
    """Cross-entropy with softened targets, minus their entropy: Hinton et al., 2015, https://arxiv.org/abs/1503.02531.

    ``temperature**2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``, the mean over all rows.
    The factor keeps the size of gradients independent of the temperature, as in section 2 of the paper. Computed at
    least in float32, also under autocast, a few rows at a time. The gradient is computed along with the value, so that
    neither the scores nor their softmax are kept for the backward pass, as in Liger Kernel (Hsu et al., 2024,
    https://arxiv.org/abs/2410.10989). There is no second derivative.

    Args:
        student: Scores of shape ``(N, classes, ...)``, any floating dtype.
        teacher: Scores of the same shape; it gets no gradient.
        temperature: Above 0; high values compare the scores themselves, low ones the chosen class.
        class_axis: The axis of the classes: -1 for scores of shape ``(N, tokens, classes)``.
        overwrite_teacher: Store the gradient in the memory of the teacher's scores, if it fits.

    Returns:
        A scalar.

    Raises:
        ConfigurationError: The shapes differ.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0, -1.0]])
        >>> distillation_loss(scores, scores).item()
        0.0
    """
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"The teacher's scores have the shape {tuple(teacher.shape)} and the student's {tuple(student.shape)}: "
            "both must come from the same inputs."
        )
    beside = _Beside(teacher.detach(), float(temperature), class_axis % student.dim(), overwrite_teacher)
    return cast("Tensor", _SoftTargets.apply(student, beside))  # type: ignore[no-untyped-call]


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, relative to the mean square of the teacher's tensor.

    The hint loss of FitNets (Romero et al., 2015, https://arxiv.org/abs/1412.6550), without a regressor because the
    shapes are equal, and relative, so that one weight suits layers of any scale.

    Example:
        >>> feature_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])).item()
        0.20000000298023224
    """
    with torch.autocast(student.device.type, enabled=False):
        wanted = teacher.to(_wide(teacher.dtype))
        tiny = torch.finfo(wanted.dtype).tiny
        return F.mse_loss(student.to(_wide(student.dtype)), wanted) / wanted.square().mean().clamp(min=tiny)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Beside:
    """The inputs of the loss besides the tensor that gets a gradient."""

    teacher: Tensor
    temperature: float
    axis: int
    overwrite: bool


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, beside: _Beside) -> Tensor:
        """The loss; saves the difference of the probabilities, which is the gradient except for a factor."""
        unit = _UNIT.get(student.dtype, 1.0)
        tensors = [student.contiguous(), beside.teacher.contiguous()]
        if ctx.needs_input_grad[0]:
            fits = beside.overwrite and beside.teacher.is_contiguous() and beside.teacher.dtype == student.dtype
            tensors.append(beside.teacher if fits else torch.empty_like(tensors[0]))
            ctx.save_for_backward(tensors[2])
        total = torch.zeros((), dtype=_wide(student.dtype), device=student.device)
        with torch.autocast(student.device.type, enabled=False):
            for chunk in _chunks(tensors, beside.axis):
                total += _compare(*chunk, temperature=beside.temperature, unit=unit)
        rows = student.numel() // student.size(beside.axis)
        ctx.factor = beside.temperature / unit / max(rows, 1)
        return total * beside.temperature**2 / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """In place, unless the graph is kept for another backward pass."""
        (difference,) = ctx.saved_tensors
        factor = grad * ctx.factor
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (difference * factor).to(difference.dtype), None
        return difference.mul_(factor), None


def _compare(
    ours: Tensor, theirs: Tensor, difference: Tensor | None = None, *, temperature: float, unit: float
) -> Tensor:
    """The divergence of a chunk, summed over its rows; the class axis is 1."""
    wide = _wide(ours.dtype)
    wanted = (theirs.to(wide) / temperature).log_softmax(1)
    got = (ours.to(wide) / temperature).log_softmax(1)
    shares = wanted.exp()
    # A class with a teacher score of -inf contributes nothing, whatever the student's score is.
    total = wanted.sub_(got).mul_(shares).masked_fill_(shares == 0, 0.0).sum()
    if difference is not None:
        difference.copy_(got.exp_().sub_(shares).mul_(unit))
    return total


def _chunks(tensors: list[Tensor], axis: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows, of shape (rows, classes) or (samples, classes, positions)."""
    shape = tensors[0].shape
    if not shape.numel():
        return
    size = _CHUNK.get(tensors[0].device.type, _CHUNK_ELSEWHERE)
    classes, positions = shape[axis], shape[axis + 1 :].numel()
    form = (-1, classes, positions) if positions > 1 else (-1, classes)
    step = max(1, size // (classes * positions))
    for samples in zip(*(tensor.view(form).split(step) for tensor in tensors), strict=True):
        if positions == 1 or classes * positions <= size:
            yield samples
            continue
        yield from zip(*(part.split(max(1, size // classes), 2) for part in samples), strict=True)
