"""Distillation: the network with fake-quant learns to reproduce the float network's outputs on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.measure.metrics import class_axis
from qat_lightning.modes.float_state import frozen_beside_adapters
from qat_lightning.modes.prepared import cpu_copy, prepared_state, set_phase
from qat_lightning.recipes.distillation_losses import distillation_loss, feature_loss
from qat_lightning.recipes.features import Features, separate
from qat_lightning.recipes.outputs import LOSSES, Loss, chosen_outputs

__all__ = [
    "LOSSES",
    "DistillationSettings",
    "Distiller",
    "Loss",
    "check_distillation",
    "chosen_outputs",
    "distillation_loss",
    "feature_loss",
    "make_teacher",
]

_SAME = 1e-2
"""Relative difference up to which two features computed with the same weights count as the same tensor."""


@dataclass(frozen=True)
class DistillationSettings:
    """What is compared for one network.

    Args:
        temperature: See `distillation_loss`.
        weight: Weight of the comparison of outputs; 0 leaves it out.
        loss: ``"kl"`` for scores of classes, ``"mse"`` (`feature_loss`) for any outputs.
        outputs: Which outputs, by key or position; None for all that the loss can compare.
        class_axis: Class axis of these outputs; None to determine it, see `qat_lightning.measure.metrics.class_axis`.
        features: Names of modules of the network.
        feature_weight: Weight of the mean over the comparisons of features.
    """

    temperature: float = 4.0
    weight: float = 1.0
    loss: Loss = "kl"
    outputs: tuple[str, ...] | None = None
    class_axis: int | None = None
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0


class Distiller:
    """Runs a teacher on all inputs of its student, and compares the two.

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
        own = set(student.parameters())
        self._shared = [name for name, parameter in teacher.named_parameters() if parameter in own]
        self.teacher = teacher.eval().requires_grad_(False)
        self._of_student = Features(student, settings.features)
        self._of_teacher = Features(teacher, settings.features)
        self._losses: list[Tensor] = []

    def features(self) -> Any:
        """A context in which the student's features are recorded."""
        return self._of_student.open() if self.settings.features else nullcontext()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``, the student's, record the distance to the teacher, and return the student's outputs.

        Without gradients (evaluation within a step) nothing is recorded. If outputs are not compared, the teacher stops
        after its last feature.
        """
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self._refuse_trained()
        # On copies, because either network may change its inputs in place.
        given = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if self.settings.weight:
            return self._run_whole(forward, given, *args, **kwargs)
        self._of_student.forget()
        outputs = forward(*args, **kwargs)
        # The teacher runs afterwards, when it is known how often each module was called.
        with torch.no_grad():
            self._of_teacher.see(self._of_student.calls, *given[0], **given[1])
        self._losses.append(self._sum(self._compare_features()))
        return outputs

    def _run_whole(
        self, forward: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        # The teacher runs first, so that its temporary memory is free again before the student runs.
        with torch.no_grad(), self._of_teacher.open():
            wanted = self.teacher(*given[0], **given[1])
        self._of_student.forget()
        outputs = forward(*args, **kwargs)
        # Weights and features may be returned as outputs.
        kept = [*self.teacher.parameters(), *self.teacher.buffers(), *self._of_teacher.seen.values()]
        features = self._compare_features()
        self._losses.append(self._sum([self._compare_outputs(outputs, wanted, (args, kwargs), kept), *features]))
        return outputs

    def _refuse_trained(self) -> None:
        if not self._shared:
            return
        parameters = dict(self.teacher.named_parameters())
        for name in self._shared:
            if parameters[name].requires_grad:
                raise ConfigurationError(
                    f"Distillation has lost its teacher: {name!r} was frozen when fake-quantization was enabled, and "
                    "is trained now. Give QuantizationAwareTraining float_checkpoint=, or freeze it again."
                )

    def take_loss(self) -> Tensor | None:
        """The mean over the calls since the last time, weighted by the settings; None if there was no call."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean() if losses else None

    def close(self) -> None:
        """Remove all hooks from the student."""
        self._of_student.close()
        self._of_teacher.close()
        self._losses = []

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def _compare_outputs(self, outputs: Any, wanted: Any, inputs: Any, kept: list[Tensor]) -> Tensor:
        settings = self.settings
        chosen = [
            chosen_outputs(given, settings.outputs, settings.loss, inputs, settings.class_axis)
            for given in (outputs, wanted)
        ]
        alone = _alone(chosen[1], kept)
        losses = []
        for student, teacher in zip(*chosen, strict=True):
            if settings.loss == "mse":
                losses.append(feature_loss(student, teacher))
                continue
            axis = class_axis(student, inputs, settings.class_axis)
            assert axis is not None  # otherwise it would not have been chosen
            losses.append(distillation_loss(student, teacher, settings.temperature, axis, overwrite_teacher=alone))
        return settings.weight * torch.stack(losses).mean()

    def _compare_features(self) -> list[Tensor]:
        names = self.settings.features
        seen, known = self._of_student.seen, self._of_teacher.seen
        for name in names:
            if name in self._of_student.without_gradient:
                raise ConfigurationError(
                    f"The feature {name!r} is computed without gradients, so nothing can be learned from it: with "
                    "gradient checkpointing use use_reentrant=False, else name a module outside torch.no_grad()."
                )
        distances = [feature_loss(seen[name], known[name]) for name in names if name in seen and name in known]
        self._of_student.forget()
        self._of_teacher.forget()
        # Missing if this call takes another path through the network than the example.
        return [self.settings.feature_weight * torch.stack(distances).mean()] if distances else []


def _alone(outputs: list[Tensor], kept: list[Tensor]) -> bool:
    """Whether outputs share memory neither with each other nor with kept tensors."""
    storages = [output.untyped_storage().data_ptr() for output in outputs]
    others = {tensor.untyped_storage().data_ptr() for tensor in kept}
    return len(set(storages)) == len(storages) and not others.intersection(storages)


def make_teacher(prepared: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """The float network of a prepared one, with ``weights``, on its device and in its precision.

    Args:
        prepared: The network with fake-quant.
        weights: Entries of the float network's ``state_dict``. Parameters that are frozen beside adapters may be
            missing: they are shared with the prepared network, so the teacher needs no second copy of them.

    Raises:
        ConfigurationError: An entry is missing whose parameter is not frozen.
    """
    network = prepared_state(prepared).float_network
    missing = network.state_dict().keys() - weights.keys()
    trained = sorted(missing - frozen_beside_adapters(prepared))
    if trained:
        raise ConfigurationError(
            f"Distillation has no float weights of {trained[0]!r}, which was frozen when fake-quantization was "
            "enabled, and is trained now. Give QuantizationAwareTraining float_checkpoint=, or freeze it again."
        )
    frozen = dict(prepared.named_parameters(remove_duplicate=False))
    own = dict(network.named_parameters(remove_duplicate=False))
    teacher: nn.Module = copy.deepcopy(network, {id(own[name]): frozen[name] for name in missing})
    teacher.load_state_dict(weights, strict=False)
    like = next((p for p in prepared.parameters() if p.is_floating_point()), torch.zeros(()))
    shared = {id(frozen[name]) for name in missing}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) in shared:
            return tensor
        # Beside a frozen base, which may have another precision, adapters keep theirs.
        kept = not tensor.is_floating_point() or (shared and isinstance(tensor, nn.Parameter))
        return tensor.to(like.device, tensor.dtype if kept else like.dtype)

    teacher._apply(placed)
    return teacher


def check_distillation(prepared: nn.Module, example: Example, settings: DistillationSettings, prefix: str = "") -> None:
    """Compare a network with itself before training: outputs and features have to exist, and be equal.

    Args:
        prepared: The network with fake-quant; copies of it are called.
        example: One call of it.
        settings: What will be compared.
        prefix: The network's name in a LightningModule, with which messages name modules.

    Raises:
        ConfigurationError: An output or a feature does not exist, or is another tensor in the prepared network; the
            message names features that can be compared.
    """
    names = separate(prepared, settings.features)
    wanted, theirs, ours = _called(prepared, example, names)
    if settings.weight:
        call = (example.args, example.kwargs)
        chosen_outputs(wanted, settings.outputs, settings.loss, call, settings.class_axis)
    for name in settings.features:
        why = _why_other(prepared, theirs.get(name), ours.get(name)) if name in names else _why_none(prepared, name)
        if why:
            given = join(prefix, name)
            raise ConfigurationError(f"The feature {given!r} {why}. {_instead(prepared, example, name, prefix)}")


def comparable_features(prepared: nn.Module, example: Example) -> list[str]:
    """Return the modules whose outputs can be features: one tensor, the same in the float and the prepared network.

    Args:
        prepared: The network with fake-quant; copies of it are called.
        example: One call of it.
    """
    names = separate(prepared)
    _, theirs, ours = _called(prepared, example, names)
    return [name for name in names if not _why_other(prepared, theirs.get(name), ours.get(name))]


@torch.no_grad()
def _called(
    prepared: nn.Module, example: Example, names: Sequence[str]
) -> tuple[Any, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Call a network and its teacher with the same weights: the teacher's outputs, its features, the network's."""
    student = cpu_copy(prepared)
    set_phase(student, fake_quant=False, observers=False, batchnorm_frozen=True)
    keys = set(prepared_state(prepared).float_network.state_dict())
    weights = {key: value for key, value in student.state_dict().items() if key in keys}
    teacher = make_teacher(student, weights).eval()
    of_teacher, of_student = Features(teacher, names), Features(student, names)
    args, kwargs = copy.deepcopy((example.args, example.kwargs))
    with of_teacher.open():
        outputs = teacher(*args, **kwargs)
    with of_student.open():
        student(*example.args, **example.kwargs)
    return outputs, of_teacher.seen, of_student.seen


def _why_none(prepared: nn.Module, name: str) -> str:
    """Return why a network has no output of a module."""
    state = prepared_state(prepared)
    if name not in dict(state.float_network.named_modules(remove_duplicate=False)):
        return "is no module of the network"
    return (
        f"is not a separate tensor in mode={state.recipe.mode!r}, because the module is merged with its neighbours or "
        "not called"
    )


def _why_other(prepared: nn.Module, theirs: Any, ours: Any) -> str:
    """Return why the output of a module cannot be compared with the teacher's; empty if it can."""
    if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
        return f"is not a floating-point tensor ({type(theirs).__name__})"
    if ours is None or ours.shape != theirs.shape or not _same(ours, theirs):
        return (
            f"is a different tensor in mode={prepared_state(prepared).recipe.mode!r}, where a layer is merged with the "
            "BatchNorm and activation that follow it"
        )
    return ""


def _instead(prepared: nn.Module, example: Example, name: str, prefix: str) -> str:
    """Name features that can be compared: those of modules near a module."""
    order = list(dict(prepared_state(prepared).float_network.named_modules(remove_duplicate=False)))
    place = order.index(name) if name in order else 0
    possible = comparable_features(prepared, example)
    near = sorted(possible, key=lambda other: abs(order.index(other) - place))[:_SHOWN]
    named = ", ".join(repr(join(prefix, other)) for other in possible if other in near)
    more = f" and {len(possible) - len(near)} more" if len(possible) > len(near) else ""
    return f"Features can be {named}{more}." if named else "No module of this network can be a feature."


_SHOWN = 12
"""How many modules a message names."""


def _same(ours: Tensor, theirs: Tensor) -> bool:
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= _SAME * theirs.double().norm().clamp(min=1e-12))
