"""Distillation: the network with fake-quant learns what the float network makes of the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.measure.metrics import class_axis
from qat_lightning.modes.prepared import cpu_copy, prepared_state, set_phase
from qat_lightning.recipes.features import Features

Loss = Literal["kl", "mse"]
LOSSES: tuple[Loss, ...] = ("kl", "mse")

_SAME = 1e-2
"""Relative difference up to which two features of the same weights are the same tensor."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Cross-entropy with softened targets, less their entropy: Hinton et al., 2015, https://arxiv.org/abs/1503.02531.

    ``temperature**2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``, the mean over all rows.
    The factor keeps gradients of one size whatever the temperature, as in section 2 of the paper. Computed in float32
    at least, whatever autocast says.

    Args:
        student: Scores of shape ``(N, classes, ...)``, any floating dtype.
        teacher: Scores of the same shape, without gradient.
        temperature: Above 0; high ones compare the scores themselves, low ones the chosen class.

    Returns:
        A scalar.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0, -1.0]])
        >>> distillation_loss(scores, scores).item()
        0.0
    """
    with torch.autocast(student.device.type, enabled=False):
        wanted, got = ((_wide(scores) / temperature).log_softmax(1) for scores in (teacher, student))
        divergence = F.kl_div(got, wanted, reduction="none", log_target=True).sum(1).mean()
        return divergence * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, relative to the mean square of the teacher's tensor.

    The hint loss of FitNets (Romero et al., 2015, https://arxiv.org/abs/1412.6550), without a regressor since the
    shapes are equal, and relative so that one weight suits layers of any scale.

    Example:
        >>> feature_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])).item()
        0.20000000298023224
    """
    with torch.autocast(student.device.type, enabled=False):
        wanted = _wide(teacher)
        tiny = torch.finfo(wanted.dtype).tiny
        return F.mse_loss(_wide(student), wanted) / wanted.square().mean().clamp(min=tiny)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class DistillationSettings:
    """What is compared of one network.

    Args:
        temperature: See `distillation_loss`.
        weight: Of the comparison of outputs; 0 leaves it out.
        loss: ``"kl"`` for scores of classes, ``"mse"`` (`feature_loss`) for any outputs.
        outputs: Which outputs, by key or position; None for all that the loss can compare.
        features: Modules of the network.
        feature_weight: Of the mean over the comparisons of features.
    """

    temperature: float = 4.0
    weight: float = 1.0
    loss: Loss = "kl"
    outputs: tuple[str, ...] | None = None
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0


class Distiller:
    """Runs a teacher on whatever its student is called with, and compares the two.

    Args:
        student: The prepared network.
        teacher: The float network; it is put into evaluation, and gets no gradient.
        settings: What to compare.

    Example:
        >>> student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> distiller = Distiller(student, teacher, DistillationSettings(temperature=2.0))
        >>> with distiller.features():
        ...     outputs = distiller.run(student.forward, torch.randn(4, 2))
        >>> distiller.take_loss().shape
        torch.Size([])
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: DistillationSettings) -> None:
        self.settings = settings
        self.teacher = teacher.eval().requires_grad_(False)
        self._of_student = Features(student, settings.features)
        self._of_teacher = Features(teacher, settings.features)
        self._losses: list[Tensor] = []

    def features(self) -> Any:
        """A context within which the student's features are seen."""
        return self._of_student.open() if self.settings.features else nullcontext()

    def run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``, the student's, and note how far it is from the teacher; its outputs are returned.

        Without gradient (a step's own evaluation) nothing is noted.
        """
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The teacher first and on copies: either may change its inputs in place.
        copies = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with torch.no_grad():
            wanted = self.teacher(*copies[0], **copies[1])
        outputs = forward(*args, **kwargs)
        self._losses.append(self._compare(outputs, wanted))
        return outputs

    def take_loss(self) -> Tensor | None:
        """The mean over the calls since the last time, weighted as the settings say; None if there was no call."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean() if losses else None

    def close(self) -> None:
        """Leave no hook on the student."""
        self._of_student.close()
        self._of_teacher.close()
        self._losses = []

    def _compare(self, outputs: Any, wanted: Any) -> Tensor:
        settings, parts = self.settings, []
        if settings.weight:
            pairs = zip(
                chosen_outputs(outputs, settings.outputs, settings.loss),
                chosen_outputs(wanted, settings.outputs, settings.loss),
                strict=True,
            )
            losses = [
                distillation_loss(student, teacher, settings.temperature)
                if settings.loss == "kl"
                else feature_loss(student, teacher)
                for student, teacher in pairs
            ]
            parts.append(settings.weight * torch.stack(losses).mean())
        if settings.features:
            seen, known = self._of_student.seen, self._of_teacher.seen
            distances = [feature_loss(seen[name], known[name]) for name in settings.features if name in known]
            if distances:  # else the example's way through the network is not this call's
                parts.append(settings.feature_weight * torch.stack(distances).mean())
            seen.clear()
            known.clear()
        return torch.stack(parts).sum() if parts else torch.zeros(())


def chosen_outputs(outputs: Any, chosen: Sequence[str] | None, loss: Loss) -> list[Tensor]:
    """The tensors of a network's output to compare.

    Args:
        outputs: What the network returned: a tensor, or a mapping, sequence or object of them.
        chosen: Keys, positions or attributes; None for every tensor that the loss can compare.
        loss: ``"kl"`` needs a class axis, see `qat_lightning.measure.metrics.class_axis`.

    Raises:
        ConfigurationError: There is none, or one that was chosen is not there or has no classes.

    Example:
        >>> [t.shape for t in chosen_outputs({"logits": torch.zeros(2, 5), "size": torch.zeros(2)}, None, "kl")]
        [torch.Size([2, 5])]
    """
    if chosen is None:
        found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and _comparable(leaf, loss)]
        if not found:
            raise ConfigurationError(
                "Distillation finds no scores of classes in what the network returns (a floating tensor (N, classes, "
                "...) of two classes or more): use loss='mse' for other outputs, or weight=0 and features=[...]."
            )
        return found
    tensors = []
    for name in chosen:
        output = _pick(outputs, name)
        if not isinstance(output, Tensor) or not _comparable(output, loss):
            raise ConfigurationError(
                f"outputs={list(chosen)} of Distillation: {name!r} is not "
                + ("a tensor of scores (N, classes, ...)." if loss == "kl" else "a floating tensor.")
                + f" The network returns {_describe(outputs)}."
            )
        tensors.append(output)
    return tensors


def _comparable(output: Tensor, loss: Loss) -> bool:
    return class_axis(output) is not None if loss == "kl" else output.is_floating_point()


def _pick(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, Sequence) and name.isdecimal():
        return outputs[int(name)] if int(name) < len(outputs) else None
    return getattr(outputs, name, None)


def _describe(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, outputs))}"
    if isinstance(outputs, Sequence):
        return f"a {type(outputs).__name__} of {len(outputs)}"
    return f"a {type(outputs).__name__}"


def make_teacher(prepared: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """The float network of a prepared one, with ``weights``, where the prepared one is and in its precision."""
    teacher = copy.deepcopy(prepared_state(prepared).float_network)
    teacher.load_state_dict(weights)
    like = next((p for p in prepared.parameters() if p.is_floating_point()), torch.zeros(()))
    return teacher.to(device=like.device, dtype=like.dtype)


@torch.no_grad()
def check_distillation(prepared: nn.Module, example: Example, settings: DistillationSettings) -> None:
    """Compare a network with itself, before anything is trained: outputs and features have to be there, and the same.

    Args:
        prepared: The network with fake-quant; copies of it are called.
        example: One call of it.
        settings: What is going to be compared.

    Raises:
        ConfigurationError: An output or a feature is not there, or is another tensor in the prepared network.
    """
    student = cpu_copy(prepared)
    set_phase(student, fake_quant=False, observers=False, batchnorm_frozen=True)
    keys = set(prepared_state(prepared).float_network.state_dict())
    weights = {key: value for key, value in student.state_dict().items() if key in keys}
    distiller = Distiller(student, make_teacher(student, weights), settings)
    with distiller.features(), torch.no_grad():
        args, kwargs = copy.deepcopy((example.args, example.kwargs))
        wanted = distiller.teacher(*args, **kwargs)
        student(*example.args, **example.kwargs)
    if settings.weight:
        chosen_outputs(wanted, settings.outputs, settings.loss)
    mode = prepared_state(prepared).recipe.mode
    for name in settings.features:
        theirs, ours = distiller._of_teacher.seen.get(name), distiller._of_student.seen.get(name)
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
            raise ConfigurationError(
                f"The feature {name!r} is not one floating tensor ({type(theirs).__name__}): name a module that is "
                "called, and returns one."
            )
        if ours is None or ours.shape != theirs.shape or not _same(ours, theirs):
            raise ConfigurationError(
                f"The feature {name!r} is another tensor in mode={mode!r}, where a layer is merged with the BatchNorm "
                "and activation behind it: name the last of them, or the module around them."
            )
    distiller.close()


def _same(ours: Tensor, theirs: Tensor) -> bool:
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= _SAME * theirs.double().norm().clamp(min=1e-12))
